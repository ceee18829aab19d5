"""sundew.svg: how the gate comes to an epoch's samples, with a run's own numbers in it; letters without a run."""

import math

import numpy as np

from ast_dist.diagram_numbers import BINS_PER_OCTAVE, LOG2_MIN, NUM_BINS, GateNumbers, Histogram, bin_edges
from ast_dist.diagram_svg import ACCENT, INK, PALE, QUIET, SHEET, TEXT_PX, Drawing

WIDTH, LEFT, INNER = 460.0, 24.0, 412.0
CHART_PX, AXIS_PX, MOST_BARS = 150.0, 34.0, 56
SMALL_PX = 12.5
UNKNOWN = "not known"


def sundew_svg(numbers: GateNumbers | None) -> str:
    """The drawing as a file's text. numbers: of a run; None draws the process with letters in place of numbers."""
    drawing = Drawing(WIDTH)
    known = numbers if numbers and numbers.is_gated else None
    y = drawing.lines(LEFT, 38, INNER, "The Sundew gate", 24, is_bold=True)
    y = drawing.lines(LEFT, y, INNER, _subtitle(numbers), fill=QUIET)
    y = _scores(drawing, y - 6, known)
    y = _arrow(drawing, y, "counted on each rank, summed over all: 480 integers")
    y = _chart(drawing, y, known)
    y = _sides(drawing, y, known)
    y = _plan(drawing, y, known)
    _control(drawing, y, known)
    return drawing.svg("The Sundew gate", _described(numbers))


def _subtitle(numbers: GateNumbers | None) -> str:
    if numbers is None:
        return "No run was named: letters stand in the place of its numbers."
    if not numbers.is_gated:
        return f"Run {numbers.run}, policy {numbers.policy}: no gated epoch so far; letters stand for the numbers."
    return f"Run {numbers.run}: epoch {_count(numbers.epoch)} of {_count(numbers.epochs)}, policy {numbers.policy}"


def _described(numbers: GateNumbers | None) -> str:
    if numbers is None or not numbers.is_gated:
        return "From remembered significance over one histogram and one threshold to the samples that an epoch trains."
    return (
        f"Of {_count(numbers.num_samples)} samples, {_count(numbers.trained)} are trained and "
        f"{_count(numbers.skipped)} skipped, at a threshold of {_share(numbers.threshold)} nats."
    )


def _scores(drawing: Drawing, y: float, known: GateNumbers | None) -> float:
    settings = known.settings if known else {}
    loss, entropy = (settings.get(name) for name in ("loss_weight", "entropy_weight"))
    weights = ("a", "b") if loss is None or entropy is None else (f"{loss:g}", f"{entropy:g}")
    significance = f"significance = {weights[0]} · loss + {weights[1]} · entropy, in nats"
    samples = f"{_count(known.num_samples)} training samples" if known else "N training samples"
    if known and known.policy == "online":
        return drawing.box(LEFT, y, INNER, samples, significance, "Scored batch by batch, by a forward pass.")
    seen = f"{_count(known.seen)} of them remembered." if known and known.seen is not None else ""
    # Set aside by the guard against wrong labels: they are kept at the rate, like samples never seen.
    aside = f"{known.suspects:,} set aside as suspects." if known and known.suspects else ""
    remembered = " ".join(filter(None, ("Remembered from when each was last trained.", seen, aside)))
    return drawing.box(LEFT, y, INNER, samples, significance, remembered)


def _chart(drawing: Drawing, y: float, known: GateNumbers | None) -> float:
    """The histogram with the threshold in it, or a sketch that says it is one. Returns the y below."""
    histogram = known.histogram if known else None
    if known and histogram is None:
        return drawing.box(LEFT, y, INNER, "Histogram: not drawn", f"{known.missing}.", fill=SHEET)
    counts, first, group, split = _bars(histogram)
    top, base = y + 26, y + 26 + CHART_PX
    step = INNER / len(counts)
    highest = float(counts.max())
    for number, count in enumerate(counts):
        if count > 0:
            height, x = max(1.5, CHART_PX * float(count) / highest), LEFT + number * step
            fill = ACCENT if number >= split else "url(#hatched)"
            style: dict[str, object] = {"fill": fill, "stroke": INK, "stroke_width": 0.8}
            if histogram is None:
                style["stroke_dasharray"] = "3 2"
            drawing.rectangle(x + 0.4, base - height, step - 0.8, height, **style)
    drawing.path([(LEFT, base), (LEFT + INNER, base)], stroke=INK, stroke_width=1.5)
    where = _threshold_x(histogram, first, group, step, split)
    drawing.path([(where, top - 6), (where, base + 8)], stroke=INK, stroke_width=2.5, stroke_dasharray="7 4")
    label = f"threshold {_share(histogram.threshold)} nats" if histogram else "threshold θ"
    is_left = where > LEFT + INNER / 2
    drawing.text(where + (-6 if is_left else 6), y + 16, label, TEXT_PX, "end" if is_left else "start", is_bold=True)
    kind = "weighted samples" if known and known.policy == "online" else "samples"
    _axis(drawing, base, histogram, kind, first, group, step)
    return base + AXIS_PX + 6


