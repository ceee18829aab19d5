"""Curves for the dashboard: series out of rows, and how a panel of it looks.

The palette is Okabe and Ito's ("Color Universal Design", 2008). Colour is never all that tells two curves of a panel
apart: they differ in dashes, markers or both, so that a picture in black and white says the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

MAX_POINTS = 400  # more are averaged in blocks: a picture of 500 pixels shows no more

BLACK, BLUE, SKY, ORANGE = "#000000", "#0072B2", "#56B4E9", "#E69F00"
GREEN, VERMILLION, PURPLE = "#009E73", "#D55E00", "#CC79A7"
GREY, PALE = "#4B5159", "#E4E7EB"
# On a phone the picture's 1200 pixels are shown on 390: 18 points are 8 of its pixels.
TITLE_PT, LEGEND_PT, TICK_PT, NOTE_PT = 24, 18, 18, 18

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What a run's files say: rows of metrics.jsonl, rows of sessions.jsonl, progress.json as it is now."""

    rows: Sequence[Row]
    sessions: Sequence[Row]
    progress: Row

    @property
    def starts(self) -> list[Row]:
        """The rows of sessions.jsonl that tell of a start, the first one included."""
        return [row for row in self.sessions if "event" not in row]

    def series(self, key: str, kind: str = "", gaps: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Passes over the data and values of one key, (N,) float64 each. With gaps, rows without the key are NaN.

        kind: "step" or "epoch" takes the rows of that kind alone.
        """
        x, y = [], []
        for row in self.rows:
            if kind and row.get("kind") != kind:
                continue
            passes, value = passes_of(row), row.get(key)
            if passes is not None and (value is not None or gaps):
                x.append(passes)
                y.append(float("nan") if value is None else float(value))
        return np.asarray(x, dtype=float), np.asarray(y, dtype=float)

    def last(self, key: str) -> float | None:
        """The newest value of a key; None where no row has it."""
        return next((float(row[key]) for row in reversed(self.rows) if row.get(key) is not None), None)

    def at_step(self, step: float, key: str) -> float:
        """Value of a key that only grows, at a step, between rows by a straight line from 0; 0 without rows."""
        known = [(row["global_step"], row[key]) for row in self.rows if {"global_step", key} <= row.keys()]
        steps, values = zip((0.0, 0.0), *sorted(known), strict=True)
        return float(np.interp(step, steps, values))


def passes_of(row: Row) -> float | None:
    """Passes over the data when a row was written; None where it does not say so."""
    passes = row.get("progress/epoch", row.get("epoch"))
    return None if passes is None else float(passes)


def plot(axes: Axes, record: Record, key: str, label: str, color: str, style: str, **options: Any) -> None:
    """Draw a key of the rows against the passes over the data. kind and the options of `plot_points` may be given."""
    plot_points(axes, *record.series(key, options.pop("kind", "")), label, color, style, **options)


def plot_points(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    label: str,
    color: str,
    style: str,
    marker: str = "",
    width: float = 3.0,
    drawstyle: str = "default",
    is_hollow: bool = False,
) -> None:
    """Draw a curve and enter it into the legend; without points, neither."""
    if not x.size:
        return
    x, y = thinned(x, y)
    line = axes.plot(x, y, style, color=color, label=label, linewidth=width, marker=marker, drawstyle=drawstyle)[0]
    line.set_markersize(9 if x.size <= 40 else 6)
    if marker and x.size > 25:
        line.set_markevery(-(-x.size // 25))
    if is_hollow:
        line.set(markerfacecolor="white", markeredgewidth=2)
    if not marker and np.isfinite(y).sum() < 3:
        # One point has no line to be seen by; curves that meet in it are squares around each other.
        line.set(marker="s", markersize={"-": 8, "--": 14}.get(style, 20), fillstyle="full" if style == "-" else "none")


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, each the mean of a block of neighbours; a block without a value stays a gap."""
    size = -(-x.size // MAX_POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, x.size, size)
    known = np.isfinite(y)
    counts = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.where(known, y, 0.0), starts)
    lengths = np.diff(np.append(starts, x.size))
    means = np.divide(sums, counts, out=np.full(starts.size, np.nan), where=counts > 0)
    return np.add.reduceat(x, starts) / lengths, means


def note(axes: Axes, text: str) -> None:
    """A line of the legend that no curve stands for: what was not measured, or a number beside the curves."""
    axes.add_line(Line2D([], [], linestyle="none", label=text))


def say(axes: Axes, text: str) -> None:
    """Words in the place of curves."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=NOTE_PT, color=GREY)
    axes.set_yticks([])


plain_numbers = FuncFormatter(lambda value, _: short(value))


def short(value: float) -> str:
    """A number in at most five characters where it can be: 3e-4, 0.03, 12.5, 812, 1.2k, 35k, 4M."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def right_axis(axes: Axes) -> Axes:
    """A second scale on the right, over the same x axis."""
    right = axes.twinx()
    right.tick_params(labelsize=TICK_PT, colors=GREY, length=3)
    right.yaxis.set_major_locator(MaxNLocator(4))
    right.yaxis.set_major_formatter(plain_numbers)
    for side in ("top", "left"):
        right.spines[side].set_visible(False)
    right.spines["right"].set_color("#B8BEC6")
    return right


def use_log_scale_if_wide(axes: Axes) -> bool:
    """Show values that span more than a factor of 20 on a logarithmic axis, so that one high one hides no others."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.zeros(0)])
    values = drawn[np.isfinite(drawn)]
    is_wide = bool(values.size and values.min() > 0 and values.max() / values.min() > 20)
    if is_wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_major_formatter(plain_numbers)
        axes.yaxis.set_minor_formatter(NullFormatter())
    return is_wide


def with_unit(value: float, unit: str) -> str:
    """A number with a unit, in steps of a thousand: 2780 J → 2.78 kJ."""
    number = short(value)
    return f"{number[:-1]} {number[-1]}{unit}" if number[-1].isalpha() else f"{number} {unit}"


def unit_of_time(longest_s: float) -> tuple[float, str]:
    """Seconds in the unit that a span is best told in, and the unit's name."""
    units = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))
    return next(((scale, unit) for scale, unit in units if longest_s >= 4 * scale), (1.0, "s"))


