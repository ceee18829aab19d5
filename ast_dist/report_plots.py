"""Plots of the report: SVG inside the page, with tooltips, and no script.

Readable in black and white and in the dark: curves differ by their dashes and marks, and take their colours from the
page's style sheet (Okabe and Ito's palette, "Color Universal Design", 2008).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_POINTS = 400  # more are averaged in blocks: a plot this wide shows no more
MAX_TOOLTIPS = 60  # points of a curve that the mouse finds
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 8, 38
_SMALLEST = 1e-200  # below it, floats run out of digits
# Colour (a class of the style sheet), dashes, mark.
_STYLES = (
    ("blue", "", "circle"),
    ("orange", "7 4", "square"),
    ("green", "2 4", "triangle"),
    ("vermillion", "9 5 2 5", "diamond"),
    ("purple", "14 4", "cross"),
    ("black", "4 6", "down"),
    ("sky", "12 4 2 4 2 4", "ring"),
)


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    x, y: (N,) floats; NaN in y is a gap. style: number of its look, so that a quantity keeps it from plot to plot.
    is_stepped: y held since the point before. unit: after the numbers of tooltips.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int = 0
    is_stepped: bool = False
    unit: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether there is anything to draw."""
        return bool(np.isfinite(self.y).any())


@dataclass(frozen=True)
class Mark:
    """A vertical line: where a session or a restart went on."""

    x: float
    text: str
    is_restart: bool


@dataclass(frozen=True)
class Panel:
    """A plot to be: its curves, in one unit, over one axis.

    low, high: ends of the y axis where they do not follow from the values. may_be_log: whether values that span more
    than a factor of 20 get a logarithmic axis. empty: said where nothing was measured. notes: said below the plot.
    """

    title: str
    curves: Sequence[Curve]
    x_name: str = "epochs"
    low: float | None = None
    high: float | None = None
    may_be_log: bool = False
    marks: Sequence[Mark] = ()
    empty: str = "not measured"
    notes: Sequence[str] = ()


def figure(panel: Panel) -> str:
    """The panel as a <figure>: its title, a legend, the plot, and what is to be said below it."""
    curves = [curve for curve in panel.curves if curve.is_measured]
    legend = [f"{_sample(curve.style)}{escape(curve.label)}" for curve in curves]
    # One curve is what the title says.
    body = (_legend(legend) if len(panel.curves) > 1 else "") + _svg(panel, curves) if curves else ""
    body = body or f"<p>{escape(panel.empty)}</p>"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in panel.notes)
    return f'<figure class="plot"><figcaption>{escape(panel.title)}</figcaption>{body}{notes}</figure>\n'


def legend_of_marks(marks: Sequence[Mark]) -> str:
    """What the vertical lines of the plots are; nothing where there are none."""
    there = {mark.is_restart for mark in marks}
    kinds = [(kind, text) for kind, text in ((False, "a new session"), (True, "a restart")) if kind in there]
    return _legend([f"{_mark_sample(kind)}{text} went on from a checkpoint" for kind, text in kinds])


def number(value: float) -> str:
    """A number as people write it: 1,234.5, 0.0312, 12.3M."""
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{float(f'{value:.5g}'):,.15g}"


def thinned(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points, each the mean of a block of neighbours; a block without a value stays a gap."""
    size = -(-x.size // most)
    if size <= 1:
        return x, y
    starts = np.arange(0, x.size, size)
    is_known = np.isfinite(y)
    counts = np.add.reduceat(is_known.astype(float), starts)
    sums = np.add.reduceat(np.where(is_known, y, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(starts.size, np.nan), where=counts > 0)
    return np.add.reduceat(x, starts) / np.diff(np.append(starts, x.size)), means


class _Scale:
    """From values to positions along one axis."""

    def __init__(self, low: float, high: float, start: float, end: float, is_log: bool = False) -> None:
        self.low, self.high, self.is_log = low, high, is_log
        self._from, self._to = (math.log(low), math.log(high)) if is_log else (low, high)
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """The position, in the SVG's units; values off the axis stand at its end."""
        value = min(max(value, self.low), self.high)
        share = ((math.log(value) if self.is_log else value) - self._from) / (self._to - self._from)
        return self._start + share * (self._end - self._start)

    def ticks(self, most: int) -> list[float]:
        """Round values along the axis, `most` or fewer of them."""
        if not self.is_log:
            return _round_values(self.low, self.high, most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = range(first, last + 1)
        tries = [[f * 10.0**k for k in decades for f in factors] for factors in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))]
        on_axis = [[value for value in values if self.low <= value <= self.high] for values in tries]
        fewest = on_axis[-1][:: max(1, -(-len(on_axis[-1]) // most))]
        return next((values for values in on_axis if len(values) <= most), fewest)


def _round_values(low: float, high: float, most: int) -> list[float]:
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [(first + i) * step for i in range(count + 1)]


def _scales(panel: Panel, curves: Sequence[Curve]) -> tuple[_Scale, _Scale]:
    x = np.concatenate([curve.x for curve in curves])
    y = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    x_high = float(x.max()) if x.max() > _SMALLEST else 1.0
    across = _Scale(0.0, 1.02 * x_high, _LEFT, _WIDTH - _RIGHT)
    low, high = float(y.min()), float(y.max())
    is_log = panel.may_be_log and low > _SMALLEST and high / 20 > low
    if is_log:
        low, high = low / 1.15, high * 1.15
    else:
        margin = max(0.05 * (high - low), 1e-9 * abs(high)) if high > low else 0.1 * abs(high) or 1.0
        low = low - margin if panel.low is None else panel.low
        high = high + margin if panel.high is None else panel.high
        high = high if high - low > _SMALLEST else low + max(1.0, 0.1 * abs(low))
    return across, _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log)


def _svg(panel: Panel, curves: Sequence[Curve]) -> str:
    across, up = _scales(panel, curves)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_in_words(panel, curves))}">',
        *_axes(across, up, panel.x_name),
        *(
            f'<path class="mark{" again" * mark.is_restart}" d="M{across.at(mark.x):.1f} {_TOP}V{_HEIGHT - _BOTTOM}">'
            f"<title>{escape(mark.text)}</title></path>"
            for mark in panel.marks
        ),
    ]
    drawn = [(curve, *thinned(curve.x, curve.y)) for curve in curves]
    parts += [_line(curve, x, y, across, up) for curve, x, y in drawn]
    parts += [_points(curve, x, y, across, up, panel.x_name) for curve, x, y in drawn]
    return "".join([*parts, "</svg>"])


