"""Which quantities of a run the report plots, and how each looks."""

from collections.abc import Sequence

import numpy as np

from ast_dist.report_plots import Curve, Mark, Panel
from ast_dist.report_run import Run, as_number


def panels(run: Run) -> list[Panel]:
    """All plots of one run, in the order of the page."""
    marks = marks_of(run)
    return [
        _accuracy(run, marks),
        _loss(run, marks),
        Panel("Learning rate", [Curve("learning rate", *run.series("train/lr", "step"))], low=0.0, marks=marks),
        _savings(run, marks),
        _rate(run, marks),
        _threshold(run, marks),
        _integral(run, marks),
        _epoch_time(run, marks),
        Panel("Images per second", [Curve("images/s", *run.most_often("perf/images_per_s"))], low=0.0, marks=marks),
        _shares("Waiting for data, % of the time", run, (("perf/data_wait", "data wait"),), marks),
        _wall_time(run),
        *_where_measured(run, marks),
    ]


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit in which a stretch of time is plotted, and its seconds."""
    return next(((unit, size) for unit, size in (("h", 3600.0), ("min", 60.0)) if longest_s >= 5 * size), ("s", 1.0))


def _accuracy(run: Run, marks: Sequence[Mark]) -> Panel:
    curves = [
        Curve("val top-1", *run.series("val/acc1", "epoch"), 0, unit=" %"),
        Curve("val top-1 of the averaged weights (EMA)", *run.series("val/ema_acc1", "epoch"), 3, unit=" %"),
        Curve("train top-1, selected samples", *run.series("train/acc1_selected", "step"), 1, unit=" %"),
        Curve("train top-1, all samples (estimate)", *run.series("train/acc1_all", "epoch"), 2, unit=" %"),
    ]
    absent = [f"{curve.label}: not measured" for curve in curves if not curve.is_measured and curve.style != 3]
    return Panel("Accuracy, %", curves, marks=marks, notes=absent)


def _loss(run: Run, marks: Sequence[Mark]) -> Panel:
    curves = [
        Curve("validation", *run.series("val/loss", "epoch"), 0, unit=" nats"),
        Curve("validation, averaged weights (EMA)", *run.series("val/ema_loss", "epoch"), 3, unit=" nats"),
        Curve("training, selected samples", *run.series("train/loss", "step"), 1, unit=" nats"),
    ]
    return Panel("Loss, nats", curves, low=0.0, may_be_log=True, marks=marks)


def _savings(run: Run, marks: Sequence[Mark]) -> Panel:
    """Three figures that are never added up: counted, computed and measured."""
    x, skipped = run.skipped_share()
    curves = [
        Curve("samples skipped", x, 100 * skipped, 0, unit=" %"),
        Curve("FLOPs saved", *_percent(run, "cost/flops_saved"), 3, unit=" %"),
        Curve("joules saved", *_percent(run, "cost/joules_saved"), 2, unit=" %"),
    ]
    notes = [f"{curve.label}: not measured" for curve in curves if not curve.is_measured]
    least = min((float(np.nanmin(curve.y)) for curve in curves if curve.is_measured), default=0.0)
    return Panel(
        "Saved so far, % of training on everything", curves, low=min(-2.0, least), high=100.0, marks=marks, notes=notes
    )


def _rate(run: Run, marks: Sequence[Mark]) -> Panel:
    curves = [
        Curve("activation rate", *run.series("gate/rate"), 0, is_stepped=True),
        Curve("target", *run.series("gate/rate_target"), 5, is_stepped=True),
    ]
    return Panel("Activation rate and its target", curves, low=0.0, high=1.05, marks=marks)


def _threshold(run: Run, marks: Sequence[Mark]) -> Panel:
    # Full epochs have no threshold: their rows lack the key, and the curve has a gap there.
    curve = Curve("threshold", *run.gapped("gate/threshold"), 0, unit=" nats")
    empty = "none: no epoch was gated by a threshold"
    return Panel("Threshold of significance, nats", [curve], may_be_log=True, marks=marks, empty=empty)


def _integral(run: Run, marks: Sequence[Mark]) -> Panel:
    curve = Curve("integral", *run.gapped("gate/integral"), 3)
    # A correction of a few hundredths of a percent is no event: on a scale of its own it would look like one.
    bound = max(0.05, 1.2 * float(np.nanmax(np.abs(curve.y)))) if curve.is_measured else 0.05
    empty = "none: no epoch was gated by a threshold with an integral"
    return Panel("Integral that corrects the rate", [curve], low=-bound, high=bound, marks=marks, empty=empty)


def _epoch_time(run: Run, marks: Sequence[Mark]) -> Panel:
    x, whole = run.series("perf/epoch_s", "epoch")
    unit, size = time_unit(float(np.nanmax(whole)) if np.isfinite(whole).any() else 0.0)
    x_trained, trained = run.series("perf/train_s", "epoch")
    curves = [
        Curve("with evaluation", x, whole / size, 0, unit=f" {unit}"),
        Curve("training", x_trained, trained / size, 1, unit=f" {unit}"),
    ]
    return Panel(f"Time per epoch, {unit}", curves, low=0.0, marks=marks)


def _wall_time(run: Run) -> Panel:
    """Epochs done over the time spent, work that a kill undid included."""
    total_s, done = run.series("progress/epoch", x_key="time/total_s")
    unit, size = time_unit(float(total_s.max()) if total_s.size else 0.0)
    marks = marks_of(run, "time/total_s", 1 / size)
    return Panel(
        "Progress over the time spent",
        [Curve("epochs done", total_s / size, done)],
        f"time spent, {unit}",
        low=0.0,
        marks=marks,
    )


def _where_measured(run: Run, marks: Sequence[Mark]) -> list[Panel]:
    """What not every run measures, and nobody misses where it is not there."""
    found = [
        _shares("Model FLOPs utilisation, % of the device's peak", run, (("perf/mfu", "MFU"),), marks),
        Panel("Peak memory, GB", [Curve("memory", *run.most_often("perf/mem_gb"))], low=0.0, marks=marks),
        Panel(
            "GPU energy per epoch, J",
            [
                Curve("training", *run.series("cost/epoch_gpu_joules", "epoch"), 1, unit=" J"),
                Curve("evaluation", *run.series("cost/eval_gpu_joules", "epoch"), 0, unit=" J"),
            ],
            low=0.0,
            marks=marks,
        ),
        Panel(
            "Training held up by a save, ms",
            [Curve("stall", *run.series("perf/ckpt_stall_ms"), 0, unit=" ms")],
            low=0.0,
            marks=marks,
        ),
    ]
    return [panel for panel in found if any(curve.is_measured for curve in panel.curves)]


def _shares(title: str, run: Run, keys: Sequence[tuple[str, str]], marks: Sequence[Mark]) -> Panel:
    curves = [Curve(label, *_percent(run, key), i, unit=" %") for i, (key, label) in enumerate(keys)]
    return Panel(title, curves, low=0.0, marks=marks)


def _percent(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    x, share = run.most_often(key)
    return x, 100 * share


def marks_of(run: Run, x_key: str = "progress/epoch", scale: float = 1.0) -> list[Mark]:
    """Where the run went on from a checkpoint."""
    steps, places = run.rows.together("global_step", x_key)
    if not steps.size:
        return []
    in_order = np.lexsort((places, steps))
    steps, places = (np.append(0.0, column[in_order]) for column in (steps, places))
    marks = []
    for start in run.starts[1:]:
        step = as_number(start.get("resumed_from_step")) or 0.0
        is_restart = bool(as_number(start.get("restart")))
        what = f"session {start.get('session')}" + (f", restart {start.get('restart')}" if is_restart else "")
        where = float(np.interp(step, steps, places)) * scale
        marks.append(Mark(where, f"{what}, from {start.get('checkpoint') or 'the beginning'}", is_restart))
    return marks
