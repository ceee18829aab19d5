"""compare.png: top-1 against cost, one marker a policy, the spread over seeds as bars.

Readable in black and white: every policy has its own marker and its name beside it; the colours are Okabe and Ito's
("Color Universal Design", 2008).
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ast_dist.track.progress import replace_atomically

_GREY = "#5F6670"
# Marker and colour; a policy of one's own takes one of the last.
_STYLES = {
    "full": ("D", "#000000"),
    "short": ("s", _GREY),
    "random": ("o", "#E69F00"),
    "infobatch": ("^", "#009E73"),
    "selective_backprop": ("v", "#CC79A7"),
    "sundew": ("*", "#0072B2"),
    "online": ("P", "#56B4E9"),
}
_OTHER_STYLES = (("X", "#D55E00"), ("<", "#8C5100"), (">", "#542788"), ("h", "#01665E"), ("p", "#B2182B"))
_SIDE_STEP = 0.011  # of the axis: points of one budget stand beside each other, or their bars would cover each other
_HALO = [withStroke(linewidth=3, foreground="white")]  # a line that passes behind a name leaves it readable
_LINE_HEIGHT = 0.042  # of the axis: what a label needs


def render(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the rows and put the picture in the place of `path`, 1600 by 1000 pixels. Raises OSError."""
    picture = io.BytesIO()
    draw(rows, title).savefig(picture, format="png")
    replace_atomically(path, picture.getvalue())


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The figure. rows: a comparison's, at least one."""
    figure = Figure(figsize=(10, 6.25), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E5E8", linewidth=0.8)
    axes.set_axisbelow(True)
    right = max(row["cost"] for row in rows)
    axes.set_xlim(0.0, 1.2 * right)
    values = [value for row in rows for value in (*row["acc1"], *_bar(row))]
    margin = 0.08 * max(max(values) - min(values), 0.5)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    _less_training(axes, rows)
    styles = _styles_of([row["policy"] for row in rows])
    for rate in sorted({row["rate"] for row in rows}):
        _budget(axes, [row for row in rows if row["rate"] == rate], styles)
    seeds = sorted({row["seeds"] for row in rows})
    counted = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    axes.set_xlabel(
        "cost, epochs of full training (forward, backward and scoring)\n"
        "points of one budget are set side by side, short where it stands; the table has their costs",
        fontsize=11,
    )
    axes.set_ylabel("validation top-1 after the last epoch, %", fontsize=11)
    axes.set_title(
        f"{title}\nmean ± sample standard deviation; faint dots: single seeds ({counted} a point)",
        loc="left",
        fontsize=12,
    )
    return figure


def _bar(row: Mapping[str, Any]) -> tuple[float, float]:
    spread = row["acc1_sd"] or 0.0
    return row["acc1_mean"] - spread, row["acc1_mean"] + spread


def _styles_of(policies: Sequence[str]) -> dict[str, tuple[str, str]]:
    others = sorted({policy for policy in policies if policy not in _STYLES})
    return _STYLES | {policy: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, policy in enumerate(others)}


def _less_training(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The line through short and full: what a selection has to beat."""
    reference = sorted((row["cost"], row["acc1_mean"]) for row in rows if row["policy"] in ("short", "full"))
    if len(reference) < 2:
        return
    axes.plot(*zip(*reference, strict=True), color=_GREY, linestyle=(0, (5, 3)), linewidth=1.3, zorder=1)
    (x0, y0), (x1, y1) = reference[-2:]
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    axes.annotate(
        "what less training alone gives",
        middle,
        xytext=(12, -20),
        textcoords="offset points",
        color=_GREY,
        fontsize=10,
        va="top",
        path_effects=_HALO,
    )


def _budget(axes: Axes, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]]) -> None:
    """The points of one budget, set side by side, with their names to the right of them."""
    width = axes.get_xlim()[1]
    # Best to the right, next to the names: the lines from names to points then cross least.
    ordered = sorted(rows, key=lambda row: row["acc1_mean"])
    # The line of less training passes through short where it stands.
    middle = next((i for i, row in enumerate(ordered) if row["policy"] == "short"), 0)
    places = {row["policy"]: row["cost"] + _SIDE_STEP * width * (i - middle) for i, row in enumerate(ordered)}
    heights = _spread_labels([row["acc1_mean"] for row in ordered], axes)
    label_x = max(places.values()) + 0.02 * width
    for row, label_y in zip(ordered, heights, strict=True):
        marker, color = styles[row["policy"]]
        x, y = places[row["policy"]], row["acc1_mean"]
        axes.plot([x] * len(row["acc1"]), row["acc1"], ".", color=color, alpha=0.35, markersize=6, zorder=2)
        size = 15 if marker == "*" else 9
        error = None if row["acc1_sd"] is None else [row["acc1_sd"]]
        axes.errorbar(
            [x], [y], yerr=error, fmt=marker, color=color, markersize=size, markeredgecolor="white", capsize=4, zorder=3
        )
        axes.plot([x, label_x], [y, label_y], color=color, linewidth=0.6, alpha=0.6, zorder=1)
        name = row["policy"].rpartition(":")[2]
        axes.text(label_x, label_y, f" {name}", color=color, fontsize=10, va="center", zorder=4, path_effects=_HALO)
    if rows[0]["policy"] != "full":
        top = axes.get_xaxis_transform()
        axes.text(
            min(places.values()), 1.0, f"rate {rows[0]['rate']:g}", transform=top, color=_GREY, fontsize=10, va="top"
        )


def _spread_labels(values: Sequence[float], axes: Axes) -> list[float]:
    """Heights for labels of ascending values, so near to them as the labels' own height allows."""
    low, high = axes.get_ylim()
    step = _LINE_HEIGHT * (high - low)
    # Labels that would touch become a block around the mean of their values; blocks merge until none touch.
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _bottom(blocks[-1], step) < _top(blocks[-2], step) + step:
            upper = blocks.pop()
            blocks[-1] += upper
    heights = [_bottom(block, step) + i * step for block in blocks for i in range(len(block))]
    shift = max(0.0, low + step / 2 - heights[0]) - max(0.0, heights[-1] - (high - step / 2))
    return [height + shift for height in heights] if math.isfinite(shift) else heights


def _bottom(block: Sequence[float], step: float) -> float:
    return sum(block) / len(block) - step * (len(block) - 1) / 2


def _top(block: Sequence[float], step: float) -> float:
    return sum(block) / len(block) + step * (len(block) - 1) / 2
