"""One threshold for all ranks: the inverse of an all-reduced histogram, held to its target by an integral term.

Ranks sum integers and nothing else. The threshold and every decision are deterministic functions of that sum, so
all ranks hold the same bits whatever their number. What they sum is 481 integers, 3,848 bytes, whatever it counts.

A sample in the threshold's own bin is kept with the probability that meets the target (dithering by a counter-based
number per sample): equal scores would otherwise all switch on or off together. The wider that bin, the more of the
rate is left to chance, so `Threshold.step` lays its bins around the last threshold: 1/1024 of an octave wide there,
3 % wider with each bin outwards. One histogram that needs no history (`FIXED`) has 16 bins to an octave.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.counter_rng import STREAM_DITHER
from ast_dist.gate.draw import uniform_on_device

LOG2_MIN = -24
LOG2_MAX = 6
BINS_PER_OCTAVE = 16
NUM_BINS = (LOG2_MAX - LOG2_MIN) * BINS_PER_OCTAVE
# A window of fewer samples is filled up with remembered ones.
FULL_WINDOW = 128
# A score's key is the bit pattern of its float32: integers in the scores' own order, 2^23 to an octave.
_KEYS_PER_OCTAVE = 1 << 23
_NARROWEST = _KEYS_PER_OCTAVE // 32768
_WIDENING = 22

AllReduce = Callable[[Tensor], Tensor]


def _key(score: float) -> int:
    return int(np.float32(score).view(np.int32))


def _score(key: float) -> float:
    return float(np.int32(key).view(np.float32))


@dataclass(frozen=True)
class Bins:
    """Where the NUM_BINS bins of a histogram lie. Below and above, the first and the last bin take all.

    centre: key of the score around which they lie, narrowest there; 0 for equal parts of octaves, 2^-24 … 2^6 nats.

    Bins are compared as integers: logarithms differ in their last bit between processors, and a score would then
    fall into one bin on one rank and into the next on another.
    """

    centre: int = 0

    def of(self, significance: Tensor) -> Tensor:
        """Bin of each score. significance: (N,) float32, not NaN. Returns (N,) int64 in 0 … NUM_BINS - 1."""
        keys = significance.float().clamp_min(0.0).contiguous().view(torch.int32)
        edges = _bounds(self.centre == 0, significance.device)[1:-1] + self.centre
        return torch.bucketize(keys.long(), edges, right=True)

    @property
    def bounds(self) -> np.ndarray:
        """Lower and upper ends of all bins, as keys: (NUM_BINS + 1,) int64."""
        return _bounds(self.centre == 0, torch.device("cpu")).numpy() + self.centre

    def score(self, number: int, position: float) -> float:
        """Significance at a position (0 … 1) within a bin, nats."""
        lower, upper = (int(key) for key in self.bounds[number : number + 2])
        return _score(lower + math.floor(position * (upper - lower)))


FIXED = Bins()


@functools.cache
def _bounds(is_fixed: bool, device: torch.device) -> Tensor:
    """Ends of the bins of FIXED, or of bins around key 0, as (NUM_BINS + 1,) int64 keys."""
    if is_fixed:
        keys = [_key(2.0 ** (LOG2_MIN + number / BINS_PER_OCTAVE)) for number in range(NUM_BINS + 1)]
    else:
        half, width = [0], _NARROWEST
        for _ in range(NUM_BINS // 2):
            half.append(half[-1] + width)
            width += width // _WIDENING
        keys = [*(-offset for offset in half[:0:-1]), *half]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def bin_of(significance: Tensor) -> Tensor:
    """Bin of each score in FIXED. significance: (N,) float32, not NaN. Returns (N,) int64 in 0 … NUM_BINS - 1."""
    return FIXED.of(significance)


def histogram(significance: Tensor, bins: Bins = FIXED) -> Tensor:
    """Count scores by bin. significance: (N,) float32; N may be 0.

    Returns (NUM_BINS + 1,) int64 on the same device; the last element counts the NaN and infinite scores, which are
    in no bin. Negative scores count as zero. The host does not wait for the device.
    """
    is_finite = torch.isfinite(significance)
    numbers = torch.where(is_finite, bins.of(significance.nan_to_num(0.0)), NUM_BINS)
    counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64, device=significance.device)
    return counts.scatter_add_(0, numbers, torch.ones_like(numbers))


class Threshold:
    """The threshold above which a target share of the samples lies.

    target_rate: share to keep, in (0, 1]. ki: gain of the integral of (rate - target_rate). memory: share of the
    last histogram that is added to the next; None takes what fills a window up to FULL_WINDOW samples, and so 0 for
    windows of that size and more.

    Attributes after a step: `threshold` (nats), `integral` (the term u subtracted from the target), `rate` (expected
    share kept of the current window), `non_finite` (scores that were NaN or infinite), `median` (nats).

    Defined answers to degenerate input: equal scores (zeros, too) are kept with the target share as their chance; a
    single sample likewise, against the remembered ones; a target of 1 keeps everything; NaN and infinite scores are
    in no bin, are kept, since nothing is known of them, and are counted; a rank without samples takes part in the
    sum and gets the same threshold; a window without a finite score on any rank leaves the threshold as it was, and
    before the first score nothing is dropped.
    """

    def __init__(self, target_rate: float, ki: float = 0.05, memory: float | None = None) -> None:
        if not 0.0 < target_rate <= 1.0:
            raise ValueError(f"target_rate is {target_rate:g}, not in (0, 1].")
        self.target_rate = target_rate
        self.ki = ki
        self.memory = memory
        self.threshold = 0.0
        self.integral = 0.0
        self.rate = target_rate
        self.median = math.nan
        self.non_finite = 0
        self.steps = 0
        self._used = FIXED
        self._bin = 0
        self._share_of_bin = 1.0
        self._counts = np.zeros(NUM_BINS, dtype=np.float64)
        self._carry = 0.0

    @property
    def error(self) -> float:
        """rate - target_rate, of the last window."""
        return self.rate - self.target_rate

    @property
    def bins(self) -> Bins:
        """Bins around the present threshold, for the next window's histogram. The same on every rank."""
        score = self.threshold if self.threshold > 0.0 else 1.0
        return Bins(_key(min(max(score, 2.0**LOG2_MIN), 2.0**LOG2_MAX)))

    def step(
        self,
        significance: Tensor,
        all_reduce: AllReduce | None = None,
        dither: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        """Update the threshold from this rank's scores and say which of them to keep.

        significance: (N,) float32, nats; N may be 0 and may differ between ranks. all_reduce: sums an int64 tensor
        over the ranks; None where there is one. ids: (N,) int64 sample ids: what decides in the threshold's own bin
        is then drawn from id and step, so ranks draw independently, and alike however samples are spread over them.
        dither: (N,) numbers in [0, 1) to take in place of drawn ones. With neither, numbers are drawn from position
        and step: the same on every rank, so with several ranks give ids.

        Returns keep (N,) bool and the threshold in nats, the same bits on every rank. The host waits for the counts;
        where it must not, see `update`.
        """
        bins = self.bins
        counts = histogram(significance, bins)
        if all_reduce is not None:
            counts = all_reduce(counts)
        threshold = self.update(counts, bins)
        # What the other ranks keep after dithering is not known here; on average it is the expected rate.
        self.integrate(self.rate)
        if dither is None:
            if ids is None:
                ids = torch.arange(len(significance), device=significance.device)
            dither = uniform_on_device(ids, STREAM_DITHER, self.steps)
        return self.keep(significance, dither), threshold

    def update(self, counts: Tensor, bins: Bins = FIXED) -> float:
        """Set the threshold from a window's global histogram. Call `integrate` with the rate that came of it.

        counts: (NUM_BINS + 1,) int64 of `histogram`. bins: those it was counted in.

        The host needs the counts. On a GPU it would wait for them and for the all-reduce, so a training step does
        not call this with its own: it hands over those of the step before, copied meanwhile, or a plan is made
        between steps. `histogram` and `keep` never wait.
        """
        window = counts.cpu().numpy()
        self.non_finite = int(window[-1])
        current = window[:-1].astype(np.float64)
        total = current.sum()
        self.steps += 1
        if total == 0:
            return self.threshold
        memory = self.memory if self.memory is not None else max(0.0, 1.0 - total / FULL_WINDOW)
        remembered = _moved(self._counts, self._used, bins) if memory > 0.0 else 0.0
        self._counts, self._used = current + memory * remembered, bins
        from_top = np.cumsum(self._counts[::-1])
        # Not counts.sum(): its order of summing depends on the processor, and remembered counts are no integers.
        wanted = min(max(self.target_rate - self.integral, 0.0), 1.0) * from_top[-1]
        if memory == 0.0 and wanted >= 1.0:
            exact = wanted + self._carry
            wanted = min(max(math.floor(exact + 0.5), 1.0), total)
            self._carry = float(min(max(exact - wanted, -0.5), 0.5))
        self._invert(from_top, wanted)
        self.rate = self.share_kept(counts)
        self.median = bins.score(int(np.searchsorted(np.cumsum(current), total / 2)), 0.5)
        return self.threshold

    def integrate(self, rate: float) -> None:
        """Move the integral term by what a window kept, but not beyond its limit (conditional anti-windup).

        rate: share of the window's scores that was kept, the same on every rank.
        """
        self.rate = rate
        limit = 0.5 * min(self.target_rate, 1.0 - self.target_rate)
        moved = self.integral + self.ki * (rate - self.target_rate)
        self.integral = min(max(moved, -limit), limit)

    def keep(self, significance: Tensor, dither: Tensor) -> Tensor:
        """Which scores the present threshold keeps. significance: (N,), dither: (N,) in [0, 1). Returns (N,) bool."""
        is_finite = torch.isfinite(significance)
        numbers = self._used.of(significance.nan_to_num(0.0))
        in_share = (numbers == self._bin) & (dither < self._share_of_bin)
        return (numbers > self._bin) | in_share | ~is_finite

    def chance(self, significance: Tensor) -> Tensor:
        """Chance with which `keep` keeps each score, over the dither. significance: (N,). Returns (N,) float64."""
        numbers = self._used.of(significance.nan_to_num(0.0))
        chance = (numbers > self._bin).double() + (numbers == self._bin) * self._share_of_bin
        return torch.where(torch.isfinite(significance), chance, 1.0)

    def share_kept(self, counts: Tensor) -> float:
        """Expected share of a window's finite scores that `keep` keeps at present; the target where it has none.

        counts: (NUM_BINS + 1,) int64 of `histogram`, in the bins of the last update.
        """
        window = counts.cpu().numpy()[:-1].astype(np.float64)
        total = window.sum()
        above = window[self._bin + 1 :].sum() + self._share_of_bin * window[self._bin]
        return float(above / total) if total else self.target_rate

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as plain numbers and one (NUM_BINS,) float64 tensor."""
        names = ("threshold", "integral", "rate", "median", "non_finite", "steps")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state |= {"centre": self._used.centre, "bin": self._bin, "share_of_bin": self._share_of_bin}
        return {**state, "carry": self._carry, "counts": torch.tensor(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in ("threshold", "integral", "rate", "median", "non_finite", "steps"):
            setattr(self, name, state[name])
        self._used = Bins(state["centre"])
        self._bin, self._share_of_bin = state["bin"], state["share_of_bin"]
        self._carry = state["carry"]
        self._counts = state["counts"].numpy().copy()

    def _invert(self, from_top: np.ndarray, wanted: float) -> None:
        """Find the bin, and the share of it, that leave `wanted` of the counts above. from_top: their running sum."""
        # The first bin from the top at which the wanted number is reached. side="left" stays on a filled bin.
        position = min(int(np.searchsorted(from_top, wanted, side="left")), NUM_BINS - 1)
        self._bin = NUM_BINS - 1 - position
        above = from_top[position - 1] if position else 0.0
        in_bin = self._counts[self._bin]
        self._share_of_bin = float(min(1.0, (wanted - above) / in_bin)) if in_bin else 1.0
        self.threshold = self._used.score(self._bin, 1.0 - self._share_of_bin)


def _moved(counts: np.ndarray, old: Bins, new: Bins) -> np.ndarray:
    """Spread counts over other bins, evenly within each. What lies beyond the new bins goes into the outer ones."""
    if old == new:
        return counts
    before, after = old.bounds, new.bounds
    below = np.concatenate([[0.0], np.cumsum(counts)])
    # Own arithmetic, not np.interp: one rounding an operation, so that compilers cannot fuse two into one.
    number = np.clip(np.searchsorted(before, after, side="right") - 1, 0, NUM_BINS - 1)
    position = np.clip((after - before[number]) / (before[number + 1] - before[number]), 0.0, 1.0)
    at_bounds = below[number] + position * counts[number]
    at_bounds[0], at_bounds[-1] = 0.0, below[-1]
    return np.maximum(np.diff(at_bounds), 0.0)
