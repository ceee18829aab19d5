"""What is measured of a rule: how well it meets its target, what it misses, and what many ranks make of it.

All errors of the activation rate are relative to the target. A step's rate is the share of its samples that were kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.gate.threshold import Threshold, histogram
from benchmarks.threshold_rules import Rule, Selected
from benchmarks.threshold_traces import Trace

WINDOW = 50
BAND = 0.05


@dataclass
class Log:
    """What a rule did, step by step: the scores it saw, and its answers."""

    scores: list[np.ndarray] = field(default_factory=list)
    selected: list[Selected] = field(default_factory=list)

    def add(self, scores: np.ndarray, selected: Selected) -> None:
        """Note one step."""
        self.scores.append(scores)
        self.selected.append(selected)

    @property
    def rates(self) -> np.ndarray:
        """Activation rate of each step."""
        return np.array([step.keep.mean() for step in self.selected])


def replay(rule: Rule, trace: Trace) -> Log:
    """Let a rule decide on a recorded trace, the whole batch on one rank."""
    log = Log()
    for step, scores in enumerate(trace.significance):
        log.add(scores, rule.select(scores, sample_ids(step, trace.batch)))
    return log


def sample_ids(step: int, batch: int) -> np.ndarray:
    """Ids for a recorded step's samples, which have none of their own."""
    return np.arange(step * batch, (step + 1) * batch, dtype=np.int64)


def measures(log: Log, target: float, steps_per_epoch: int) -> dict[str, Any]:
    """How a rule met its target.

    worst_epoch_error: the largest |mean rate of a whole epoch - target|. rms_step_error, rms_50_error: root mean
    square over steps, and over runs of 50 steps. mean_error: of all steps. settled_step: the first step from which on
    the mean of every 50 consecutive steps is within 5 % of the target, None when there is none. share_at_limit: steps
    at which a clamp or floor (or the integral's limit) decided. share_top_missed: share of each batch's top scores,
    as many as the target says, that were not kept; share_top_missed_50: the same of 50 steps' scores together.
    """
    relative = log.rates / target - 1.0
    return {
        "worst_epoch_error": float(np.abs(_block_means(relative, steps_per_epoch)).max()),
        "rms_step_error": _rms(relative),
        "rms_50_error": _rms(_block_means(relative, WINDOW)),
        "mean_error": float(relative.mean()),
        "settled_step": settled_step(relative),
        "share_at_limit": float(np.mean([step.at_limit for step in log.selected])),
        "share_top_missed": top_missed(log, target, 1),
        "share_top_missed_50": top_missed(log, target, WINDOW),
    }


def settled_step(relative: np.ndarray) -> int | None:
    """First step from which on every mean of WINDOW consecutive errors lies within ±BAND; None when there is none."""
    window = min(WINDOW, len(relative))
    sums = np.concatenate([[0.0], np.cumsum(relative)])
    is_outside = np.abs(sums[window:] - sums[:-window]) / window > BAND
    first = int(np.flatnonzero(is_outside)[-1]) + 1 if is_outside.any() else 0
    return first if first < len(is_outside) else None


def top_missed(log: Log, target: float, steps: int) -> float:
    """Mean over runs of `steps` steps: share of their top scores that were not kept."""
    missed = []
    for first in range(0, len(log.scores), steps):
        scores = np.concatenate(log.scores[first : first + steps])
        keep = np.concatenate([step.keep for step in log.selected[first : first + steps]])
        missed.append(float(np.mean(~keep[top(scores, target)])))
    return float(np.mean(missed))


def top(scores: np.ndarray, target: float) -> np.ndarray:
    """Positions of the highest scores, as many as the target says, at least one."""
    return np.argsort(-scores, kind="stable")[: max(1, round(target * len(scores)))]


def split(trace: Trace, step: int, ranks: int, spread: str) -> list[np.ndarray]:
    """Deal one step's samples to the ranks. Returns each rank's positions in the batch; some may be empty.

    spread: "dealt" gives every `ranks`-th sample to a rank, as the loader does; "by label" and "by significance" give
    each a run of the sorted batch.
    """
    if spread == "dealt":
        return [np.arange(rank, trace.batch, ranks) for rank in range(ranks)]
    key = trace.label[step] if spread == "by label" and trace.label is not None else trace.significance[step]
    return np.array_split(np.argsort(key, kind="stable"), ranks)


