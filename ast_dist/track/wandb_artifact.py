"""Checkpoints as versions of one W&B artifact: the best one, and the last.

W&B reads the files when it gets to it, and by then retention may have removed the checkpoint. So a folder of hard
links under RUN/wandb keeps them, without another copy of the bytes, until they are sent.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In the first epochs nearly each is the best so far.
_INTERVAL_S = 600.0
_STAGE_NAME = "checkpoints"


class CheckpointArtifact:
    """Logs checkpoints as the artifact checkpoint-ID, aliases best and latest. Used by W&B's thread alone.

    run: the W&B run. is_online: offline nothing is sent meanwhile, and only what the run ends with is logged. warn:
    called with what went wrong, the first time; nothing is logged from there on.
    """

    def __init__(
        self,
        run_dir: Path,
        run: Any,
        is_online: bool,
        warn: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = run_dir.absolute() / "wandb" / _STAGE_NAME
        self._run = run
        self._is_online = is_online
        self._warn = warn
        self._now = now
        self._newest: Path | None = None
        self._best: Path | None = None
        self._logged_best: str | None = None
        self._logged_at: float | None = None
        self._sending: threading.Thread | None = None
        self._is_off = False
        if is_online:
            # A session that was killed left them; what it did not send of the best is sent again with the next.
            shutil.rmtree(self._stages, ignore_errors=True)

    def note(self, newest: Path, best: Path | None) -> None:
        """Take in a commit. A new best is sent beside the training, one at a time, once in 10 minutes at most."""
        self._newest, self._best = newest, best
        is_idle = self._sending is None or not self._sending.is_alive()
        is_due = self._logged_at is None or self._now() - self._logged_at >= _INTERVAL_S
        if self._is_online and best is not None and best.name != self._logged_best and is_idle and is_due:
            self._log(best, ["best"])

    def finish(self) -> None:
        """Log what a finished run ends with."""
        if self._best == self._newest and self._newest is not None:
            self._log(self._newest, ["best", "latest"])
            return
        if self._best is not None and self._best.name != self._logged_best:
            self._log(self._best, ["best"])
        # Last: W&B calls the newest version the latest, whatever it is told.
        if self._newest is not None:
            self._log(self._newest, ["latest"])

    def _log(self, checkpoint: Path, aliases: list[str]) -> None:
        if self._is_off:
            return
        import wandb

        try:
            stage = self._staged(checkpoint)
            artifact = wandb.Artifact(f"checkpoint-{self._run.id}", "checkpoint", metadata={"name": checkpoint.name})
            for file in sorted(stage.iterdir()):
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
            logged = self._run.log_artifact(artifact, aliases=aliases)
        except FileNotFoundError:
            return  # removed meanwhile: a better one and three newer ones are there by now
        except Exception as error:
            self._give_up(error)
            return
        self._logged_at = self._now()
        if "best" in aliases:
            self._logged_best = checkpoint.name
        if self._is_online:
            self._sending = threading.Thread(target=self._await, args=(logged, stage), name="wandb-files", daemon=True)
            self._sending.start()

    def _staged(self, checkpoint: Path) -> Path:
        """A folder of links to a checkpoint's files; copies where the file system has no links."""
        stage = self._stages / checkpoint.name
        if stage.is_dir():
            return stage
        half = self._stages / f"half-{checkpoint.name}"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        for file in checkpoint.iterdir():
            try:
                os.link(file, half / file.name)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(file, half / file.name)
        half.rename(stage)
        return stage

    def _await(self, logged: Any, stage: Path) -> None:
        try:
            logged.wait()
        except Exception as error:
            self._give_up(error)
        else:
            with contextlib.suppress(OSError):
                shutil.rmtree(stage)

    def _give_up(self, error: Exception) -> None:
        if not self._is_off:
            self._is_off = True
            self._warn(f"no checkpoints are logged from here on ({type(error).__name__}: {error})".splitlines()[0])
