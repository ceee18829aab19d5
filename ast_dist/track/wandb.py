"""The run's page on Weights & Biases: a view of the same rows, sent from a thread of its own.

Everything that talks to W&B happens in one daemon thread behind a bounded queue, so neither a missing network (its
init was seen to take 26 s of a 15 s time-out) nor a server that hangs can hold a training step. Without a key or a
network the run is written offline, with one warning; `wandb sync` sends it later. A row's step there follows from the
row, so one that is logged again after a restore is known, and left out. A kill costs W&B its last seconds; the next
session begins with the rows of metrics.jsonl that W&B lacks.
"""

import contextlib
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ast_dist.track.alerts import Alert, Alerts
from ast_dist.track.code_version import code_version
from ast_dist.track.hardest import Hardest
from ast_dist.track.progress import replace_atomically
from ast_dist.track.wandb_artifact import CheckpointArtifact
from ast_dist.track.wandb_fragments import fragments, mark_sent, own_step, pass_over_empty, steps_held
from ast_dist.track.wandb_service import end_service, leave_inherited_service

Mode = Literal["off", "offline", "online"]
ID_NAME = "wandb_id"
INIT_TIMEOUT_S = 15.0
FINISH_TIMEOUT_S = 20.0
FLUSH_INTERVAL_S = 2.0  # W&B's own 15 s lost the rows of the last 10-15 s when a process was killed
QUEUE_ROWS = 10_000
# What the summary of a whole run holds of these; of all others, the last value. W&B's own extremes begin anew with each
# session, and would put those of the last one on the page.
_EXTREMES: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "val/acc1": ("max", max),
    "val/acc5": ("max", max),
    "val/ema_acc1": ("max", max),
    "val/loss": ("min", min),
    "val/ema_loss": ("min", min),
}
_TAG_CHARACTERS = 64