def _bars(histogram: Histogram | None) -> tuple[np.ndarray, int, int, int]:
    """Heights of the bars, the first bar's first bin, bins to a bar, and the first bar at or above the threshold."""
    if histogram is None:
        sketch = np.exp(-(((np.arange(40) - 15.0) / 9.0) ** 2))
        return np.where(sketch > 0.01, sketch, 0.0), 0, 1, 26
    filled = np.flatnonzero(histogram.counts)
    low, high = min(int(filled[0]), histogram.threshold_bin), max(int(filled[-1]), histogram.threshold_bin)
    group = max(1, -(-(high - low + 1) // (MOST_BARS - 2)))
    # A bar begins at the threshold's own bin, so that no bar lies on both sides of it.
    before = -(-(histogram.threshold_bin - low) // group)
    first = histogram.threshold_bin - before * group
    num_bars = before + (high - histogram.threshold_bin) // group + 1
    padded = np.zeros(num_bars * group)
    begin, end = max(first, 0), min(first + num_bars * group, NUM_BINS)
    padded[begin - first : end - first] = histogram.counts[begin:end]
    return padded.reshape(num_bars, group).sum(axis=1), first, group, before


def _threshold_x(histogram: Histogram | None, first: int, group: int, step: float, split: int) -> float:
    if histogram is None or histogram.threshold <= 0:
        return LEFT + split * step
    position = (math.log2(histogram.threshold) - LOG2_MIN) * BINS_PER_OCTAVE
    return LEFT + min(max((position - first) / group * step, 0.0), INNER)


def _axis(
    drawing: Drawing, base: float, histogram: Histogram | None, kind: str, first: int, group: int, step: float
) -> None:
    if histogram is None:
        drawing.text(LEFT, base + 22, "A sketch, not data. Low significance left, high right.", SMALL_PX, fill=QUIET)
        return
    last = first + round(INNER / step) * group
    low, high = (math.log10(edge) for edge in (bin_edges(first, first)[0], bin_edges(last, last)[0]))
    every = max(1, math.ceil((high - low) / 7))
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        x = LEFT + INNER * (exponent - low) / (high - low)
        if exponent % every == 0 and LEFT + 12 < x < LEFT + INNER - 12:
            drawing.path([(x, base), (x, base + 6)], stroke=INK, stroke_width=1.5)
            drawing.text(x, base + 21, _power_of_ten(exponent), SMALL_PX, "middle", fill=QUIET)
    text = f"significance, nats; {histogram.total:,.0f} {kind}, of {histogram.checkpoint}"
    drawing.text(LEFT, base + AXIS_PX + 2, text, SMALL_PX, fill=QUIET)


def _sides(drawing: Drawing, y: float, known: GateNumbers | None) -> float:
    """What becomes of the samples on either side of the threshold."""
    width = (INNER - 16) / 2
    right = LEFT + width + 16
    p_min = known.settings.get("p_min") if known else None
    chance = "p" if p_min is None else f"{p_min:g}"
    titles = ["Below θ", "At or above θ"]
    kept = "k kept"
    if known:
        titles, kept = ["Below", "At or above"], ""
    if known and known.seen is not None and known.kept_above is not None:
        titles = [f"{known.seen - known.kept_above:,} below", f"{known.kept_above:,} above"]
        kept = f"{_count(known.kept_below)} kept"
    tops = y + 8
    swatches: tuple[tuple[float, str], ...] = ((LEFT, "url(#hatched)"), (right, ACCENT))
    for x, fill in swatches:
        drawing.rectangle(x, tops, width, 10, fill=fill, stroke=INK, stroke_width=1)
    ends = [
        drawing.box(LEFT, tops + 10, width, titles[0], f"each kept with the chance {chance}", kept),
        drawing.box(right, tops + 10, width, titles[1], "all kept"),
    ]
    bottom = max(ends)
    for x, end in zip((LEFT + width / 2, right + width / 2), ends, strict=True):
        drawing.arrow([(x, end), (x, bottom + 26)])
    return bottom + 26


def _plan(drawing: Drawing, y: float, known: GateNumbers | None) -> float:
    trained, skipped = (_count(known.trained), _count(known.skipped)) if known else ("n", "N − n")
    rate, target = (_share(known.rate), _share(known.rate_target)) if known else ("n / N", "r")
    return drawing.box(
        LEFT,
        y,
        INNER,
        f"{trained} trained, {skipped} skipped",
        "A skipped sample is not trained." if known and known.policy == "online" else
        "A skipped sample is not read, not decoded and not trained.",
        f"Activation rate {rate}, target {target}.",
        fill=SHEET,
    )  # fmt: skip


def _control(drawing: Drawing, y: float, known: GateNumbers | None) -> None:
    y = _arrow(drawing, y, "what the rate missed is made up for")
    target = _share(known.target_above) if known and known.target_above is not None else "(r − p) / (1 − p)"
    ki = known.settings.get("ki") if known else None
    error = known.error if known and known.target_above is not None else None
    above = "share above" if error is None or known is None else f"{(known.target_above or 0.0) + error:.4g}"
    integral = f"u = {_share(known.integral)}" if known and known.integral is not None else "u"
    drawing.box(
        LEFT,
        y,
        INNER,
        f"Integral {integral}",
        f"u grows by {'ki' if ki is None else f'{ki:g}'} · ({above} − {target}): the share at or above the threshold, "
        "less what was meant.",
        f"Next threshold: where {target} − u of the histogram lie at or above it. The same bits on every rank.",
        fill=PALE,
    )


def _arrow(drawing: Drawing, y: float, label: str) -> float:
    drawing.arrow([(LEFT + 24, y), (LEFT + 24, y + 28)])
    drawing.text(LEFT + 40, y + 19, label, SMALL_PX, fill=QUIET)
    return y + 28


def _power_of_ten(exponent: int) -> str:
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}".replace("-", "−")
