"""Several runs beside each other: one table, curves over each other, and how far they may be compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ast_dist.report_curves import time_unit
from ast_dist.report_page import bullets, paragraph, table
from ast_dist.report_plots import Curve, Panel, figure
from ast_dist.report_run import Run, as_number, flat, is_free
from ast_dist.report_sections import best_acc1, energy, known, percent, policy, samples_skipped, shown
from ast_dist.track.progress import duration

_HEADINGS = (
    *("run", "policy", "target rate", "epochs", "best top-1", "last top-1", "cost"),
    *("samples skipped", "FLOPs saved", "GPU energy", "time", "sessions", "restarts", "state"),
)
_COST = (
    "Top-1: on the validation split. Cost: forward, backward and scoring, measured, in epochs of training on "
    "everything. Skipped and saved: against training everything for as many epochs as the run itself did."
)


def comparison(runs: Sequence[Run]) -> str:
    """The part of the report that holds the runs against each other. runs: two or more."""
    rows = [
        (
            run.name,
            policy(run),
            shown(run.setting("gate.target_rate")) if policy(run) not in ("full", "infobatch") else "-",
            f"{known(run.progress, 'epoch')} of {known(run.progress, 'epochs')}",
            percent(best_acc1(run)),
            percent(run.last("val/acc1")),
            "-" if (cost := _cost(run)) is None else f"{cost:.2f}",
            samples_skipped(run),
            percent(run.last("cost/flops_saved"), 100),
            energy(run.last("cost/gpu_joules")),
            duration(as_number(run.progress.get("total_s"))),
            known(run.progress, "sessions"),
            known(run.progress, "restarts"),
            known(run.progress, "state"),
        )
        for run in runs
    ]
    plots = "".join(figure(panel) for panel in _panels(runs))
    return (
        bullets(remarks(runs), "alarm")
        + table("The runs", _HEADINGS, rows, range(2, len(_HEADINGS) - 1))
        + paragraph(_COST, "soft")
        + f'<div class="plots">\n{plots}</div>\n'
        + _settings(runs)
    )


def remarks(runs: Sequence[Run]) -> list[str]:
    """Why the runs' numbers may not be held against each other, in sentences."""
    found = []
    for what, name in (("training data", "manifest.train"), ("validation data", "manifest.val")):
        if len(groups := _groups(runs, name)) > 1:
            same = "; ".join(", ".join(names) for names in groups.values())
            found.append(f"These runs have different {what}: their accuracies do not compare. Alike are: {same}.")
    for what, name in (("seeds", "seed"), ("models", "model.name"), ("planned epochs", "loop.epochs")):
        if len(groups := _groups(runs, name)) > 1:
            told = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
            found.append(f"These runs have different {what} ({told}).")
    return found


def _groups(runs: Sequence[Run], name: str) -> dict[str, list[str]]:
    """Names of the runs by the value of a setting."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(shown(run.setting(name)), []).append(run.name)
    return found


def _cost(run: Run) -> float | None:
    """Epochs of full training that the run has cost so far; None where its rows do not tell."""
    _, costs = _costs(run, "cost/flops_saved")
    return float(costs[-1]) if costs.size else None


def _costs(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a key (N,) and what the run had cost at them, in epochs of full training (N,); rows with both."""
    passes, saved, values = run.rows.together("progress/epoch", "cost/flops_saved", key)
    return values, (1.0 - saved) * passes


def _panels(runs: Sequence[Run]) -> list[Panel]:
    unit, size = time_unit(max((run.last("time/total_s") or 0.0 for run in runs), default=0.0))
    over_epochs, over_cost, over_time, over_energy = [], [], [], []
    for i, run in enumerate(runs):
        over_epochs.append(Curve(run.name, *run.series("val/acc1", "epoch"), i, unit=" %"))
        acc1, cost = _costs(run, "val/acc1")
        over_cost.append(Curve(run.name, cost, acc1, i, unit=" %"))
        spent_s, acc1 = run.series("val/acc1", "epoch", x_key="time/total_s")
        over_time.append(Curve(run.name, spent_s / size, acc1, i, unit=" %"))
        joules, acc1 = _measured_energy(run)
        over_energy.append(Curve(run.name, joules / 1e3, acc1, i, unit=" %"))
    found = [
        Panel("Val top-1, %, over epochs", over_epochs),
        Panel("Val top-1, %, over measured cost", over_cost, x_name="epochs of full training"),
        Panel("Val top-1, %, over the time spent", over_time, x_name=f"time spent, {unit}"),
    ]
    if any(curve.is_measured for curve in over_energy):
        absent = [f"{curve.label}: not measured" for curve in over_energy if not curve.is_measured]
        found.append(Panel("Val top-1, %, over GPU energy", over_energy, x_name="kJ", notes=absent))
    return found


def _measured_energy(run: Run) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in run.epochs if as_number(row.get("cost/gpu_joules")) is not None and "val/acc1" in row]
    pairs = [(as_number(row["cost/gpu_joules"]), as_number(row["val/acc1"])) for row in rows]
    known_pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    return np.array([x for x, _ in known_pairs], np.float64), np.array([y for _, y in known_pairs], np.float64)


def _settings(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, but for where and how safely they train."""
    settings: list[dict[str, Any]] = [flat(run.config) for run in runs]
    names = [name for name in dict.fromkeys(key for one in settings for key in one) if not is_free(name)]
    differing = [name for name in names if len({shown(one.get(name)) for one in settings}) > 1]
    if not differing:
        return paragraph("All settings that a result depends on are the same.")
    rows = [(name, *(shown(one.get(name)) for one in settings)) for name in differing]
    return table("Settings in which the runs differ", ("setting", *(run.name for run in runs)), rows)
