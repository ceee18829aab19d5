"""The gate's threshold against other rules: `python -m benchmarks.threshold [TRACES…] [--data TRAIN]`.

Three parts, each a measure of benchmarks/results/threshold.json; benchmarks.threshold_measures defines the figures.

- replay: every rule on every trace, on one rank. TRACES are .npz files (`sig` steps × batch, `spe` steps an epoch,
  `drop` the step of a learning-rate drop). Fresh ones are recorded first by benchmarks.threshold_traces.
- closed_loop: the rule decides which samples train the model whose scores it sees.
- ranks: a batch dealt to 1 … 1,024 simulated ranks, also in runs of the batch sorted by label or by significance;
  one threshold for all of them, or a controller on each.

summary holds the worst of each figure over fresh traces and closed loops, summary_given over TRACES. Bins, memory and
gain of our rule were chosen on three CIFAR-10 traces at batch 128 (given as TRACES) and on the digits; nothing was
chosen on traces recorded from --data.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tyro.conf import Positional

from ast_dist.arguments import parse_arguments
from ast_dist.errors import UserError, run_command
from benchmarks import tables
from benchmarks.result import RESULTS, ResultFile
from benchmarks.threshold_measures import Log, measures, own_ranks, replay, shared_ranks, worst
from benchmarks.threshold_rules import KAGGLE_AGGRESSIVE, KAGGLE_ULTRA, RULES, Ours
from benchmarks.threshold_traces import PLAN, Images, Trace, load_images, load_trace, record_all, train

TARGETS = (0.1, 0.2, 0.4)
LOOP_TARGET = 0.2
RANKS = (1, 4, 64, 1024)
OWN_RANKS = (4, 64)
# Ranks are simulated one by one: as many steps as an answer needs.
RANK_STEPS = 30
OWN_RANK_STEPS = 200
LARGE_BATCH = 512


@dataclass(frozen=True)
class Arguments:
    """Compare threshold rules."""

    traces: Positional[tuple[Path, ...]] = ()
    """Recorded traces (.npz) to replay beside the fresh ones."""
    data: Path | None = None
    """Folder of training shards with images of one size; scikit-learn's digits unless given."""
    images: int = 8192
    """Images that the fresh traces' models are trained on."""
    epoch_share: float = 1.0
    """Shortens all trainings, for a quick look."""
    out: Path = RESULTS
    """Folder of the result file."""

    def __post_init__(self) -> None:
        if self.images < PLAN[0][0]:
            raise UserError(f"--images is {self.images}, but the smallest batch is {PLAN[0][0]}. Take more.")
        if not 0.0 < self.epoch_share <= 1.0:
            raise UserError(f"--epoch-share is {self.epoch_share:g}, not in (0, 1].")


def main(argv: list[str]) -> int:
    """Record, compare, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.threshold")
    given = [load_trace(path) for path in arguments.traces]
    images = load_images(arguments.data, arguments.images)
    words = [*(["TRACES"] if given else []), *(["--data TRAIN"] if arguments.data else [])]
    if arguments.images != Arguments.images:
        words.append(f"--images {arguments.images}")
    if arguments.epoch_share != Arguments.epoch_share:
        words.append(f"--epoch-share {arguments.epoch_share:g}")
    result = ResultFile(
        arguments.out / "threshold.json", "threshold", " ".join(["python -m benchmarks.threshold", *words])
    )
    fresh = []
    for trace in record_all(images, arguments.epoch_share):
        fresh.append(trace)
        _replay(result, [trace], "fresh")
    _replay(result, given, "given")
    for row in _closed_loops(images, arguments.epoch_share):
        _add(result, row)
    for row in _ranks(fresh):
        _add(result, row)
    for row in list(_summaries(result.rows)):
        _add(result, row)
    print()
    print(tables.render_all(result.content))
    return 0


def _replay(result: ResultFile, traces: list[Trace], source: str) -> None:
    for trace, (name, make), target in itertools.product(traces, RULES.items(), TARGETS):
        if name in (KAGGLE_AGGRESSIVE, KAGGLE_ULTRA) and target != LOOP_TARGET:
            continue  # the presets are meant for 0.3 and 0.2
        log = replay(make(target), trace)
        about = _about("replay", name, trace.name, target, 1, trace.batch)
        _add(result, {**about, "source": source, **measures(log, target, trace.steps_per_epoch)})


def _closed_loops(images: Images, epoch_share: float) -> Iterator[dict[str, Any]]:
    """Every rule at the smallest batch size, ours at the others, too."""
    for (batch, epochs), (name, make) in itertools.product(PLAN, RULES.items()):
        is_taken = make is Ours or (batch == PLAN[0][0] and name != KAGGLE_AGGRESSIVE)
        if not is_taken or batch > len(images.labels):
            continue
        rule, log = make(LOOP_TARGET), Log()

        def select(scores: torch.Tensor, ids: torch.Tensor, rule: Any = rule, log: Log = log) -> torch.Tensor:
            selected = rule.select(scores.numpy(), ids.numpy())
            log.add(scores.numpy(), selected)
            return torch.from_numpy(selected.keep)

        # Another seed than the recorded traces have; half their length, since each rule needs a training.
        for _ in train(images, batch, max(1, round(0.5 * epochs * epoch_share)), select, seed=1):
            pass
        about = _about("closed_loop", name, f"{images.name}-{batch}-loop", LOOP_TARGET, 1, batch)
        yield {**about, "source": "closed loop", **measures(log, LOOP_TARGET, len(images.labels) // batch)}


def _ranks(traces: list[Trace]) -> Iterator[dict[str, Any]]:
    """On the smallest and the largest batch of the fresh traces without a gate."""
    plain = {trace.batch: trace for trace in traces if trace.name.endswith("-full")}
    for batch, spread in itertools.product(sorted({min(plain), max(plain)}), ("dealt", "by label", "by significance")):
        trace = plain[batch]
        for ranks in RANKS if spread == "dealt" else RANKS[1:]:
            found = shared_ranks(trace, LOOP_TARGET, ranks, spread, min(RANK_STEPS, len(trace.significance)))
            yield {**_about("ranks", "ours", trace.name, LOOP_TARGET, ranks, trace.batch), "spread": spread, **found}
        for ranks, name in itertools.product(OWN_RANKS, ("ours", "original")):
            found = own_ranks(
                RULES[name], trace, LOOP_TARGET, ranks, spread, min(OWN_RANK_STEPS, len(trace.significance))
            )
            about = _about("ranks", f"{name}, one a rank", trace.name, LOOP_TARGET, ranks, trace.batch)
            yield {**about, "spread": spread, **found}


def _summaries(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The worst over held-out runs, and over given traces, of each rule and size of batch."""
    for measure, sources in (("summary", ("fresh", "closed loop")), ("summary_given", ("given",))):
        for is_large, name in itertools.product((False, True), RULES):
            taken = [
                row
                for row in rows
                if row.get("source") in sources and row["rule"] == name and (row["batch"] >= LARGE_BATCH) == is_large
            ]
            if taken:
                batches = sorted({row["batch"] for row in taken})
                shown = ", ".join(f"{batch:,}" for batch in batches)
                yield {"measure": measure, "rule": name, "batches": shown, **worst(taken)}


def _about(measure: str, rule: str, trace: str, target: float, ranks: int, batch: int) -> dict[str, Any]:
    return {"measure": measure, "rule": rule, "trace": trace, "target": target, "ranks": ranks, "batch": batch}


def _add(result: ResultFile, row: dict[str, Any]) -> None:
    result.add({key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()})
    print("  ".join(f"{key}={value}" for key, value in result.rows[-1].items()), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
