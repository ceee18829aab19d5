"""What a notebook's cell shows of a training: the dashboard and a few lines, refreshed in place.

Where there is no notebook, the training's lines are printed as they come. Both read what the run directory holds; what
goes wrong in showing it is one warning, and never reaches the training.
"""

import base64
import contextlib
import os
import re
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from ast_dist.errors import UserError
from ast_dist.kaggle_training import View
from ast_dist.run_dir import identity
from ast_dist.track.progress import as_it_is_now, read_progress, status_text

PICTURE_NAME = "dashboard.png"
REFRESH_S = 60.0
_SHOWN_LINES = 8
_LAST_LINES = 20
_MOST_FAILURES = 5  # in a row: a file that is being replaced may be misread once
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

    display: the module IPython.display. run_dir: of the run. clock: seconds, monotonic. is_new: a run begins that moves
    aside what stands there now, of which nothing is shown. Warnings stay below, whatever is refreshed.
    """

    def __init__(
        self,
        run_dir: Path,
        display: ModuleType,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = REFRESH_S,
        is_new: bool = False,
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
        self._failures = 0
        self._is_new, self._former = is_new, identity(run_dir)

    def lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            if line.startswith(("warning:", "supervise:")):
                print(line, flush=True)
        self._lines.extend(line for line in lines if line.strip())

    def refresh(self, is_last: bool = False) -> None:
        """Show what is new, where it is time. is_last: whatever the time."""
        if self._failures >= _MOST_FAILURES:
            return
        try:
            progress = self._progress()
            drawn_at = self._picture_time()
            news = (progress.get("epoch"), drawn_at) != (self._epoch, self._drawn_at)
            if is_last or news or self._clock() - self._shown_at >= self._every_s:
                self._show(progress, drawn_at)
                self._failures = 0
        except Exception as error:  # noqa: BLE001 - what fails in showing is no reason to stop what is shown
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                text = f"warning: nothing more is shown here ({error!r}). The training goes on."
                print(text, file=sys.stderr, flush=True)

    def _show(self, progress: dict[str, Any], drawn_at: int | None) -> None:
        self._shown_at, self._epoch = self._clock(), progress.get("epoch")
        if drawn_at is not None and drawn_at != self._drawn_at:
            png = base64.b64encode((self._run_dir / PICTURE_NAME).read_bytes()).decode("ascii")
            self._put("picture", {"image/png": png, "text/plain": str(self._run_dir / PICTURE_NAME)})
        elif "picture" not in self._handles:
            self._put("picture", {"text/plain": "no dashboard yet"})  # its place is above the lines
        self._drawn_at = drawn_at  # a picture that is gone is no news at the next look
        now = datetime.now(UTC)
        status = status_text(as_it_is_now(self._run_dir, progress), now) if progress else "starting\n"
        text = f"{status}{'looked at':<12}{now:%H:%M:%S} UTC\n\n" + "\n".join(self._lines)
        self._put("status", {"text/plain": text})

    def _put(self, name: str, bundle: dict[str, str]) -> None:
        if name in self._handles:
            self._handles[name].update(bundle, raw=True)
        else:
            self._handles[name] = self._display.display(bundle, raw=True, display_id=True)

    def _has_begun(self) -> bool:
        self._is_new = self._is_new and identity(self._run_dir) == self._former
        return not self._is_new

    def _progress(self) -> dict[str, Any]:
        if not self._has_begun():
            return {}
        try:
            return read_progress(self._run_dir)
        except UserError:
            return {}

    def _picture_time(self) -> int | None:
        if self._is_new:
            return None
        try:
            return (self._run_dir / PICTURE_NAME).stat().st_mtime_ns
        except OSError:
            return None


def notebook_display() -> ModuleType | None:
    """IPython.display where this process is a notebook's kernel; None anywhere else, with or without IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return sys.modules.get("IPython.display") if hasattr(shell, "kernel") else None


class Watch:
    """Keeps what a training says last, and holds its errors back: one that ends it is told once, as the end.

    too_full: what to warn of once, asked each minute; None where there is room.
    """

    def __init__(
        self, view: View, too_full: Callable[[], str | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._view = view
        self._too_full = too_full
        self._clock = clock
        self._looked_at = clock()
        self._is_full = False
        self._noise = AgentNoise()
        self.errors: list[str] = []
        self.last: deque[str] = deque(maxlen=_LAST_LINES)

    def lines(self, lines: Sequence[str]) -> None:
        self.last.extend(lines)
        self.errors += [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        self._view.lines(self._noise.without([line for line in lines if not line.startswith("error: ")]))

    def refresh(self, is_last: bool = False) -> None:
        if is_last:
            self._view.lines(self._noise.rest())
        self._view.refresh(is_last)
        if not self._is_full and self._clock() - self._looked_at >= REFRESH_S:
            self._looked_at = self._clock()
            if text := self._too_full():
                self._is_full = True
                tell(f"warning: {text}")


def tell(text: str) -> None:
    """Say something, below what is shown. Where nobody can be told any more, the training still goes on."""
    with contextlib.suppress(OSError, ValueError):  # of a pipe that was closed, a full disk, a closed stream
        print(text, flush=True)


def closing_words(run_dir: Path, run_type: str | None = None) -> list[str]:
    """What to do next, once a training has ended cleanly.

    run_type: Kaggle's word for how the notebook runs, "Interactive" or "Batch"; KAGGLE_KERNEL_RUN_TYPE unless given.
    """
    try:
        progress = read_progress(run_dir)
    except UserError:
        return ["stopped before the first step: nothing is lost. Run the cell again."]
    run_type = run_type or os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    best = progress.get("best_acc1")
    accuracy = "" if best is None else f", best top-1 {best:.2f} %"
    if run_type == "Batch":
        keep = "the output of this version, once the notebook has ended"
    else:
        keep = (
            "its output once you choose Save Version → Quick Save with its output, before this session ends; "
            "/kaggle/working does not last by itself"
        )
    where = f"epoch {progress.get('epoch')} of {progress.get('epochs')}, step {progress.get('step') or 0:,}{accuracy}"
    if progress.get("state") == "finished":
        return [
            f"finished: {where}",
            f"to keep it: {keep}",
            f"weights: ast-dist export {shlex.quote(str(run_dir))} --to model.safetensors",
        ]
    return [
        f"saved: {where}, {progress.get('checkpoint')} ({progress.get('message')})",
        f"to keep it: {keep}",
        "to go on: attach that output (Add Input → Your Work) in the next session, and run the same cell",
    ]
