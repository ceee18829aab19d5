"""The process that draws dashboard.png beside the training, so that drawing never holds a step.

Nothing here imports matplotlib: the training process stays free of it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

MIN_INTERVAL_S = 30.0  # a picture costs about a second of one core: at most a few percent of it, at low priority


class DashboardProcess:
    """Keep RUN/dashboard.png fresh from a process of low priority beside the training, one at a time.

    warn is called with one line, once, when a picture could not be drawn. No method but `close` waits, and none
    raises because of the picture.
    """

    def __init__(
        self, run_dir: Path | str, warn: Callable[[str], None], min_interval_s: float = MIN_INTERVAL_S
    ) -> None:
        self.run_dir = Path(run_dir)
        self._warn = warn
        self._min_interval_s = min_interval_s
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._is_wanted = False
        self._has_warned = False
        self._next_start = 0.0

    def refresh(self) -> None:
        """Ask for a new picture: begun now, or, if one is being drawn or was just now, at a later `tend`."""
        self._is_wanted = True
        self.tend()

    def tend(self) -> None:
        """Begin the picture that was asked for, once its time has come. Cheap: call it at every row."""
        if self._child is not None and self._child.poll() is not None:
            self._reap()
        if self._is_wanted and self._child is None and time.monotonic() >= self._next_start:
            self._start()

    def close(self, timeout_s: float = 30.0) -> None:
        """Draw the final picture and wait for it, at most timeout_s seconds."""
        deadline = time.monotonic() + timeout_s
        self._wait(deadline)
        self._start()
        self._wait(deadline)

    def leave(self) -> None:
        """Begin a last picture, unless one is being drawn, and wait for neither; nothing may be called after this."""
        if self._child is None:
            self._start()
        if self._errors is not None:
            self._errors.close()

    def _start(self) -> None:
        self._is_wanted = False
        self._next_start = time.monotonic() + self._min_interval_s
        try:
            # A file, since a pipe that nobody reads could block the child; closed when the child is reaped.
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            self._child = subprocess.Popen(
                [sys.executable, "-m", "ast_dist.track.dashboard", os.fspath(self.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # a Ctrl-C is meant for the training, which then wants the last picture
            )
        except OSError as error:
            self._warn_once(str(error))
            self._close_errors()

    def _wait(self, deadline: float) -> None:
        if self._child is None:
            return
        try:
            self._child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            self._warn_once("not drawn in time")
            self._close_errors()
            return
        self._reap()

    def _reap(self) -> None:
        assert self._child is not None and self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if self._child.returncode != 0:
            self._warn_once(lines[-1] if lines else f"its process ended with {self._child.returncode}")
        self._close_errors()

    def _close_errors(self) -> None:
        if self._errors is not None:
            self._errors.close()
        self._child = self._errors = None

    def _warn_once(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"{self.run_dir / 'dashboard.png'} is not up to date: {reason}. Training goes on.")
