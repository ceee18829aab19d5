"""The dashboard's panels: each draws one subject on its axes from a run's record, and says what was not measured."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ast_dist.track.curves import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    TICK_PT,
    VERMILLION,
    Record,
    finish_epochs,
    mark_starts,
    note,
    passes_of,
    plot,
    plot_points,
    prepare,
    right_axis,
    say,
    unit_of_time,
    use_log_scale_if_wide,
    with_unit,
)

Panel = Callable[[Axes, Record], str]


def draw_accuracy(axes: Axes, record: Record) -> str:
    """Top-1 on the training samples, all of them and those selected, and in validation, of both sets of weights."""
    plot(axes, record, "train/acc1_all", "train, all (estimate)", GREEN, "-.", kind="epoch", marker="^")
    plot(axes, record, "train/acc1_selected", "train, selected", ORANGE, "--", kind="step")
    plot(axes, record, "val/acc1", "val", BLUE, "-", kind="epoch", marker="o")
    plot(axes, record, "val/ema_acc1", "val, EMA", BLACK, ":", kind="epoch", marker="s", is_hollow=True)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101.5))
    return "Top-1 accuracy, %"


def draw_savings(axes: Axes, record: Record) -> str:
    """Samples skipped, FLOPs saved and joules saved: three figures, each against training on every sample."""
    total = record.progress.get("num_samples")
    passes, skipped = record.series("cost/samples_skipped")
    if total and passes.size:
        begun = passes > 0
        shares = 100 * skipped[begun] / (total * passes[begun])
        # Wide and pale: where a gate skips whole samples, the FLOPs saved lie right on top of it.
        plot_points(axes, passes[begun], shares, "samples skipped", SKY, "-", width=7.0)
    passes, flops = record.series("cost/flops_saved")
    plot_points(axes, passes, 100 * flops, "FLOPs saved", VERMILLION, "--")
    passes, joules = record.series("cost/joules_saved")
    plot_points(axes, passes, 100 * joules, "joules saved", GREEN, "-.", marker="s", is_hollow=True)
    if record.rows:
        note(axes, measured_joules(record, is_share_known=bool(joules.size)))
        axes.set_ylim(min([-2.0, *(110 * share for share in (*flops, *joules))]), 100)
    return "Saved so far, %"


def measured_joules(record: Record, *, is_share_known: bool) -> str:
    """What NVML measured, in a few words: joules in all, idle watts; or that nothing was."""
    total, idle_w = record.last("cost/gpu_joules"), record.last("cost/gpu_idle_w")
    if total is None and not is_share_known:
        return "joules: not measured"
    parts = [] if total is None else [f"{with_unit(total, 'J')} used"]
    parts += [] if idle_w is None else [f"idle {with_unit(idle_w, 'W')}"]
    parts += [] if is_share_known else ["saved: not known yet"]
    return ", ".join(parts) or "total joules: not measured"


def draw_rate(axes: Axes, record: Record) -> str:
    """The share of samples trained on, against its target."""
    plot(axes, record, "gate/rate", "rate", BLUE, "-", drawstyle="steps-pre")
    plot(axes, record, "gate/rate_target", "target", BLACK, ":", width=3.4, drawstyle="steps-pre")
    axes.set_ylim(0, 1.08)
    return "Activation rate"


def draw_threshold(axes: Axes, record: Record) -> str:
    """The threshold of significance, nats, and the integral that corrects it, on the right."""
    passes, threshold = record.series("gate/threshold", gaps=True)
    if np.isfinite(threshold).any():
        plot_points(axes, passes, threshold, "threshold", BLUE, "-")
        use_log_scale_if_wide(axes)
        passes, integral = record.series("gate/integral", gaps=True)
        if np.isfinite(integral).any():
            right = right_axis(axes)
            plot_points(right, passes, integral, "integral (right)", VERMILLION, "--")
            # A correction of a few hundredths of a percent is no event: on a scale of its own it would look like one.
            bound = max(0.05, 1.2 * float(np.nanmax(np.abs(integral))))
            right.set_ylim(-bound, bound)
    elif record.rows:
        full = record.progress.get("policy") == "full"
        say(axes, "none: every sample\nis trained on" if full else "none so far:\nno gated epoch yet")
    return "Threshold, nats"


def draw_time(axes: Axes, record: Record) -> str:
    """Time per epoch as bars, images per second on the right."""
    passes, seconds = record.series("perf/epoch_s", "epoch")
    scale, unit = unit_of_time(float(seconds.max()) if seconds.size else 0.0)
    if passes.size:
        edge = 0.8 if passes.size <= 40 else 0.0
        axes.bar(passes - 0.5, seconds / scale, width=0.8, color="#9CC4E4", edgecolor=BLUE, linewidth=edge)
        axes.containers[0].set_label(f"{unit} per epoch")
        axes.set_ylim(0, float(seconds.max()) / scale * 1.1)
    elif record.rows:
        axes.set_yticks([])
    passes, speed = record.series("perf/images_per_s")
    if passes.size:
        right = right_axis(axes)
        plot_points(right, passes, speed, "images/s (right)", VERMILLION, "-")
        right.set_ylim(0, float(speed.max()) * 1.1 or 1.0)
    return f"Time per epoch, {unit}"


def draw_progress(axes: Axes, record: Record) -> str:
    """Passes over the data against the time spent in all sessions, where they began, and when it will be over."""
    progress = record.progress
    known = [(row["time/total_s"], passes_of(row)) for row in record.rows if "time/total_s" in row]
    points = np.asarray([(spent, passes) for spent, passes in known if passes is not None], dtype=float).reshape(-1, 2)
    spent_s = max([float(progress.get("total_s") or 0.0), *points[:, 0]])
    left_s = [progress.get(key) for key in ("eta_low_s", "eta_s", "eta_high_s")]
    end_s = [spent_s + float(left) for left in left_s if left]
    last_s = max([spent_s, *end_s]) or 1.0
    scale, unit = unit_of_time(last_s)
    epochs = progress.get("epochs")
    if points.size:
        plot_points(axes, points[:, 0] / scale, points[:, 1], "epochs done", BLUE, "-")
        if epochs and left_s[1]:
            _draw_projected_end(axes, record, (spent_s / scale, points[-1, 1]), scale)
    mark_starts(axes, record, "time/total_s", scale)
    axes.set_xlim(0, 1.04 * last_s / scale)
    axes.set_ylim(0, 1.08 * float(epochs or max([1.0, *points[:, 1]])))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"time spent in all sessions, {unit}", fontsize=TICK_PT, labelpad=2)
    return "Overall progress, epochs"


def _draw_projected_end(axes: Axes, record: Record, now: tuple[float, float], scale: float) -> None:
    """A dotted line to the expected end, and the interval around it as a bar with ends."""
    progress = record.progress
    end, epochs = now[0] + progress["eta_s"] / scale, float(progress["epochs"])
    low, high = (now[0] + (progress.get(key) or progress["eta_s"]) / scale for key in ("eta_low_s", "eta_high_s"))
    axes.plot([now[0], end], [now[1], epochs], ":", color=GREY, linewidth=3.0, label="_")
    ends = axes.plot([low, end, high], [epochs] * 3, "-", color=BLACK, linewidth=3.0, marker="|", label="expected end")[
        0
    ]
    ends.set(markersize=18, markeredgewidth=3.0, clip_on=False)


def draw_loss(axes: Axes, record: Record) -> str:
    """Training and validation loss, nats, and the learning rate on the right."""
    plot(axes, record, "train/loss", "train", ORANGE, "--", kind="step")
    plot(axes, record, "val/loss", "val", BLUE, "-", kind="epoch", marker="o")
    is_wide = use_log_scale_if_wide(axes)
    if record.series("train/lr")[0].size:
        right = right_axis(axes)
        plot(right, record, "train/lr", "learning rate (right)", GREY, ":", kind="step")
        right.set_ylim(bottom=0)
    if not is_wide:
        axes.set_ylim(bottom=0)
    return "Loss, nats"


def draw_panel(axes: Axes, record: Record, draw: Panel) -> str:
    """Draw one panel whole but for title and legend; returns its title."""
    prepare(axes)
    title = draw(axes, record)
    if draw is not draw_progress:
        mark_starts(axes, record)
        finish_epochs(axes, record)
    if not record.rows:
        say(axes, "no rows yet")
    return title
