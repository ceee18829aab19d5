"""Samples that stay hard whatever is done: likely wrong labels."""

from typing import Any

import numpy as np
import torch

from ast_dist.gate.memory import SignificanceMemory

# A sample that loses this share of its significance over the visits is being learnt, and no suspect.
_FLAT = 0.1


class HardTail:
    """Finds samples that stay at the top with flat loss, and lets them fall back to average.

    A sample is a suspect after `visits` visits in a row at which its significance was among the highest `share` of
    all and not more than 10 % below what it was at the first of them. One visit below the top clears it. Suspects
    count as samples of which nothing is known: they leave the histogram, and are kept with the rate as their chance,
    as the average sample is.

    The idea is that of hard examples which no longer improve as in "An Empirical Study of Example Forgetting"
    (Toneva et al., ICLR 2019, section 4: samples never learnt are often mislabelled); share and visits are ours.

    num_samples: of the training set. share: 0 switches the guard off. visits: at least 2.
    """

    def __init__(self, num_samples: int, share: float, visits: int) -> None:
        self.share = share
        self.visits = visits
        count = num_samples if share > 0 else 0
        self.streak = np.zeros(count, dtype=np.int32)
        self.first = np.zeros(count, dtype=np.float32)
        self._visits_seen = np.zeros(count, dtype=np.int32)

    @property
    def num_suspects(self) -> int:
        """Samples set aside at present."""
        return int((self.streak >= self.visits).sum())

    def update(self, memory: SignificanceMemory) -> None:
        """Take in the visits since the last call; before each epoch, on every rank alike."""
        if self.share <= 0:
            return
        scores = memory.significance
        is_new = memory.visits > self._visits_seen
        self._visits_seen = memory.visits.copy()
        is_known = np.isfinite(scores)
        if not (is_new & is_known).any():
            return
        # The k-th largest, found by partition: quantiles interpolate, and differ in their last bit by processor.
        known = scores[is_known]
        rank = min(len(known) - 1, int(len(known) * (1.0 - self.share)))
        is_top = is_known & (scores >= np.partition(known, rank)[rank])
        goes_on = is_top & (self.streak > 0) & (scores >= np.float32(1.0 - _FLAT) * self.first)
        starts = is_new & is_top & ~goes_on
        self.streak[is_new & goes_on] += 1
        self.streak[starts] = 1
        self.first[starts] = scores[starts]
        self.streak[is_new & ~is_top] = 0

    def guarded(self, scores: np.ndarray) -> np.ndarray:
        """Scores without the suspects'. scores: (num_samples,) float32, NaN where nothing is known."""
        if self.share <= 0 or not self.num_suspects:
            return scores
        return np.where(self.streak >= self.visits, np.float32(np.nan), scores)

    def state_dict(self) -> dict[str, Any]:
        """Three (num_samples,) tensors; nothing where the guard is off."""
        if self.share <= 0:
            return {}
        return {
            "streak": torch.from_numpy(self.streak.copy()),
            "first": torch.from_numpy(self.first.copy()),
            "visits": torch.from_numpy(self._visits_seen.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.share <= 0:
            return
        self.streak = state["streak"].numpy().copy()
        self.first = state["first"].numpy().copy()
        self._visits_seen = state["visits"].numpy().copy()
