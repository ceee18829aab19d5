"""What a notebook's cell shows of a training: the dashboard and a few lines, refreshed in place.

Where there is no notebook, the training's lines are printed as they come. Both read what the run directory holds; what
goes wrong in showing it is one warning, and never reaches the training.
"""

import base64
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from ast_dist.errors import UserError
from ast_dist.track.progress import as_it_is_now, read_progress, status_text

PICTURE_NAME = "dashboard.png"
REFRESH_S = 60.0
_SHOWN_LINES = 8
_TRACEBACK = "Traceback (most recent call last):"
_AGENT_LINE = re.compile(r"[IWE]\d{4} [\d:.]+ \d+ \S*torch/distributed/elastic/")


class AgentNoise:
    """Leaves out what torchrun says of a stop that was asked for: its log lines, and the traceback of its signal."""

    def __init__(self) -> None:
        self._traceback: list[str] = []

    def without(self, lines: Sequence[str]) -> list[str]:
        """The lines but those; a traceback comes once its last line is known."""
        kept: list[str] = []
        for line in lines:
            if line == _TRACEBACK:
                kept += self.rest()
                self._traceback = [line]
            elif self._traceback:
                self._traceback.append(line)
                if not line.startswith(" "):
                    found = self.rest()
                    kept += [] if "SignalException: " in line else found
            elif not _AGENT_LINE.match(line):
                kept.append(line)
        return kept

    def rest(self) -> list[str]:
        """A traceback that has not come to its end."""
        lines, self._traceback = self._traceback, []
        return lines


class PlainView:
    """Prints the training's lines."""

    def lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            print(line, flush=True)

    def refresh(self, is_last: bool = False) -> None:
        pass


class NotebookView:
    """Shows a run's dashboard and status in a cell, in place: every minute, at each epoch and with each new picture.

    display: the module IPython.display. run_dir: of the run. clock: seconds, monotonic. Warnings stay below, whatever
    is refreshed.
    """

    def __init__(
        self,
        run_dir: Path,
        display: ModuleType,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = REFRESH_S,
    ) -> None:
        self._run_dir = run_dir
        self._display = display
        self._clock = clock
        self._every_s = every_s
        self._shown_at = -float("inf")
        self._epoch: Any = None
        self._drawn_at: int | None = None
        self._lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        self._handles: dict[str, Any] = {}
        self._is_broken = False

    def lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            if line.startswith(("warning:", "supervise:")):
                print(line, flush=True)
        self._lines.extend(line for line in lines if line.strip())

    def refresh(self, is_last: bool = False) -> None:
        """Show what is new, where it is time. is_last: whatever the time."""
        if self._is_broken:
            return
        try:
            progress = self._progress()
            drawn_at = self._picture_time()
            news = (progress.get("epoch"), drawn_at) != (self._epoch, self._drawn_at)
            if is_last or news or self._clock() - self._shown_at >= self._every_s:
                self._show(progress, drawn_at)
        except Exception as error:  # noqa: BLE001 - what fails in showing is no reason to stop what is shown
            self._is_broken = True
            print(
                f"warning: nothing more is shown here ({error!r}). The training goes on.", file=sys.stderr, flush=True
            )

    def _show(self, progress: dict[str, Any], drawn_at: int | None) -> None:
        self._shown_at, self._epoch = self._clock(), progress.get("epoch")
        if drawn_at is not None and drawn_at != self._drawn_at:
            png = base64.b64encode((self._run_dir / PICTURE_NAME).read_bytes()).decode("ascii")
            self._put("picture", {"image/png": png, "text/plain": str(self._run_dir / PICTURE_NAME)})
            self._drawn_at = drawn_at
        elif "picture" not in self._handles:
            self._put("picture", {"text/plain": "no dashboard yet"})  # its place is above the lines
        now = datetime.now(UTC)
        status = status_text(as_it_is_now(self._run_dir, progress), now) if progress else "starting\n"
        text = f"{status}{'looked at':<12}{now:%H:%M:%S} UTC\n\n" + "\n".join(self._lines)
        self._put("status", {"text/plain": text})

    def _put(self, name: str, bundle: dict[str, str]) -> None:
        if name in self._handles:
            self._handles[name].update(bundle, raw=True)
        else:
            self._handles[name] = self._display.display(bundle, raw=True, display_id=True)

    def _progress(self) -> dict[str, Any]:
        try:
            return read_progress(self._run_dir)
        except UserError:
            return {}

    def _picture_time(self) -> int | None:
        try:
            return (self._run_dir / PICTURE_NAME).stat().st_mtime_ns
        except OSError:
            return None


def notebook_display() -> ModuleType | None:
    """IPython.display where this process is a notebook's kernel; None anywhere else, with or without IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return sys.modules.get("IPython.display") if hasattr(shell, "kernel") else None
