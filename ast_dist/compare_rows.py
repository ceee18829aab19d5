"""The rows of a comparison, from what its runs wrote, and the tables that show them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ast_dist.errors import UserError
from ast_dist.track.history import read
from ast_dist.track.progress import duration

DEFINITION = (
    "top-1: of the last epoch, on the validation split. ±: sample standard deviation over seeds. lead: mean top-1 less "
    "the best other mean at the same rate; clear: by more than the larger of the two standard deviations."
)
_OFF_BUDGET = 0.02


@dataclass(frozen=True)
class Outcome:
    """What one finished run measured.

    cost: epochs of full training, forward and backward and scoring, by the run's ledger. acc1: percent, of the last
    epoch. gpu_joules: None where they were not measured.
    """

    epochs: int
    cost: float
    acc1: float
    samples_skipped: int
    wall_s: float
    gpu_joules: float | None


def outcome(run_dir: Path) -> Outcome:
    """Read a finished run. Raises UserError when its last epoch lacks what every finished run writes."""
    path = run_dir / "metrics.jsonl"
    epochs = [row for row in read(path) if row.get("kind") == "epoch"]
    try:
        last = epochs[-1]
        return Outcome(
            epochs=int(last["epoch"]),
            cost=(1.0 - float(last["cost/flops_saved"])) * int(last["epoch"]),
            acc1=float(last["val/acc1"]),
            samples_skipped=int(last["cost/samples_skipped"]),
            wall_s=float(last["time/total_s"]),
            gpu_joules=last.get("cost/gpu_joules"),
        )
    except (IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: the run is finished, but its last epoch cannot be read ({error!r}). Remove {run_dir} and run the "
            "same command again."
        ) from None


def aggregate(
    policy: str, rate: float, target_rate: float, outcomes: Sequence[Outcome], full_epochs: int, num_samples: int
) -> dict[str, Any]:
    """The row of one policy at one rate, over its seeds.

    full_epochs, num_samples: of full training, which is what samples_skipped (a count) and flops_saved (a share) are
    measured against; a run's own metrics measure them against as many epochs as the run has. acc1_sd is the sample
    standard deviation (n - 1), None for one seed. All else is a mean.
    """
    accuracies = [run.acc1 for run in outcomes]
    joules = [run.gpu_joules for run in outcomes if run.gpu_joules is not None]
    cost = statistics.mean(run.cost for run in outcomes)
    skipped = [num_samples * (full_epochs - run.epochs) + run.samples_skipped for run in outcomes]
    return {
        "measure": "policy",
        "policy": policy,
        "rate": rate,
        "target_rate": target_rate,
        "epochs": outcomes[0].epochs,
        "cost": cost,
        "acc1_mean": statistics.mean(accuracies),
        "acc1_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "acc1": accuracies,
        "seeds": len(outcomes),
        "wall_s": statistics.mean(run.wall_s for run in outcomes),
        "samples_skipped": round(statistics.mean(skipped)),
        "flops_saved": 1.0 - cost / full_epochs,
        "gpu_joules": statistics.mean(joules) if len(joules) == len(outcomes) else None,
    }


def add_leads(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each row how it stands against the others at its rate.

    acc1_lead: its mean top-1 less the best mean of the others, in points; above 0 for the best alone. lead_is_clear:
    whether the size of the lead exceeds the larger of the two sample standard deviations; None where one is unknown.
    Both are None for a row that has no others.
    """
    rows = list(rows)
    found = []
    for row in rows:
        others = [other for other in rows if other["rate"] == row["rate"] and other is not row]
        best = max(others, key=lambda other: other["acc1_mean"], default=None)
        lead = None if best is None else row["acc1_mean"] - best["acc1_mean"]
        is_clear = None
        if best is not None and lead is not None and None not in (row["acc1_sd"], best["acc1_sd"]):
            is_clear = abs(lead) > max(row["acc1_sd"], best["acc1_sd"])
        found.append({**row, "acc1_lead": lead, "lead_is_clear": is_clear})
    return found


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each rate: who is best, by how much, and whether that is more than the seeds' spread."""
    found = []
    for rate in sorted({row["rate"] for row in rows if row["acc1_lead"] is not None}, reverse=True):
        first, second, *_ = sorted(
            (row for row in rows if row["rate"] == rate), key=lambda row: row["acc1_mean"], reverse=True
        )
        lead = f"rate {rate:g}: {first['policy']} is best, {first['acc1_lead']:.2f} points above {second['policy']}"
        seeds = min(first["seeds"], second["seeds"])
        if first["lead_is_clear"] is None:
            found.append(f"{lead}; one seed shows no spread, so this shows no difference.")
        else:
            spread = max(first["acc1_sd"], second["acc1_sd"])
            than = "more than" if first["lead_is_clear"] else "not more than"
            found.append(f"{lead}; {than} the larger standard deviation ({spread:.2f}, {seeds} seeds).")
    return found