def shared_ranks(trace: Trace, target: float, ranks: int, spread: str, steps: int) -> dict[str, Any]:
    """Our rule on many ranks that sum their histograms: one Threshold a rank, all of them stepped.

    rank_imbalance: samples kept on the busiest rank over the mean of the ranks, mean over steps. identical: whether
    thresholds agreed on all ranks at every step, and with one rank that sees the whole batch, bit for bit, and so
    did what is kept.
    """
    each, alone = [Threshold(target) for _ in range(ranks)], Threshold(target)
    log, imbalance, is_identical = Log(), [], True
    for step, scores in enumerate(trace.significance[:steps]):
        ids = sample_ids(step, trace.batch)
        parts = split(trace, step, ranks, spread)
        whole, value = alone.step(torch.from_numpy(scores), ids=torch.from_numpy(ids))
        bins = each[0].bins
        sent = [histogram(torch.from_numpy(scores[part]), bins) for part in parts]
        total = torch.stack(sent).sum(dim=0)
        keep = np.zeros(trace.batch, dtype=bool)
        for threshold, part in zip(each, parts, strict=True):
            kept, found = threshold.step(torch.from_numpy(scores[part]), _given(total), ids=torch.from_numpy(ids[part]))
            keep[part] = kept.numpy()
            is_identical &= found.hex() == value.hex()
        is_identical &= bool((keep == whole.numpy()).all())
        imbalance.append(_imbalance(keep, parts))
        log.add(scores, Selected(keep, value))
    figures = {key: figure for key, figure in measures(log, target, steps).items() if key in _RANK_KEYS}
    return {**figures, "rank_imbalance": float(np.mean(imbalance)), "identical": is_identical}


def own_ranks(
    make: Callable[[float], Rule], trace: Trace, target: float, ranks: int, spread: str, steps: int
) -> dict[str, Any]:
    """A rule with one controller of its own on each rank.

    rank_disagreement: standard deviation of the ranks' thresholds over their mean, mean over steps. share_top_missed:
    of the global batch's top scores.
    """
    each = [make(target) for _ in range(ranks)]
    log, imbalance, disagreement = Log(), [], []
    for step, scores in enumerate(trace.significance[:steps]):
        ids = sample_ids(step, trace.batch)
        parts = split(trace, step, ranks, spread)
        keep, thresholds, at_limit = np.zeros(trace.batch, dtype=bool), [], []
        for rule, part in zip(each, parts, strict=True):
            if len(part):
                selected = rule.select(scores[part], ids[part])
                keep[part] = selected.keep
                thresholds.append(selected.threshold)
                at_limit.append(selected.at_limit)
        imbalance.append(_imbalance(keep, parts))
        disagreement.append(float(np.std(thresholds)) / max(float(np.mean(thresholds)), 1e-9))
        log.add(scores, Selected(keep, float(np.mean(thresholds)), float(np.mean(at_limit)) >= 0.5))
    figures = {key: figure for key, figure in measures(log, target, steps).items() if key in _RANK_KEYS}
    return {
        **figures,
        "rank_imbalance": float(np.mean(imbalance)),
        "rank_disagreement": float(np.mean(disagreement)),
    }


_RANK_KEYS = ("worst_epoch_error", "rms_step_error", "rms_50_error", "mean_error", "settled_step", "share_top_missed")
_WORST = ("worst_epoch_error", "rms_step_error", "rms_50_error", "share_at_limit", "share_top_missed")


def worst(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of each measure over rows. settled_step is None when it is in any row; settled: share that did."""
    settled = [row["settled_step"] for row in rows]
    return {
        "runs": len(rows),
        **{key: max(row[key] for row in rows) for key in _WORST},
        "settled_step": None if None in settled else max(settled),
        "settled": sum(step is not None for step in settled) / len(settled),
    }


def _imbalance(keep: np.ndarray, parts: list[np.ndarray]) -> float:
    kept = np.array([keep[part].sum() for part in parts])
    return float(kept.max() / max(kept.mean(), 1e-9))


def _given(total: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda counts: total.clone()


def _block_means(values: np.ndarray, length: int) -> np.ndarray:
    """Means of runs of `length` values; a last shorter run is left out unless it is the only one."""
    blocks = max(1, len(values) // length)
    return np.array([values[n * length : (n + 1) * length].mean() for n in range(blocks)])


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