def _axes(across: _Scale, up: _Scale, x_name: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in up.ticks(6):
        y = up.at(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4.5:.1f}">{number(value)}</text>')
    for value in across.ticks(6):
        x = across.at(value)
        parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{bottom + 17}">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="end" x="{right}" y="{_HEIGHT - 4}">{escape(x_name)}</text>')
    return parts


def _line(curve: Curve, x: np.ndarray, y: np.ndarray, across: _Scale, up: _Scale) -> str:
    color, dashes, _ = _style(curve.style)
    path, is_drawing = [], False
    for value, height in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(height):
            is_drawing = False
            continue
        at, top = f"{across.at(value):.1f}", f"{up.at(height):.1f}"
        if not is_drawing:
            path.append(f"M{at} {top}h0")  # a point alone is a dot, by its round ends
        elif curve.is_stepped:
            path.append(f"V{top}H{at}")
        else:
            path.append(f"L{at} {top}")
        is_drawing = True
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path class="line {color}"{dashed} d="{"".join(path)}"/>'


def _points(curve: Curve, x: np.ndarray, y: np.ndarray, across: _Scale, up: _Scale, x_name: str) -> str:
    """Tooltips along the curve, and some marks by which it is told from others where colours are not seen."""
    color, _, mark = _style(curve.style)
    known = np.flatnonzero(np.isfinite(y))
    picked = known[np.linspace(0, known.size - 1, min(known.size, MAX_TOOLTIPS)).astype(int)]
    # Each look begins its marks elsewhere, or those of curves that lie on each other would hide one another.
    every = max(1, picked.size // 8)
    marked = set(picked[(curve.style % 3) * every // 3 :: every].tolist())
    parts = []
    for i in picked.tolist():
        at, top = across.at(float(x[i])), up.at(float(y[i]))
        if i in marked:
            parts.append(_shape(mark, at, top, color))
        words = f"{curve.label}: {number(float(y[i]))}{curve.unit} ({x_name} {number(float(x[i]))})"
        parts.append(f'<circle class="tip" cx="{at:.1f}" cy="{top:.1f}" r="6"><title>{escape(words)}</title></circle>')
    return "".join(parts)


def _shape(mark: str, x: float, y: float, color: str) -> str:
    if mark in ("circle", "ring"):
        return f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="{3 if mark == "circle" else 4.5}"/>'
    outline = {
        "square": "m-3 -3h6v6h-6z",
        "triangle": "m0 -4l4 7h-8z",
        "down": "m0 4l4 -7h-8z",
        "diamond": "m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
        "cross": "m-3.5 -3.5l7 7m0 -7l-7 7",
    }[mark]
    return f'<path class="dot {color}" d="M{x:.1f} {y:.1f}{outline}"/>'


def _style(number: int) -> tuple[str, str, str]:
    """A look by its number: past the last, the colours come again with other dashes and marks."""
    color = _STYLES[number % len(_STYLES)][0]
    _, dashes, mark = _STYLES[(number + number // len(_STYLES)) % len(_STYLES)]
    return color, dashes, mark


def _sample(style: int) -> str:
    color, dashes, mark = _style(style)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<path class="line {color}"{dashed} d="M1 7H35"/>'
    return f'<svg class="sample" viewBox="0 0 36 14" aria-hidden="true">{line}{_shape(mark, 18, 7, color)}</svg>'


def _legend(items: Sequence[str]) -> str:
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _mark_sample(is_restart: bool) -> str:
    line = f'<path class="mark{" again" * is_restart}" d="M6 0V14"/>'
    return f'<svg class="sample short" viewBox="0 0 12 14" aria-hidden="true">{line}</svg>'


def _in_words(panel: Panel, curves: Sequence[Curve]) -> str:
    """What a plot shows, for those who do not see it."""
    told = []
    for curve in curves:
        y = curve.y[np.isfinite(curve.y)]
        ends = f"from {number(float(y[0]))} to {number(float(y[-1]))}{curve.unit}"
        told.append(f"{curve.label}: {ends}, lowest {number(float(y.min()))}, highest {number(float(y.max()))}")
    return f"{panel.title}, over {panel.x_name}. " + "; ".join(told)
