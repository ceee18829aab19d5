"""The run's page on Weights & Biases: a view of the same rows, sent from a thread of its own.

Everything that talks to W&B happens in one daemon thread behind a bounded queue, so neither a missing network (its
init was seen to take 26 s of a 15 s time-out) nor a server that hangs can hold a training step. Without a key or a
network the run is written offline, with one warning; `wandb sync` sends it later. Rows carry their number in
metrics.jsonl as W&B's own step: a row logged again after a restore has the number it had, and W&B drops it.
"""

import contextlib
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ast_dist.track.progress import replace_atomically

Mode = Literal["off", "offline", "online"]
ID_NAME = "wandb_id"
INIT_TIMEOUT_S = 15.0
FINISH_TIMEOUT_S = 20.0
FLUSH_INTERVAL_S = 2.0  # W&B's own 15 s lost the rows of the last 10-15 s when a process was killed
QUEUE_ROWS = 10_000


class WandbRun:
    """Log rows to one W&B run, for as many sessions as the run takes.

    run_dir: W&B's files go to RUN/wandb, the run's id to RUN/wandb_id. mode: "off" does nothing at all. config: shown
    on the run's page. run_id: the id in a restored checkpoint; without one, RUN/wandb_id, or a new id. warn and
    inform are called with one line, from the thread. Whatever goes wrong is one warning, and W&B is off from there.
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
    ) -> None:
        self.run_dir = Path(run_dir)
        self.mode = mode
        self.project = project
        self.run_id: str | None = None
        self._config = dict(config)
        self._warn = warn
        self._inform = inform
        self._init_timeout_s = init_timeout_s
        self._is_full = False
        self._is_given_up = False
        self._exit_code = 0
        self._rows: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_ROWS)
        self._thread: threading.Thread | None = None
        if mode != "off":
            # W&B's reports of its own errors go to the same server: one that never answers held the exit for 20 s.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self.run_id = keep_run_id(self.run_dir, run_id)
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Hand over a row, keys as they are, and return at once. number: its place in metrics.jsonl, from 0."""
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait((number, dict(row)))
        except queue.Full:
            if not self._is_full:
                self._is_full = True
                self._say_wrong(f"{QUEUE_ROWS:,} rows wait to be sent; rows are left out")

    def close(self, exit_code: int = 0, timeout_s: float = FINISH_TIMEOUT_S + 5) -> None:
        """Send what is left and end the W&B session, within timeout_s seconds; later rows are on disk, not online."""
        if self._thread is None:
            return
        self._exit_code = exit_code
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):  # then the thread is stuck, and the join below says so
            self._rows.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say_unsent(timeout_s)
            self._is_given_up = True
        self._thread = None

    def _say_wrong(self, text: str) -> None:
        if not self._is_given_up:
            self._warn(f"W&B: {text}. Training goes on; metrics.jsonl has every row.")

    def _say_unsent(self, waited_s: float) -> None:
        # Without that option W&B passes over runs that began online, and says nothing of rows they did not send.
        rest = f"wandb sync --include-online {self.run_dir}/wandb/*run-*"
        self._say_wrong(f"not done {waited_s:g} s after the end; send the rest: {rest}")

    def _work(self) -> None:
        try:
            run = self._begin()
            while (item := self._rows.get()) is not None:
                number, row = item
                run.log(row, step=number, commit=True)
            try:
                run.finish(exit_code=self._exit_code)
            except TimeoutError:
                self._say_unsent(FINISH_TIMEOUT_S)
        except Exception as error:
            self._say_wrong(f"off from here on ({_first_line(error)})")

    def _begin(self) -> Any:
        """Start the W&B run in the mode asked for, or offline where that fails."""
        import wandb

        if self.mode == "online":
            try:
                wandb.setup(settings=wandb.Settings(silent=True))
                # Asked first, since init would prompt for a key on a terminal and wait for an answer.
                if not wandb.login(prompt=False, verify=False):
                    raise wandb.errors.UsageError("no API key: set WANDB_API_KEY or run `wandb login`")
                return self._init("online")
            except Exception as error:
                where = f"{self.run_dir}/wandb"
                self._say_wrong(f"not online ({_first_line(error)}); the run is written offline to {where}")
                wandb.teardown()  # a service that could not begin the run holds on to its id and refuses it
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=self._init_timeout_s,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            console="off",  # capturing the terminal would break the bars
            silent=True,
            stop_fn=lambda: self._inform("W&B: a stop asked for on the run's page is passed over; press Ctrl-C here."),
            x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        )
        run = wandb.init(
            mode=mode,
            project=self.project,
            id=self.run_id,
            name=self.run_dir.resolve().name,
            dir=str(self.run_dir),
            config=self._config,
            resume="allow",
            settings=settings,
        )
        run.define_metric("*", step_metric="global_step")
        place = run.url if mode == "online" else f"offline; send it with: wandb sync {run.settings.sync_dir}"
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
