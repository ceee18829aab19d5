"""dashboard.png: the whole run on one picture, drawn from its files.

    python -m ast_dist.track.dashboard RUN

Readable on a phone and in black and white: large type, the Okabe-Ito palette (Okabe and Ito, "Color Universal
Design", 2008), and no two curves of a panel that differ by colour alone. What was not measured is said to be so.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ast_dist.errors import UserError, run_command
from ast_dist.track.history import read
from ast_dist.track.progress import as_it_is_now, checkpoint_age_s, duration, read_progress, replace_atomically

DASHBOARD_NAME = "dashboard.png"
MAX_POINTS = 400  # more are averaged in blocks: a picture of 500 pixels shows no more

BLACK, BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY = "#5F6670"
STATE_COLORS = {"running": BLUE, "finished": GREEN, "paused": ORANGE, "failed": VERMILLION, "stopped": VERMILLION}
Row = Mapping[str, Any]


def render(run_dir: Path | str) -> Path:
    """Draw the run and put the picture in the place of RUN/dashboard.png, 1600 by 1000 pixels. Returns its path.

    Raises UserError when RUN is not a folder, OSError when the picture cannot be written.
    """
    picture = io.BytesIO()
    draw(run_dir).savefig(picture, format="png")
    path = Path(run_dir) / DASHBOARD_NAME
    replace_atomically(path, picture.getvalue())
    return path


def draw(run_dir: Path | str) -> Figure:
    """Draw what the run has written so far: a head with the facts, and six panels.

    Any of metrics.jsonl, sessions.jsonl and progress.json may be missing or empty; damaged rows are left out, and
    the head says so. Raises UserError when RUN is not a folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder. Name the folder that --run-dir named.")
    with warnings.catch_warnings(record=True) as damage:
        warnings.simplefilter("always", RuntimeWarning)
        rows, sessions = read(run_dir / "metrics.jsonl"), read(run_dir / "sessions.jsonl")
    try:
        progress = as_it_is_now(run_dir, read_progress(run_dir))
    except UserError as error:
        progress = {"state": "not begun", "message": str(error)}
    figure = Figure(figsize=(16, 10), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    draw_head(figure, run_dir, progress, sessions, [str(warning.message) for warning in damage])
    starts = [row for row in sessions if "event" not in row]
    panels = (draw_accuracy, draw_savings, draw_rate, draw_threshold, draw_loss, draw_time)
    grid = figure.add_gridspec(2, 3, left=0.05, right=0.955, bottom=0.066, top=0.665, wspace=0.3, hspace=0.5)
    for number, draw_panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // 3, number % 3])
        _prepare(axes)
        draw_panel(axes, rows, progress)
        _mark_starts(axes, rows, starts)
        _finish(axes, rows)
    return figure


# Panels ------------------------------------------------------------------------------------------------------------


def draw_accuracy(axes: Axes, rows: Sequence[Row], progress: Row) -> None:
    """Validation top-1 and, as what it is, the accuracy on the samples that were selected for training."""
    _title(axes, "Accuracy, %")
    _plot(axes, rows, "train/acc1_selected", "train top-1 (selected samples)", ORANGE, "--", kind="step")
    _plot(axes, rows, "val/acc1", "val top-1", BLUE, "-", marker="o", kind="epoch")
    axes.set_ylim(top=min(axes.get_ylim()[1], 101.5))


def draw_savings(axes: Axes, rows: Sequence[Row], progress: Row) -> None:
    """Samples skipped and FLOPs saved, each against training every sample; joules only where measured."""
    _title(axes, "Saved so far, %")
    total = progress.get("num_samples")
    passes, skipped = _series(rows, "cost/samples_skipped")
    if total and passes.size:
        begun = passes > 0
        _plot_points(axes, passes[begun], 100 * skipped[begun] / (total * passes[begun]), "samples skipped", BLUE, "-")
    passes, flops = _series(rows, "cost/flops_saved")
    _plot_points(axes, passes, 100 * flops, "FLOPs saved", VERMILLION, "--")
    _, joules = _series(rows, "cost/gpu_joules")
    measured = f"GPU energy used: {joules[-1] / 1e6:.3g} MJ" if joules.size else "GPU joules: not measured"
    axes.text(0.98, 0.95, measured, transform=axes.transAxes, ha="right", va="top", fontsize=13, color=GREY)
    axes.texts[-1].set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})
    axes.set_ylim(-2, 100)