def remarks(rows: Sequence[Mapping[str, Any]], full_epochs: int) -> list[str]:
    """Costs that are not the budget's, and wall-clock times that are not comparable."""
    found = []
    off = [
        f"{row['policy']} at {row['rate']:g} ({row['cost']:.2f} for {row['rate'] * full_epochs:.2f})"
        for row in rows
        if abs(row["cost"] / (row["rate"] * full_epochs) - 1.0) > _OFF_BUDGET
    ]
    if off:
        found.append(f"Measured cost more than {_OFF_BUDGET:.0%} off the budget: {', '.join(off)}.")
    jobs = max((row["jobs"] for row in rows), default=1)
    if jobs > 1:
        found.append(f"{jobs} runs went side by side and slowed each other: wall-clock times tell little.")
    return found


def sort_key(row: Mapping[str, Any]) -> tuple[float, float]:
    """Largest rate first, best first within a rate."""
    return (-row["rate"], -row["acc1_mean"])


_HEADINGS = ("rate", "policy", "epochs", "target", "cost", "top-1, %", "lead", "clear", "time")
_PRINTED = tuple(heading for heading in _HEADINGS if heading != "target")  # the eighth column that 80 characters lack
_TEXTS = ("policy", "clear")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if row["acc1_sd"] is None else f" ± {row['acc1_sd']:.2f}"
    is_clear = row["lead_is_clear"]
    return (
        f"{row['rate']:g}",
        row["policy"],
        str(row["epochs"]),
        f"{row['target_rate']:.3g}",
        f"{row['cost']:.2f}",
        f"{row['acc1_mean']:.2f}{spread}",
        "–" if row["acc1_lead"] is None else f"{row['acc1_lead']:+.2f}",
        "–" if is_clear is None else "yes" if is_clear else "no",
        duration(row["wall_s"]),
    )


def print_table(rows: Sequence[Mapping[str, Any]], full_epochs: int) -> None:
    """Print the rows, what they say, and what the words mean; 80 columns are enough."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in _PRINTED:
        table.add_column(heading, justify="left" if heading in _TEXTS else "right", overflow="fold")
    previous = None
    for row in sorted(rows, key=sort_key):
        if previous not in (None, row["rate"]):
            table.add_section()
        previous = row["rate"]
        cells = dict(zip(_HEADINGS, _cells(row), strict=True))
        table.add_row(*(cells[heading] for heading in _PRINTED), style="bold" if (row["acc1_lead"] or 0) > 0 else None)
    console = Console(highlight=False)
    console.print(table)
    for line in (*verdicts(rows), *remarks(rows, full_epochs), DEFINITION):
        console.print(line, markup=False)


def markdown(content: Mapping[str, Any], full_epochs: int) -> str:
    """The same as Markdown, with where the figures are from. content: a result file's."""
    rows = content["rows"]
    # While a comparison is under way, rows may have different numbers of seeds.
    lines = [(*_HEADINGS, "seeds"), *((*_cells(row), str(row["seeds"])) for row in sorted(rows, key=sort_key))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]
    rule = (
        "|"
        + "|".join(
            f" {'-' * width} " if heading in _TEXTS else f" {'-' * (width - 1)}: "
            for heading, width in zip(lines[0], widths, strict=True)
        )
        + "|"
    )
    about, versions = content["machine"], content["versions"]
    device = about["gpu"] or f"{about['cpu']}, {about['cores']} cores"
    commit = f", commit {content['commit']}" if content["commit"] else ""
    source = f"{device}, torch {versions['torch']}, {content['date'][:10]}{commit}: `{content['command']}`"
    said = "\n".join(f"- {line}" for line in (*verdicts(rows), *remarks(rows, full_epochs)))
    return "\n".join([body[0], rule, *body[1:], "", *([said, ""] if said else []), DEFINITION, "", source, ""])
