"""The rules that benchmarks.threshold compares: each sees a batch's scores and says which of them to train.

`original` is written anew after adaptive-sparse-training 1.0.1 (PyPI; `SundewAlgorithm.select_samples` in sundew.py,
defaults in config.py). The gains of its Kaggle presets are those of KAGGLE_IMAGENET1K_AST_CONFIGS.py in
github.com/oluwafemidiakhoa/adaptive-sparse-training; the preset "conservative" has the package's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ast_dist.counter_rng import STREAM_DITHER
from ast_dist.gate.draw import uniform_on_device
from ast_dist.gate.threshold import Bins, Threshold, histogram


@dataclass(frozen=True)
class Selected:
    """A rule's answer to one batch. keep: (N,) bool. threshold: nats. at_limit: whether a clamp held it."""

    keep: np.ndarray
    threshold: float
    at_limit: bool = False


class Rule(Protocol):
    """One controller, with its state."""

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        """Decide on one batch. scores: (N,) float32, N may be 0. ids: (N,) int64."""


class Ours:
    """ast_dist.gate.threshold.Threshold as it is shipped."""

    def __init__(self, target: float) -> None:
        self.threshold = Threshold(target)

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        keep, value = self.threshold.step(torch.from_numpy(scores), ids=torch.from_numpy(ids))
        return Selected(keep.numpy(), value, is_at_limit(self.threshold))


class OursLate:
    """The same with each batch judged by the threshold that the batch before gave: nothing waits for the device.

    The first batch has none before it: each of its samples is kept with the target as its chance.
    """

    def __init__(self, target: float) -> None:
        self.threshold = Threshold(target)
        self._waiting: tuple[Tensor, Bins] | None = None

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        significance, threshold = torch.from_numpy(scores), self.threshold
        if self._waiting is not None:
            threshold.update(*self._waiting)
        dither = uniform_on_device(torch.from_numpy(ids), STREAM_DITHER, threshold.steps)
        is_first = self._waiting is None
        keep = ((dither < threshold.target_rate) if is_first else threshold.keep(significance, dither)).numpy()
        if not is_first and len(keep):
            threshold.integrate(float(keep.mean()))
        bins = threshold.bins
        self._waiting = histogram(significance, bins), bins
        return Selected(keep, threshold.threshold, is_at_limit(threshold))


def is_at_limit(threshold: Threshold) -> bool:
    """Whether the integral term is at its limit."""
    limit = 0.5 * min(threshold.target_rate, 1.0 - threshold.target_rate)
    return abs(threshold.integral) >= limit > 0.0


class Original:
    """A PI controller on the EMA (0.1) of the activation rate, clamped, with a floor.

    threshold += kp·e + ki·∫e, kept within [0.5, 10]; ∫e stays within ±100 and leaks by 10 % a step while the threshold
    is at a clamp. Where fewer than 10 % (or 2) of a batch are above, its top 10 % are kept.
    """

    LOWEST, HIGHEST, FLOOR, EMA, WINDUP, LEAK = 0.5, 10.0, 0.10, 0.1, 100.0, 0.9

    def __init__(self, target: float, kp: float = 0.005, ki: float = 0.0001, start: float = 3.0) -> None:
        self.target, self.kp, self.ki, self.threshold = target, kp, ki, start
        self._smoothed, self._integral = target, 0.0

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        used = self.threshold
        keep = scores > used
        at_least = min(len(scores), max(2, int(self.FLOOR * len(scores))))
        is_floored = keep.sum() < at_least
        if is_floored:
            keep = _top(scores, at_least)
        if len(scores):
            self._smoothed += self.EMA * (float(keep.mean()) - self._smoothed)
        error = self._smoothed - self.target
        if self.LOWEST < used < self.HIGHEST:
            self._integral = min(max(self._integral + error, -self.WINDUP), self.WINDUP)
        else:
            self._integral *= self.LEAK
        moved = used + self.kp * error + self.ki * self._integral
        self.threshold = min(max(moved, self.LOWEST), self.HIGHEST)
        return Selected(keep, used, bool(is_floored) or used in (self.LOWEST, self.HIGHEST))


class BatchQuantile:
    """The exact top share of each batch; equal scores at the cut are kept all together."""

    def __init__(self, target: float) -> None:
        self.target = target

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        threshold = quantile(scores, self.target)
        return Selected(scores >= threshold, threshold)


class QuantileEma:
    """The EMA (0.1) of the batches' quantiles, the present batch's included."""

    def __init__(self, target: float, weight: float = 0.1) -> None:
        self.target, self.weight, self.threshold = target, weight, math.nan

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        if len(scores):
            new = quantile(scores, self.target)
            old = new if math.isnan(self.threshold) else self.threshold
            self.threshold = old + self.weight * (new - old)
        return Selected(scores >= self.threshold, self.threshold)


class RobbinsMonro:
    """Stochastic approximation of the quantile in log space, with a constant gain since the scores keep moving.

    log threshold += gain · (rate - target): H. Robbins and S. Monro, "A stochastic approximation method", Ann. Math.
    Stat. 22 (1951); for quantiles with multiplicative steps: A. Yazidi and H. L. Hammer, "Multiplicative update
    methods for incremental quantile estimation", IEEE Trans. Cybernetics 49 (2019). Starts at 1 nat.
    """

    def __init__(self, target: float, gain: float = 0.3) -> None:
        self.target, self.gain, self._log = target, gain, 0.0

    def select(self, scores: np.ndarray, ids: np.ndarray) -> Selected:
        threshold = math.exp(self._log)
        keep = scores >= threshold
        if len(scores):
            self._log += self.gain * (float(keep.mean()) - self.target)
        return Selected(keep, threshold)


KAGGLE_AGGRESSIVE, KAGGLE_ULTRA = "original, Kaggle aggressive", "original, Kaggle ultra"
RULES: dict[str, Callable[[float], Rule]] = {
    "ours": Ours,
    "ours, one step late": OursLate,
    "original": Original,
    KAGGLE_AGGRESSIVE: lambda target: Original(target, kp=0.008, ki=0.00015, start=4.0),
    KAGGLE_ULTRA: lambda target: Original(target, kp=0.010, ki=0.0002, start=5.0),
    "batch quantile": BatchQuantile,
    "EMA of batch quantiles": QuantileEma,
    "Robbins-Monro, log": RobbinsMonro,
}


def quantile(scores: np.ndarray, share: float) -> float:
    """The score that at least `share` of the scores reach: an element of `scores`; infinite where there are none."""
    number = max(1, round(share * len(scores)))
    return float(np.partition(scores, len(scores) - number)[len(scores) - number]) if len(scores) else math.inf


def _top(scores: np.ndarray, number: int) -> np.ndarray:
    keep = np.zeros(len(scores), dtype=bool)
    keep[np.argsort(-scores, kind="stable")[:number]] = True
    return keep