def draw_rate(axes: Axes, rows: Sequence[Row], progress: Row) -> None:
    """The share of samples trained on, against its target."""
    _title(axes, "Activation rate")
    _plot(axes, rows, "gate/rate", "rate", BLUE, "-", drawstyle="steps-pre")
    _plot(axes, rows, "gate/rate_target", "target", BLACK, ":", width=2.6, drawstyle="steps-pre")
    axes.set_ylim(0, 1.08)


def draw_threshold(axes: Axes, rows: Sequence[Row], progress: Row) -> None:
    """The threshold of significance, nats, and the integral that corrects it, on the right."""
    _title(axes, "Threshold, nats")
    passes, threshold = _series(rows, "gate/threshold", gaps=True)
    known = threshold[np.isfinite(threshold)]
    if not known.size:
        if rows:
            none = "every sample is trained on" if progress.get("policy") == "full" else "no gated epoch so far"
            _say(axes, f"none: {none}")
        return
    _plot_points(axes, passes, threshold, "threshold", BLUE, "-")
    _use_log_scale_if_wide(axes)
    if _series(rows, "gate/integral")[0].size:
        passes, integral = _series(rows, "gate/integral", gaps=True)
        right = _right_axis(axes)
        _plot_points(right, passes, integral, "integral (right)", VERMILLION, "--")
        # A correction of a few hundredths of a percent is no event: on a scale of its own it would look like one.
        bound = max(0.05, 1.2 * float(np.nanmax(np.abs(integral), initial=0.0)))
        right.set_ylim(-bound, bound)


def draw_loss(axes: Axes, rows: Sequence[Row], progress: Row) -> None:
    """Training and validation loss, nats, and the learning rate on the right."""
    _title(axes, "Loss, nats")
    _plot(axes, rows, "train/loss", "train", ORANGE, "--", kind="step")
    _plot(axes, rows, "val/loss", "validation", BLUE, "-", marker="o", kind="epoch")
    if _series(rows, "train/lr")[0].size:
        right = _right_axis(axes)
        _plot(right, rows, "train/lr", "LR (right)", GREY, ":", kind="step", width=2.2)
        right.set_ylim(bottom=0)
    if not _use_log_scale_if_wide(axes):
        axes.set_ylim(bottom=0)


def draw_time(axes: Axes, rows: Sequence[Row], progress: Row) -> None:
    """Time per epoch as bars, images per second on the right."""
    passes, seconds = _series(rows, "perf/epoch_s", "epoch")
    longest = float(seconds.max()) if seconds.size else 0.0
    scale, unit = next(((scale, unit) for scale, unit in ((3600, "h"), (60, "min")) if longest >= 5 * scale), (1, "s"))
    _title(axes, f"Time per epoch, {unit}")
    if passes.size:
        edge = 0.6 if passes.size <= 40 else 0.0
        axes.bar(passes - 0.5, seconds / scale, width=0.8, color="#9CC4E4", edgecolor=BLUE, linewidth=edge)
        axes.containers[0].set_label(f"{unit} per epoch")
        axes.set_ylim(0, longest / scale * 1.1)
    elif rows:
        axes.set_yticks([])
    passes, speed = _series(rows, "perf/images_per_s")
    if passes.size:
        right = _right_axis(axes)
        _plot_points(right, passes, speed, "images/s (right)", VERMILLION, "-")
        right.set_ylim(0, float(speed.max()) * 1.1)


# Head --------------------------------------------------------------------------------------------------------------