class WandbRun:
    """Log rows to one W&B run, for as many sessions as the run takes.

    run_dir: W&B's files go to RUN/wandb, the run's id to RUN/wandb_id. mode: "off" does nothing at all. config: shown
    on the run's page, beside the version of the code. run_id: the id in a restored checkpoint; without one,
    RUN/wandb_id, or a new id. restored: the rows that metrics.jsonl holds when the session begins. group, tags: of the
    run. keeps_artifacts: whether checkpoints are logged. warn and inform are called with one line, from the thread.
    Whatever goes wrong is one warning, and W&B is off from there.
    """

    def __init__(
        self,
        run_dir: Path | str,
        mode: Mode,
        project: str,
        config: Mapping[str, Any],
        run_id: str | None = None,
        warn: Callable[[str], None] = print,
        inform: Callable[[str], None] = print,
        init_timeout_s: float = INIT_TIMEOUT_S,
        restored: Sequence[dict[str, Any]] = (),
        group: str = "",
        tags: Sequence[str] = (),
        keeps_artifacts: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.mode = mode
        self.project = project
        self.run_id: str | None = None
        self._config = dict(config)
        self._warn = warn
        self._inform = inform
        self._init_timeout_s = init_timeout_s
        self._restored = restored
        self._group = group
        self._tags = sorted({tag[:_TAG_CHARACTERS] for tag in tags})
        self._keeps_artifacts = keeps_artifacts
        self._is_full = False
        self._is_given_up = False
        self._exit_code = 0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_ROWS)
        self._thread: threading.Thread | None = None
        # Below: the thread's own.
        self._run: Any = None
        self._is_online = False
        self._held: Container[int] = ()
        self._extremes: dict[str, float] = {}
        self._alerts = Alerts(restored)
        self._artifact: CheckpointArtifact | None = None
        self._has_images = True
        if mode != "off":
            # W&B's reports of its own errors go to the same server: one that never answers held the exit for 20 s.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self.run_id = keep_run_id(self.run_dir, run_id)
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any], hardest: Hardest | None = None) -> None:
        """Hand over a row, keys as they are, and return at once. hardest: samples to show beside it."""
        whole = dict(row)
        self._put(lambda: self._log(whole, hardest))

    def alert(self, alert: Alert | None) -> None:
        """Hand over an alert; None is none. At most one of its kind is sent in 10 minutes."""
        if alert:
            self._put(lambda: self._send(alert))

    def checkpoint(self, path: Path, best: Path | None) -> None:
        """Hand over what was committed: the newest checkpoint, and the best one, which may be the same."""
        if self._keeps_artifacts:
            self._put(lambda: self._artifact.note(path, best) if self._artifact else None)

    def close(self, state: str = "finished", message: str = "", timeout_s: float = FINISH_TIMEOUT_S + 5) -> None:
        """Send what is left and end the W&B session, within timeout_s seconds; later rows are on disk, not online.

        state, message: how the run ended and why: an alert tells.
        """
        if self._thread is None:
            return
        deadline = time.monotonic() + timeout_s
        self._exit_code = 1 if state == "failed" else 0
        with contextlib.suppress(queue.Full):  # then the thread is stuck, and the join below says so
            self._jobs.put(lambda: self._end(state, message), timeout=timeout_s)
            self._jobs.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say_unsent(timeout_s)
            self._is_given_up = True
            end_service()
        self._thread = None

    def _put(self, job: Callable[[], None]) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            if not self._is_full:
                self._is_full = True
                self._say_wrong(f"{QUEUE_ROWS:,} rows wait to be sent; rows are left out until the next session")

    def _say_wrong(self, text: str) -> None:
        if not self._is_given_up:
            self._warn(f"W&B: {text}. Training goes on; metrics.jsonl has every row.")

    def _say_unsent(self, waited_s: float) -> None:
        # Without that option W&B passes over runs that began online, and says nothing of rows they did not send. The
        # sessions before need not be sent again: what the server lacked of them is in this one.
        which = self._run.settings.sync_dir if self._is_online else f"{self.run_dir}/wandb/*run-*"
        self._say_wrong(f"not done {waited_s:g} s after the end; send the rest: wandb sync --include-online {which}")

    # Below: in the thread.

    def _work(self) -> None:
        try:
            self._run = self._begin()
            self._catch_up()
            while (job := self._jobs.get()) is not None:
                job()
            try:
                self._run.finish(exit_code=self._exit_code)
            except TimeoutError:
                self._say_unsent(FINISH_TIMEOUT_S)
                end_service()
            else:
                if self._is_online:
                    assert self.run_id
                    for log in fragments(self.run_dir, self.run_id):
                        mark_sent(log)
        except Exception as error:
            self._say_wrong(f"off from here on ({_first_line(error)})")

    def _catch_up(self) -> None:
        """Find out what W&B has of the run, and log what it lacks of the sessions before."""
        for row in self._restored:
            self._write(row)
        self._restored = ()

    def _log(self, row: dict[str, Any], hardest: Hardest | None) -> None:
        if hardest and self._has_images and own_step(row) not in self._held:
            with _data_in(self.run_dir.absolute() / "wandb"):
                self._write(row | self._table(hardest))
        else:
            self._write(row)
        if alert := self._alerts.judge(row):
            self._send(alert)

    def _write(self, row: dict[str, Any]) -> None:
        step = own_step(row)
        if step not in self._held:
            self._run.log(row, step=step, commit=True)
        for key, (name, of) in _EXTREMES.items():
            value = row.get(key)
            if value is not None and self._extremes.get(key) != (new := of(value, self._extremes.get(key, value))):
                self._extremes[key] = new
                self._run.summary.update({key: {name: new}})

    def _table(self, hardest: Hardest) -> dict[str, Any]:
        import wandb

        try:
            shown = [(wandb.Image(image, file_type="jpg"), *values) for image, *values in hardest.rows()]
            return {"samples/hardest": wandb.Table(columns=["image", *Hardest.COLUMNS], data=shown)}
        except Exception as error:
            self._has_images = False
            self._say_wrong(f"no images of the hardest samples from here on ({_first_line(error)})")
            return {}

    def _send(self, alert: Alert) -> None:
        if self._alerts.is_due(alert):
            self._run.alert(alert.title, alert.text, level=alert.level, wait_duration=Alerts.INTERVAL_S)

    def _end(self, state: str, message: str) -> None:
        if self._artifact and state == "finished":
            self._artifact.finish()
        self._send(Alerts.ended(state, message))

    def _begin(self) -> Any:
        """Start the W&B run in the mode asked for, or offline where that fails."""
        import wandb

        assert self.run_id
        leave_inherited_service()
        logs = pass_over_empty(fragments(self.run_dir, self.run_id))
        if self.mode == "online":
            try:
                wandb.setup(settings=wandb.Settings(silent=True))
                # Asked first, since init would prompt for a key on a terminal and wait for an answer.
                if not wandb.login(prompt=False, verify=False):
                    raise wandb.errors.UsageError("no API key: set WANDB_API_KEY or run `wandb login`")
                run = self._init("online")
                self._is_online = True
                # Rows go to the server in order, and a killed session's last ones did not.
                self._held = range(run.step)
                return run
            except Exception as error:
                where = f"{self.run_dir}/wandb"
                self._say_wrong(f"not online ({_first_line(error)}); the run is written offline to {where}")
                wandb.teardown()  # a service that could not begin the run holds on to its id and refuses it
        run = self._init("offline")
        try:
            self._held = set().union(*map(steps_held, logs))
        except RuntimeError as error:
            self._say_wrong(f"{error}; its rows are logged again, and `wandb sync` would send them twice")
        return run

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=self._init_timeout_s,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            console="off",  # capturing the terminal would break the bars
            silent=True,
            save_code=False,
            disable_code=True,
            stop_fn=lambda: self._inform("W&B: a stop asked for on the run's page is passed over; press Ctrl-C here."),
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        )
        run = wandb.init(
            mode=mode,
            project=self.project,
            id=self.run_id,
            name=self.run_dir.resolve().name,
            dir=str(self.run_dir),
            config={**self._config, "code": code_version()},
            group=self._group or None,
            tags=self._tags,
            job_type="train",
            resume="allow",
            settings=settings,
        )
        run.define_metric("*", step_metric="global_step")
        for key in _EXTREMES:
            run.define_metric(key, step_metric="global_step", summary="none")
        if self._keeps_artifacts:
            self._artifact = CheckpointArtifact(self.run_dir, run, mode == "online", self._say_wrong)
        send = f"wandb sync --include-online {self.run_dir}/wandb/*run-*"
        place = run.url if mode == "online" else f"offline; send it with: {send}"
        self._inform(f"W&B: run {self.run_id}, {place}")
        return run


def keep_run_id(run_dir: Path, run_id: str | None = None) -> str:
    """The run's W&B id: the one given, else the one in RUN/wandb_id, else a new one. Kept in RUN/wandb_id."""
    path = run_dir / ID_NAME
    kept = path.read_text(encoding="ascii").strip() if path.is_file() else ""
    chosen = run_id or kept or secrets.token_hex(4)
    if chosen != kept:
        replace_atomically(path, f"{chosen}\n".encode())
    return chosen


@contextlib.contextmanager
def _data_in(folder: Path) -> Iterator[None]:
    """Have W&B keep the images of a table, until they are sent, in a folder: with the run, not in somebody's home.

    There is no setting for it but the environment's, which is not ours to change for good, nor where the user did.
    """
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