def prepare(axes: Axes) -> None:
    """The common look of a panel, before its curves are drawn."""
    axes.tick_params(labelsize=TICK_PT, length=3)
    axes.grid(True, color=PALE, linewidth=1.0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain_numbers)


def mark_starts(axes: Axes, record: Record, key: str = "progress/epoch", scale: float = 1.0) -> None:
    """Vertical lines where the run went on from a checkpoint: dotted after a restart, dashed in a new session.

    key: what the x axis shows of a row. scale: its unit. Lines over something else than passes enter the legend.
    """
    if not any(key in row for row in record.rows):
        return
    starts, labels = record.starts[1:], set()
    for row in starts:
        style, label = (":", "restart") if row.get("restart") else ("--", "new session")
        where = record.at_step(row.get("resumed_from_step") or 0, key) / scale
        line = axes.axvline(where, color=PURPLE, linestyle=style, linewidth=2.2 if len(starts) <= 12 else 1.0, zorder=1)
        if key != "progress/epoch" and label not in labels:
            line.set_label(label)
            labels.add(label)


def finish_epochs(axes: Axes, record: Record) -> None:
    """The x axis that the panels over epochs share."""
    last = max((passes_of(row) or 0.0 for row in record.rows), default=1.0)
    last = max(last, 1.0)
    axes.set_xlim(0, last * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=last >= 2))
    axes.set_xlabel("epochs", fontsize=TICK_PT, labelpad=2)


def add_legend(axes: Axes, columns: int) -> None:
    """One legend above the panel for its left and right axis, where it covers nothing; words where there is none."""
    sides = sorted(axes.get_shared_x_axes().get_siblings(axes), key=lambda side: side is not axes)
    curves = [side.get_legend_handles_labels() for side in sides]
    lines, labels = [line for drawn, _ in curves for line in drawn], [label for _, names in curves for label in names]
    if not labels:
        return
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": columns, "borderaxespad": 0.0}
    spacing: dict[str, Any] = {"columnspacing": 1.1, "handletextpad": 0.5, "handlelength": 2.3, "labelspacing": 0.25}
    legend = axes.legend(lines, labels, fontsize=LEGEND_PT, frameon=False, **above, **spacing)
    for line, text in zip(lines, legend.get_texts(), strict=True):
        if getattr(line, "get_linestyle", lambda: "-")() == "None" and not len(line.get_xdata()):
            text.set_color(GREY)