def draw_head(figure: Figure, run_dir: Path, progress: Row, sessions: Sequence[Row], wrong: Sequence[str]) -> None:
    """The head of the picture: state, how far, how good, how long, and what was survived."""
    now = datetime.now(UTC)
    state = str(progress.get("state"))
    name = run_dir.resolve().name
    figure.text(0.03, 0.948, name if len(name) <= 40 else name[:39] + "…", fontsize=25, fontweight="bold", va="center")
    policy = f"policy {progress.get('policy') or '-'}"
    figure.text(0.97, 0.962, policy, fontsize=15, ha="right", va="center", color=GREY)
    drawn = f"drawn {now:%Y-%m-%d %H:%M:%S} UTC"
    figure.text(0.97, 0.933, drawn, fontsize=13, ha="right", va="center", color=GREY)
    color = STATE_COLORS.get(state, GREY)
    figure.text(0.5, 0.948, state.upper(), fontsize=18, fontweight="bold", color="white", ha="center", va="center")
    figure.texts[-1].set_bbox({"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": color})
    for number, (label, value) in enumerate(status_fields(progress, sessions, now)):
        left, top = 0.03 + 0.158 * (number % 6), 0.885 - 0.075 * (number // 6)
        figure.text(left, top, label, fontsize=13, color=GREY, va="center")
        figure.text(left, top - 0.029, value, fontsize=19, fontweight="bold", va="center")
    notes = [*wrong, str(progress.get("message") or "")]
    note = next((text for text in notes if text), "")
    if note:
        figure.text(0.03, 0.75, note if len(note) <= 140 else note[:139] + "…", fontsize=13, va="center")
        figure.texts[-1].set_color(VERMILLION if wrong or state in ("failed", "stopped") else GREY)
    _draw_bar(figure, progress, color)


def status_fields(progress: Row, sessions: Sequence[Row], now: datetime) -> list[tuple[str, str]]:
    """The twelve facts of the head, as (label, value); "-" is unknown or not there yet."""

    def known(key: str, form: str = "{}") -> str:
        value = progress.get(key)
        return "-" if value is None else form.format(value)

    starts = [row for row in sessions if "event" not in row]
    has_marks = len(starts) > 1
    # A session that a person begins may come days after the one before: that is no recovery.
    recoveries = [row["recovery_s"] for row in sessions if row.get("restart") and "recovery_s" in row]
    age_s = checkpoint_age_s(progress, now)
    return [
        ("epochs done", f"{known('epoch')} of {known('epochs')}"),
        ("step", known("step", "{:,}")),
        ("best val top-1", known("best_acc1", "{:.2f} %")),
        ("last val top-1", known("last_acc1", "{:.2f} %")),
        ("time spent", duration(progress.get("total_s"))),
        ("time left", duration(progress.get("eta_s"))),
        ("session" + " (dashed lines)" * has_marks, known("sessions")),
        ("restarts" + (" (dotted lines)" if has_marks else " survived"), known("restarts")),
        ("steps repeated", f"{sum(row.get('steps_repeated') or 0 for row in starts):,}" if starts else "-"),
        ("longest recovery", f"{max(recoveries):.1f} s" if recoveries else "-"),
        ("last checkpoint", known("checkpoint")),
        ("checkpoint's age", duration(age_s)),
    ]


def _draw_bar(figure: Figure, progress: Row, color: str) -> None:
    done = min(1.0, (progress.get("epoch") or 0) / max(1, progress.get("epochs") or 1))
    for share, fill in ((1.0, "#E4E7EB"), (done, color)):
        bar = Rectangle((0.03, 0.908), 0.94 * share, 0.008, facecolor=fill, transform=figure.transFigure)
        figure.add_artist(bar)


# Curves ------------------------------------------------------------------------------------------------------------


def _series(rows: Sequence[Row], key: str, kind: str = "", gaps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Passes over the data and values of one key, (N,) float64 each. With gaps, rows without the key are NaN."""
    x, y = [], []
    for row in rows:
        if kind and row.get("kind") != kind:
            continue
        passes = row.get("progress/epoch", row.get("epoch"))
        value = row.get(key)
        if passes is not None and (value is not None or gaps):
            x.append(float(passes))
            y.append(float("nan") if value is None else float(value))
    return np.asarray(x), np.asarray(y)


def _plot(axes: Axes, rows: Sequence[Row], key: str, label: str, color: str, style: str, **options: Any) -> None:
    _plot_points(axes, *_series(rows, key, options.pop("kind", "")), label, color, style, **options)


def _plot_points(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    label: str,
    color: str,
    style: str,
    marker: str = "",
    width: float = 2.0,
    drawstyle: str = "default",
) -> None:
    if not x.size:
        return
    x, y = _thinned(x, y)
    line = axes.plot(x, y, style, color=color, label=label, linewidth=width, marker=marker, drawstyle=drawstyle)[0]
    line.set_markersize(6 if x.size <= 40 else 3.5)
    if not marker and np.isfinite(y).sum() < 3:
        # One point has no line to be seen by; curves that meet in it are squares around each other.
        line.set(marker="s", markersize={"-": 5, "--": 9}.get(style, 13), fillstyle="full" if style == "-" else "none")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


_plain_numbers = FuncFormatter(lambda value, _: f"{value:,.6g}")


def _right_axis(axes: Axes) -> Axes:
    right = axes.twinx()
    right.tick_params(labelsize=12, colors=GREY, length=3)
    right.yaxis.set_major_locator(MaxNLocator(4))
    right.yaxis.set_major_formatter(_plain_numbers)
    for side in ("top", "left"):
        right.spines[side].set_visible(False)
    right.spines["right"].set_color("#B8BEC6")
    return right


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=17, fontweight="bold", loc="left", pad=32)


def _use_log_scale_if_wide(axes: Axes) -> bool:
    """Show values that span more than a factor of 20 on a logarithmic axis, so that one high one hides no others."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.zeros(0)])
    values = drawn[np.isfinite(drawn)]
    is_wide = bool(values.size and values.min() > 0 and values.max() / values.min() > 20)
    if is_wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=7))
        axes.yaxis.set_major_formatter(_plain_numbers)
        axes.yaxis.set_minor_formatter(NullFormatter())
    return is_wide


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=15, color=GREY)
    axes.set_yticks([])


