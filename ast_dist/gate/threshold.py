"""One threshold for all ranks: the inverse of an all-reduced histogram, held to its target by an integral term.

Ranks sum integers and nothing else. The threshold and every decision are deterministic functions of that sum, so
all ranks hold the same bits whatever their number.

Bins are 1/16 of an octave wide, from 2^-24 to 2^6 nats; below and above, the first and the last bin take all. A
sample in the threshold's own bin is kept with the probability that meets the target (dithering by a counter-based
number per sample): near-constant scores would otherwise all switch on or off together.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.counter_rng import STREAM_DITHER, uniform

LOG2_MIN = -24
LOG2_MAX = 6
BINS_PER_OCTAVE = 16
NUM_BINS = (LOG2_MAX - LOG2_MIN) * BINS_PER_OCTAVE
_LARGE_BATCH = 512

AllReduce = Callable[[Tensor], Tensor]


@functools.cache
def _edges(device: torch.device) -> Tensor:
    return torch.tensor([_edge(number, 0.0) for number in range(1, NUM_BINS)], dtype=torch.float32, device=device)


def bin_of(significance: Tensor) -> Tensor:
    """Histogram bin of each score. significance: (N,) float32, not NaN. Returns (N,) int64 in 0 … NUM_BINS - 1.

    Compares with the bins' edges: logarithms differ in their last bit between processors, and a score would then
    fall into one bin on one rank and into the next on another.
    """
    return torch.bucketize(significance.float().contiguous(), _edges(significance.device), right=True)


def histogram(significance: Tensor) -> Tensor:
    """Count scores by bin. significance: (N,) float32.

    Returns (NUM_BINS + 1,) int64 on the same device; the last element counts the NaN and infinite scores, which are
    in no bin. Negative scores count as zero.
    """
    is_finite = torch.isfinite(significance)
    bins = torch.where(is_finite, bin_of(significance.nan_to_num(0.0).clamp_min(0.0)), NUM_BINS)
    counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64, device=significance.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))


class Threshold:
    """The threshold above which a target share of the samples lies.

    target_rate: share to keep, in (0, 1]. ki: gain of the integral of (rate - target_rate). memory: share of the
    last histogram that is added to the next; None takes 0 for windows of 512 samples and more, else 0.5.

    Attributes after a step: `threshold` (nats), `integral` (the term u subtracted from the target), `rate` (expected
    share kept of the current window), `non_finite` (scores that were NaN or infinite), `median` (nats).
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
        self._bin = 0
        self._share_of_bin = 1.0
        self._counts = np.zeros(NUM_BINS, dtype=np.float64)

    def step(
        self, significance: Tensor, all_reduce: AllReduce | None = None, dither: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Update the threshold from this rank's scores and say which of them to keep.

        significance: (N,) float32, nats; N may be 0 and may differ between ranks. all_reduce: sums an int64 tensor
        over the ranks; None where there is one. dither: (N,) numbers in [0, 1) that decide in the threshold's own
        bin; by default drawn from the position and the step. NaN and infinite scores are kept, since nothing is
        known of them, and counted.

        Returns keep (N,) bool and the threshold in nats, the same bits on every rank.
        """
        counts = histogram(significance)
        if all_reduce is not None:
            counts = all_reduce(counts)
        threshold = self.update(counts)
        # What the other ranks keep after dithering is not known here; on average it is the expected rate.
        self.integrate(self.rate)
        if dither is None:
            drawn = uniform(np.arange(len(significance)), STREAM_DITHER, self.steps)
            dither = torch.from_numpy(drawn).to(significance.device)
        return self.keep(significance, dither), threshold

    def update(self, counts: Tensor) -> float:
        """Set the threshold from a window's global histogram. counts: (NUM_BINS + 1,) int64 of `histogram`.

        Call `integrate` with the rate that came of it.
        """
        window = counts.cpu().numpy()
        self.non_finite = int(window[-1])
        current = window[:-1].astype(np.float64)
        total = current.sum()
        self.steps += 1
        if total == 0:
            return self.threshold
        memory = self.memory if self.memory is not None else (0.0 if total >= _LARGE_BATCH else 0.5)
        self._counts = current + memory * self._counts
        self._invert(self._counts, self.target_rate - self.integral)
        above = current[self._bin + 1 :].sum()
        self.rate = float((above + self._share_of_bin * current[self._bin]) / total)
        self.median = _edge(int(np.searchsorted(np.cumsum(current), total / 2)), 0.5)
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
        bins = bin_of(significance.nan_to_num(0.0).clamp_min(0.0))
        in_share = (bins == self._bin) & (dither < self._share_of_bin)
        return (bins > self._bin) | in_share | ~is_finite

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as plain numbers and one (NUM_BINS,) float64 tensor."""
        names = ("threshold", "integral", "rate", "median", "non_finite", "steps")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**state, "bin": self._bin, "share_of_bin": self._share_of_bin, "counts": torch.tensor(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in ("threshold", "integral", "rate", "median", "non_finite", "steps"):
            setattr(self, name, state[name])
        self._bin, self._share_of_bin = state["bin"], state["share_of_bin"]
        self._counts = state["counts"].numpy().copy()

    def _invert(self, counts: np.ndarray, share: float) -> None:
        """Find the bin, and the share of it, that leave `share` of all counts above."""
        share = min(max(share, 0.0), 1.0)
        from_top = np.cumsum(counts[::-1])
        # Not counts.sum(): its order of summing depends on the processor, and remembered counts are no integers.
        wanted = share * from_top[-1]
        # The first bin from the top at which the wanted number is reached. side="left" stays on a filled bin.
        position = min(int(np.searchsorted(from_top, wanted, side="left")), NUM_BINS - 1)
        self._bin = NUM_BINS - 1 - position
        above = from_top[position - 1] if position else 0.0
        in_bin = counts[self._bin]
        self._share_of_bin = float(min(1.0, (wanted - above) / in_bin)) if in_bin else 1.0
        self.threshold = _edge(self._bin, 1.0 - self._share_of_bin)


def _edge(bin_number: int, position: float) -> float:
    """Significance at a position (0 … 1) within a bin, nats."""
    return 2.0 ** (LOG2_MIN + (bin_number + position) / BINS_PER_OCTAVE)
