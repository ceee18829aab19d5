"""The processes that draw beside the training, so that drawing never holds a step: dashboard.png and the diagrams.

Nothing here imports matplotlib: the training process stays free of it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Modules that draw, by name, since this stands below them; and what they draw.
PICTURE = ("ast_dist.track.dashboard", "dashboard.png")
DIAGRAMS = ("ast_dist.diagram", "sundew.svg")
MIN_INTERVAL_S = 30.0  # a picture costs about a second of one core: at most a few percent of it, at low priority


class DashboardProcess:
    """Keep RUN/dashboard.png fresh from a process of low priority beside the training, one at a time.

    With the last picture come the diagrams, architecture.svg and sundew.svg, from a process of their own.

    warn is called with one line, once, when something could not be drawn. No method but `close` waits, and none
    raises because of a picture.
    """

    def __init__(
        self, run_dir: Path | str, warn: Callable[[str], None], min_interval_s: float = MIN_INTERVAL_S
    ) -> None:
        self.run_dir = Path(run_dir)
        self._warn = warn
        self._min_interval_s = min_interval_s
        self._drawing: _Drawing | None = None
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
            self._wait(time.monotonic())
        if self._is_wanted and self._child is None and time.monotonic() >= self._next_start:
            self._start()

    def close(self, timeout_s: float = 30.0) -> None:
        """Draw the final picture and the diagrams and wait for them, at most timeout_s seconds."""
        deadline = time.monotonic() + timeout_s
        try:
            diagrams = _Drawing(DIAGRAMS, self.run_dir)
        except OSError as error:
            diagrams = None
            self._warn_once(DIAGRAMS, str(error))
        self._wait(deadline)
        self._start()
        self._wait(deadline)
        if diagrams and (reason := diagrams.ended(deadline)):
            self._warn_once(DIAGRAMS, reason)

    def leave(self) -> None:
        """Begin a last picture, unless one is being drawn, and wait for neither; nothing may be called after this."""
        if self._child is None:
            self._start()
        if self._drawing is not None:
            self._drawing.forget()

    @property
    def _child(self) -> subprocess.Popen[bytes] | None:
        return self._drawing.child if self._drawing else None

    def _start(self) -> None:
        self._is_wanted = False
        self._next_start = time.monotonic() + self._min_interval_s
        try:
            self._drawing = _Drawing(PICTURE, self.run_dir)
        except OSError as error:
            self._warn_once(PICTURE, str(error))

    def _wait(self, deadline: float) -> None:
        drawing, self._drawing = self._drawing, None
        if drawing and (reason := drawing.ended(deadline)):
            self._warn_once(PICTURE, reason)

    def _warn_once(self, what: tuple[str, str], reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"{self.run_dir / what[1]} is not up to date: {reason}. Training goes on.")


class _Drawing:
    """A process that runs one of the package's modules on a run. Raises OSError when it cannot be started."""

    def __init__(self, what: tuple[str, str], run_dir: Path) -> None:
        # A file, since a pipe that nobody reads could block the child; closed when the child is reaped.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-m", what[0], os.fspath(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # a Ctrl-C is meant for the training, which then wants the last picture
            )
        except OSError:
            self._errors.close()
            raise

    def ended(self, deadline: float) -> str | None:
        """Wait until a moment of the monotonic clock, then end it; why it failed, None where it did not."""
        try:
            code = self.child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
            self._errors.close()
            return "not drawn in time"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        if code == 0:
            return None
        return lines[-1] if lines else f"its process ended with {code}"

    def forget(self) -> None:
        """Let it go on alone."""
        self._errors.close()