def _prepare(axes: Axes) -> None:
    axes.tick_params(labelsize=13, length=3)
    axes.grid(True, color="#E4E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _mark_starts(axes: Axes, rows: Sequence[Row], starts: Sequence[Row]) -> None:
    """Vertical lines where the run went on from a checkpoint: dotted after a restart, dashed in a new session."""
    at = sorted((row["global_step"], row["progress/epoch"]) for row in rows if "progress/epoch" in row)
    if not at:
        return
    steps, passes = (np.asarray(column, dtype=float) for column in zip(*at, strict=True))
    for row in starts[1:]:
        where = float(np.interp(row.get("resumed_from_step") or 0, [0.0, *steps], [0.0, *passes]))
        axes.axvline(where, color=PURPLE, linestyle=":" if row.get("restart") else "--", linewidth=1.6, zorder=1)


def _finish(axes: Axes, rows: Sequence[Row]) -> None:
    """The common x axis, and one legend above the panel for its left and right axis, where it covers nothing."""
    last = max((float(row.get("progress/epoch", row.get("epoch")) or 0.0) for row in rows), default=1.0)
    last = max(last, 1.0)
    axes.set_xlim(0, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=last >= 2))
    axes.set_xlabel("epochs", fontsize=13, labelpad=2)
    sides = sorted(axes.get_shared_x_axes().get_siblings(axes), key=lambda side: side is not axes)
    curves = [side.get_legend_handles_labels() for side in sides]
    lines, labels = [line for drawn, _ in curves for line in drawn], [label for _, names in curves for label in names]
    if labels:
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": 3}
        spacing: dict[str, Any] = {"columnspacing": 1.1, "handletextpad": 0.5, "handlelength": 1.9}
        axes.legend(lines, labels, fontsize=13, frameon=False, **above, **spacing)
    elif not rows:
        _say(axes, "no rows yet")


def main(argv: list[str]) -> None:
    """Draw one run's dashboard and print its path."""
    parser = argparse.ArgumentParser(prog="python -m ast_dist.track.dashboard", description="Draw RUN/dashboard.png.")
    parser.add_argument("run", help="the run's folder, as --run-dir named it")
    arguments = parser.parse_args(argv)
    os.nice(10)
    print(render(arguments.run))


if __name__ == "__main__":
    sys.exit(run_command(main))
