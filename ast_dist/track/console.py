"""What a person sees while it trains: live bars on a terminal, one plain line a row anywhere else.

Logs, pipes, notebooks, TERM=dumb and NO_COLOR get plain ASCII lines without a single escape code. Rows are those of
metrics.jsonl; keys that are absent were not measured and show as "-".
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from ast_dist.track.progress import duration

Row = Mapping[str, Any]
REDRAW_INTERVAL_S = 0.1


class Console:
    """Show rows, messages and warnings.

    epochs: passes over the data that the whole run takes. quiet: warnings only. stream: where it goes, stdout by
    default; in plain form warnings go to stderr. Used by rank 0 alone.
    """

    def __init__(self, epochs: int, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.epochs = epochs
        self.quiet = quiet
        self._stream = stream or sys.stdout
        self._bars: _Bars | None = None
        self._is_live = _can_show_bars(self._stream) and not quiet

    def start(self, info: Mapping[str, Any]) -> None:
        """Show what is about to be done, one aligned `name  value` line each, and begin."""
        self.message(_aligned(info))
        if self._is_live and self._bars is None:
            self._bars = _Bars(self.epochs, self._stream)

    def step(self, row: Row) -> None:
        """Show a step row."""
        if self._bars:
            self._bars.step(row)
        else:
            self.message(plain_line(row, self.epochs))

    def epoch(self, row: Row) -> None:
        """Show an epoch row; on a terminal it stays above the bars."""
        if self._bars:
            self._bars.step(row)
            self._bars.say(short_line(row, self.epochs))
        else:
            self.message(plain_line(row, self.epochs))

    def message(self, text: str) -> None:
        """Show a line, unless quiet."""
        if self.quiet:
            return
        if self._bars:
            self._bars.say(text)
        else:
            print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Show a warning, quiet or not."""
        if self._bars:
            self._bars.say(f"warning: {text}", style="bold yellow")
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Take the bars away and show the end: where everything is and what to type next."""
        if self._bars:
            self._bars.close()
            self._bars = None
        if summary:
            self.message(_aligned(summary))


def plain_line(row: Row, epochs: int) -> str:
    """A step or epoch row as one line, in columns that stay where they are from row to row."""
    is_epoch = row.get("kind") == "epoch"
    digits = len(str(epochs))
    where = f"{row.get('epoch', 0):>{digits}}/{epochs}" if is_epoch else _number(row, "progress/epoch", ".2f")
    accuracy = ("val top-1", "val/acc1") if is_epoch else ("selected top-1", "train/acc1_selected")
    loss = ("val loss", "val/loss") if is_epoch else ("train loss", "train/loss")
    return "  ".join(
        (
            f"epoch {where:>{max(2 * digits + 1, digits + 3)}}",
            f"step {row.get('global_step', 0):>6}",
            f"{accuracy[0]:<14} {_number(row, accuracy[1], '.2f'):>6}",
            f"{loss[0]:<10} {_number(row, loss[1], '.4f'):>7}",
            f"rate {_number(row, 'gate/rate', '.2f'):>4} (target {_number(row, 'gate/rate_target', '.2f'):>4})",
            f"threshold {_number(row, 'gate/threshold', '.3g'):>8}",
            f"{_number(row, 'perf/images_per_s', ',.0f'):>7} images/s",
            f"data wait {_data_wait(row):>5}",
            f"left {_time_left(row):>7}",
        )
    )


def short_line(row: Row, epochs: int) -> str:
    """An epoch row in less than 80 columns, to stand above the bars, which show the rest."""
    return "  ".join(
        (
            f"epoch {row.get('epoch', 0):>{len(str(epochs))}}/{epochs}",
            f"val top-1 {_number(row, 'val/acc1', '.2f'):>6}",
            f"val loss {_number(row, 'val/loss', '.4f'):>7}",
            f"rate {_number(row, 'gate/rate', '.2f'):>4}",
            f"took {duration(row.get('perf/epoch_s')):>7}",
        )
    )


def filled(parts: Sequence[str], width: int) -> str:
    """The parts in as few lines of at most `width` columns as they need; none is cut, and none broken in two."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def _data_wait(row: Row) -> str:
    share = row.get("perf/data_wait")
    return "-" if share is None else f"{share * 100:.0f} %"


def _number(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return "-" if value is None else format(value, form)


def _time_left(row: Row) -> str:
    hours = row.get("progress/eta_h")
    return duration(None if hours is None else hours * 3600)


def _aligned(pairs: Mapping[str, Any]) -> str:
    width = max(map(len, pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs.items())


def _can_show_bars(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


class _Bars:
    """One bar for the epoch, one for the run, and the figures; drawn when a row comes, by no thread."""

    def __init__(self, epochs: int, stream: TextIO) -> None:
        self._epochs = epochs
        self._console = RichConsole(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            console=self._console,
            expand=True,
        )
        self._epoch_bar = self._progress.add_task(f"epoch 1/{epochs}", total=1.0)
        self._run_bar = self._progress.add_task("run", total=float(epochs))
        self._figures = Text("waiting for the first step", style="dim")
        self._drawn_at = 0.0
        self._live = Live(
            Group(self._progress, self._figures),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start(refresh=True)
        # rich hides the cursor until it stops, but a killed process never stops: it would stay hidden in the shell.
        self._console.show_cursor(True)

    def step(self, row: Row) -> None:
        passes = float(row.get("progress/epoch") or 0.0)
        current = min(int(passes), self._epochs - 1)
        self._progress.update(self._epoch_bar, description=f"epoch {current + 1}/{self._epochs}")
        self._progress.update(self._epoch_bar, completed=passes - current)
        self._progress.update(self._run_bar, completed=passes)
        figures = (
            f"rate {_number(row, 'gate/rate', '.2f')}/{_number(row, 'gate/rate_target', '.2f')}",
            f"threshold {_number(row, 'gate/threshold', '.3g')}",
            f"{_number(row, 'perf/images_per_s', ',.0f')} images/s",
            f"data wait {_data_wait(row)}",
            f"left {_time_left(row)}",
        )
        self._figures = Text(filled(figures, self._console.width))
        now = time.monotonic()
        is_due = now - self._drawn_at >= REDRAW_INTERVAL_S
        self._live.update(Group(self._progress, self._figures), refresh=is_due)
        if is_due:
            self._drawn_at = now

    def say(self, text: str, style: str = "") -> None:
        # rich draws the bars again below the text, but with the figures as last refreshed.
        self._live.refresh()
        self._console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()
