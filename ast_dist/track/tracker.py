"""The one thing that the training loop tells what happened: rows go to disk first, then to every view.

Used by rank 0 alone. A view that fails warns once and stays off; a disk that refuses rows is said loudly and tried
again at each row. Neither stops the training.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ast_dist import startup
from ast_dist.config import Config, to_dict
from ast_dist.errors import UserError
from ast_dist.track.alerts import Alerts
from ast_dist.track.callbacks import Callbacks
from ast_dist.track.console import Console
from ast_dist.track.dashboard_process import DashboardProcess
from ast_dist.track.hardest import Hardest
from ast_dist.track.history import History, as_number, read, stream
from ast_dist.track.progress import LEFT_KEYS, read_progress, write_progress
from ast_dist.track.summary import summary
from ast_dist.track.time_left import RECENT, Stretch, epoch_stretches
from ast_dist.track.wandb import WandbRun

Row = Mapping[str, Any]
CLOSE_TIMEOUT_S = 30.0
MAX_WARNINGS_KEPT = 100


class Tracker:
    """Fan rows out to metrics.jsonl, the console, W&B and the dashboard; keep progress.json and sessions.jsonl.

    run_dir: an existing folder, held by this process. world_size: ranks that train. restart: how often torchrun has
    restarted this job; 0 is a start by a person, and a new session. epochs: that the run will have, where they are
    not config.loop.epochs.
    """

    def __init__(
        self, run_dir: Path | str, config: Config, world_size: int, restart: int = 0, epochs: int | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        epochs = config.loop.epochs if epochs is None else epochs
        self.console = Console(epochs, config.track.quiet)
        self._config = config
        self._began = time.monotonic()
        self._history = History(self.run_dir / "metrics.jsonl")
        self._sessions = History(self.run_dir / "sessions.jsonl")
        told = read(self._sessions.path)
        starts = [row for row in told if "event" not in row and isinstance(row.get("session"), int)]
        before = max((row["session"] for row in starts), default=0)
        self._start_row: dict[str, Any] = {
            "session": max(1, before if restart else before + 1),
            "restart": restart,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": world_size,
        }
        self._progress: dict[str, Any] = {
            **{"state": "running", "epoch": 0, "step": 0, "best_acc1": None, "last_acc1": None, "total_s": 0.0},
            **dict.fromkeys(LEFT_KEYS),
            **{"session_hours": config.session.hours or None, "warnings": 0, "last_warning": None},
            **{"checkpoint": None, "checkpoint_at": None, "message": ""},
            "checkpoint_verified_at": None,
            "epochs": epochs,
            "sessions": self._start_row["session"],
            "restarts": sum((as_number(row.get("restart")) or 0) > 0 for row in starts) + (restart > 0),
            "needs_person": False,
            "policy": config.gate.policy,
            "run_dir": str(run_dir),
        }
        self.stretches: deque[Stretch] = deque(maxlen=RECENT)
        """Recent epochs with their pace, over all sessions, the newest last."""
        # A restart goes on counting in its session.
        session = self._start_row["session"]
        warned = [row for row in told if row.get("event") == "warning" and row.get("session") == session]
        if warned:
            self._progress |= {"warnings": len(warned), "last_warning": str(warned[-1].get("text", ""))}
        self._is_started = False
        self._early_warnings: list[dict[str, Any]] = []
        self._costs: dict[str, Any] = {}
        self._total_before_s = 0.0
        self._last_sign_of_life: float | None = None
        self._rows_lost = 0
        self._broken: set[str] = set()
        self._dashboard = DashboardProcess(self.run_dir, self.warn) if config.track.dashboard else None
        self._wandb: WandbRun | None = None
        self._wandb_id_before: str | None = None
        self._callbacks = Callbacks(path, self.warn) if (path := config.track.callbacks) else None

    @property
    def total_s(self) -> float:
        """Seconds spent on the run, over all its sessions, work that a kill undid included."""
        return self._total_before_s + time.monotonic() - self._began

    @property
    def wandb_id(self) -> str | None:
        """The run's id at W&B, for the checkpoint; None where it has none."""
        return self._wandb.run_id if self._wandb else self._wandb_id_before

    @property
    def history_bytes(self) -> int:
        """Bytes of metrics.jsonl so far, for the checkpoint; they are on the disk itself when this returns."""
        try:
            return self._history.sync()
        except OSError as error:
            self.warn(f"{self._history.path} cannot be flushed ({error}). Training goes on.")
            return self._history.length

    def start(
        self,
        checkpoint: str | None = None,
        resumed_from_step: int = 0,
        previous_beat: tuple[int, float] | None = None,
        session: Row | None = None,
        versions: Row | None = None,
        started: Row | None = None,
        info: Row | None = None,
        num_samples: int | None = None,
    ) -> None:
        """Cut the rows past the checkpoint, note the start in sessions.jsonl, and open the views.

        checkpoint: the name of the one that was restored, None at a start from nothing. previous_beat: steps done by
        the process before, and its last sign of life (seconds since 1970). session: what the checkpoint keeps for
        the tracker, total_s and history_bytes. versions: of the packages. started: when this process began,
        and how long it took to get here. info: shown on the console. num_samples: size of the training set, by which
        the dashboard turns skipped samples into a share.
        A metrics.jsonl that is not the checkpoint's is set aside, with a warning.
        """
        kept = dict(session or {}) if checkpoint else {}
        restored = self._look_back(int(kept.get("history_bytes", 0)))
        self._restore(checkpoint, float(kept.get("total_s", 0.0)))
        steps_before, self._last_sign_of_life = previous_beat or (resumed_from_step, None)
        repeated = max(0, steps_before - resumed_from_step)
        self._start_row |= {
            "resumed_from_step": resumed_from_step,
            "last_step_before": resumed_from_step + repeated,
            "steps_repeated": repeated,
            "checkpoint": checkpoint,
            "versions": dict(versions or {}),
            **({"started": dict(started)} if started else {}),
        }
        self._progress |= {"step": resumed_from_step, "checkpoint": checkpoint, "num_samples": num_samples}
        self._keep(self._sessions, self._start_row)
        self._is_started = True
        for row in self._early_warnings:
            self._keep(self._sessions, row)
        self._view("the console", self.console.start, {**(info or {}), "start": self._describe_start()})
        self._wandb_id_before = kept.get("wandb_id")
        track = self._config.track
        if track.wandb == "off":
            return
        self._wandb = WandbRun(
            self.run_dir,
            track.wandb,
            track.wandb_project,
            to_dict(self._config),
            run_id=self._wandb_id_before,
            warn=self.warn,
            inform=lambda text: self._view("the console", self.console.message, text),
            restored=restored,
            group=track.wandb_group,
            tags=[*track.wandb_tags, self._config.gate.policy, *filter(None, [self._config.preset])],
            keeps_artifacts=track.wandb_artifacts,
        )

    def first_step(self) -> None:
        """Note that the first step of this process is done: seconds since the process before was last alive."""
        if self._last_sign_of_life is not None:
            row = {key: self._start_row[key] for key in ("session", "restart")}
            recovery_s = max(0.0, time.time() - self._last_sign_of_life)
            times = {"recovery_s": round(recovery_s, 3), "first_step_s": round(startup.age_s(), 3)}
            self._keep(self._sessions, {**row, "event": "first_step", **times})
            if self._wandb and self._start_row["restart"]:
                self._wandb.alert(Alerts.restarted(recovery_s, self._start_row["resumed_from_step"]))

    def step(self, row: Row) -> None:
        """Take a step row. Its kind, its session and the time spent are filled in."""
        self._take("step", row, self.console.step)
        if self._dashboard:
            self._view("the dashboard", self._dashboard.tend)

    def epoch(self, row: Row, hardest: Hardest | None = None) -> None:
        """Take an epoch row, as `step` does. hardest: samples for W&B to show."""
        self._take("epoch", row, self.console.epoch, hardest)
        if self._dashboard:
            self._view("the dashboard", self._dashboard.refresh)

    def checkpoint(self, info: Row, best: Path | None) -> None:
        """Tell of a committed checkpoint. info: for callbacks, `path` at least. best: that of the highest accuracy."""
        if self._wandb:
            self._view("W&B", self._wandb.checkpoint, Path(info["path"]), best)
        if self._callbacks:
            self._callbacks.call("on_checkpoint", info)

    def progress(self, **fields: Any) -> None:
        """Update progress.json and STATUS.txt, after every save; keys as in `write_progress`.

        Fields not given keep their value; the time spent and the time of a new checkpoint are filled in.
        """
        self._write_progress(fields)
        if self._dashboard and self._progress["state"] == "running":
            self._view("the dashboard", self._dashboard.refresh)

    def warn(self, text: str) -> None:
        """Show a warning; where even the console fails, on stderr. It is counted in progress.json.

        The first 100 of a session are kept in sessions.jsonl, and told in progress.json at once.
        """
        try:
            self.console.warn(text)
        except Exception as error:
            with contextlib.suppress(OSError):
                print(f"warning: {text} (and the console failed: {error!r})", file=sys.stderr)
        self._progress |= {"warnings": self._progress["warnings"] + 1, "last_warning": text}
        if self._progress["warnings"] <= MAX_WARNINGS_KEPT:
            self._keep_warning(text)

    def rolled_back(self, epoch: int, step: int) -> None:
        """Note in sessions.jsonl that this attempt ends and the last checkpoint is loaded again."""
        row = {key: self._start_row[key] for key in ("session", "restart")}
        self._keep(self._sessions, {**row, "event": "rollback", "epoch": epoch, "step": step})
        if self._wandb:
            self._wandb.alert(Alerts.rolled_back(epoch, step))

    def close(
        self,
        state: str,
        message: str = "",
        timeout_s: float = CLOSE_TIMEOUT_S,
        *,
        needs_person: bool = False,
        agent: str | None = None,
    ) -> None:
        """Write how it ended, show it, and wait for W&B and the last picture, timeout_s seconds at most.

        state: finished, paused or failed; nobody waits for the picture of a failed run, which must make room for its
        restart. message: why, in one line. needs_person: whether a restart would end the same way; agent: who must
        therefore not start it again by itself.
        """
        deadline = time.monotonic() + timeout_s
        ended = {"state": state, "message": message, "needs_person": needs_person, "agent": agent}
        nothing_left = dict.fromkeys(LEFT_KEYS[:3], 0.0) if state == "finished" else {}
        self._write_progress({**ended, **nothing_left})
        if self._dashboard and state == "failed":
            self._view("the dashboard", self._dashboard.leave)
        elif self._dashboard:
            self._view("the dashboard", self._dashboard.close, timeout_s)
        if self._wandb:
            left_s = max(1.0, deadline - time.monotonic())
            self._view("W&B", self._wandb.close, state, message, left_s)
        self._view("the console", self.console.close, summary(self.run_dir, self._progress, self._costs))
        self._history.close()
        self._sessions.close()

    def _look_back(self, kept_bytes: int) -> list[dict[str, Any]]:
        """Take from the rows so far what is needed, cut those past `kept_bytes`, and return the others for W&B alone.

        A run has millions of rows in the end, and each start waits for this.
        """
        restored: list[dict[str, Any]] = []
        newest: dict[str, Any] = {}
        for row, end in stream(self._history.path):
            self.stretches.extend(epoch_stretches([row]))
            self._total_before_s = as_number(row.get("time/total_s")) or 0.0
            if end <= kept_bytes:
                newest = row if row.get("kind") == "epoch" else newest | row
                if self._config.track.wandb != "off":
                    restored.append(row)
        try:
            self._history.truncate(kept_bytes)
        except UserError as error:
            # The checkpoint is sound, and what was told of the way to it must not keep the run from going on.
            aside = self._history.set_aside() if self._history.path.stat().st_size else None
            self.warn(f"{error} Going on with an empty one" + (f"; the old one is now {aside.name}." if aside else "."))
            restored, newest = [], {}
        self._note_costs({**newest, "kind": "epoch"})
        return restored

    def _restore(self, checkpoint: str | None, saved_total_s: float) -> None:
        """Take up the time spent so far, also on steps that are about to be repeated, and the checkpoint's age."""
        try:
            previous = read_progress(self.run_dir)
        except UserError:
            previous = {}
        told_s = as_number(previous.get("total_s")) or 0.0
        self._total_before_s = max(saved_total_s, told_s, self._total_before_s)
        if checkpoint and previous.get("checkpoint") == checkpoint:
            self._progress["checkpoint_at"] = previous.get("checkpoint_at")

    def _describe_start(self) -> str:
        row = self._start_row
        which = f"session {row['session']}" + (f", restart {row['restart']}" if row["restart"] else "")
        if row["checkpoint"] is None:
            return f"{which}, from the beginning"
        return f"{which}, from {row['checkpoint']}, {row['steps_repeated']:,} steps to repeat"

    def _take(self, kind: str, row: Row, show: Callable[[Row], None], hardest: Hardest | None = None) -> None:
        filled = {"progress/session": self._start_row["session"], "time/total_s": round(self.total_s, 3)}
        whole = {"kind": kind, **row, **filled}
        self.stretches.extend(epoch_stretches([whole]))
        self._note_costs(whole)
        self._keep(self._history, whole)
        self._view("the console", show, whole)
        if self._wandb:
            self._view("W&B", self._wandb.log, whole, hardest)
        if self._callbacks:
            self._callbacks.call(f"on_{kind}", whole)

    def _note_costs(self, row: Row) -> None:
        """Keep what was spent so far. An epoch's row tells all that is measured, a step's a part of it."""
        costs = {key: value for key, value in row.items() if key.startswith("cost/")}
        self._costs = costs if row.get("kind") == "epoch" else self._costs | costs

    def _keep(self, history: History, row: Row) -> None:
        try:
            history.append(row)
        except (OSError, TypeError) as error:
            self._rows_lost += 1
            self._warn_once("rows", f"ROWS ARE LOST: {history.path} ({error}). Training goes on; each row is tried.")
        else:
            if self._rows_lost:
                self.warn(f"{history.path} is written again; rows lost before: {self._rows_lost}.")
                self._rows_lost = 0
                self._broken.discard("rows")

    def _keep_warning(self, text: str) -> None:
        about = {key: self._start_row[key] for key in ("session", "restart")}
        row = {**about, "event": "warning", "text": text, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        if not self._is_started:
            self._early_warnings.append(row)  # a session's first row says how it started
            return
        # It was shown. A disk that refuses it also refuses rows and progress.json, and that is said there.
        with contextlib.suppress(OSError):
            self._sessions.append(row)
        self._write_progress({})

    def _write_progress(self, fields: dict[str, Any]) -> None:
        if fields.get("checkpoint") not in (None, self._progress["checkpoint"]):
            fields = {"checkpoint_at": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        self._progress |= {"total_s": round(self.total_s, 3), **fields}
        try:
            write_progress(self.run_dir, self._progress)
        except (OSError, TypeError) as error:
            self._warn_once("progress", f"{self.run_dir}/progress.json cannot be written ({error}). Training goes on.")

    def _view(self, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Call a view; the first failure is a warning and the last call."""
        if name in self._broken:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._warn_once(name, f"{name} is off from here on ({error!r}). Training goes on.")

    def _warn_once(self, name: str, text: str) -> None:
        if name not in self._broken:
            self._broken.add(name)
            self.warn(text)
