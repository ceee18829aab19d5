"""What is remembered of every sample: its significance when it was last trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Gathers an int64 and a float32 array of this rank's rows from all ranks, in any order.
GatherRows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SignificanceMemory:
    """Per sample id: significance (an EMA), the epoch it was last seen, visits. The same on every rank once merged.

    significance: (num_samples,) float32, nats, NaN where never seen. last_epoch: (num_samples,) int32, -1 where
    never seen. visits: (num_samples,) int32. decay: share of the old value kept at an update.

    Observations come from the training forward, so they cost no extra pass. They stay on the device until `merge`,
    which every rank must enter.
    """

    def __init__(self, num_samples: int, decay: float = 0.0) -> None:
        self.decay = decay
        self.significance = np.full(num_samples, np.nan, dtype=np.float32)
        self.last_epoch = np.full(num_samples, -1, dtype=np.int32)
        self.visits = np.zeros(num_samples, dtype=np.int32)
        self.non_finite = 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def observe(self, ids: Tensor, significance: Tensor) -> None:
        """Note scores of this rank's samples. ids: (n,) int64, negative ids are passed over. significance: (n,)."""
        self._pending.append((ids, significance.detach().float()))

    def merge(self, epoch: int, gather: GatherRows | None = None) -> None:
        """Bring the observations of all ranks into every rank's memory.

        An epoch shows a sample once at most, so merging often (at checkpoints) or once gives the same memory.
        Scores that are NaN or infinite are counted and not remembered. Ids travel as int64: float32 loses them
        above 2^24.
        """
        if self._pending:
            ids = torch.cat([ids for ids, _ in self._pending])
            scores = torch.cat([scores for _, scores in self._pending])
            ids, scores = ids[ids >= 0], scores[ids >= 0]
        else:
            ids, scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self._pending.clear()
        if gather is not None:
            ids, scores = gather(ids, scores)
        rows, values = ids.cpu().numpy(), scores.cpu().numpy()
        is_finite = np.isfinite(values)
        self.non_finite += int((~is_finite).sum())
        rows, values = rows[is_finite], values[is_finite]
        old = self.significance[rows]
        mixed = np.float32(self.decay) * old + np.float32(1.0 - self.decay) * values
        self.significance[rows] = np.where(np.isnan(old), values, mixed)
        self.last_epoch[rows] = epoch
        self.visits[rows] += 1

    def state_dict(self) -> dict[str, Any]:
        """The merged memory. Raises RuntimeError when observations wait to be merged: they would be lost."""
        if self._pending:
            raise RuntimeError("merge the significance memory on all ranks before taking its state")
        return {
            "significance": torch.from_numpy(self.significance.copy()),
            "last_epoch": torch.from_numpy(self.last_epoch.copy()),
            "visits": torch.from_numpy(self.visits.copy()),
            "non_finite": self.non_finite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; observations that wait are dropped."""
        for name in ("significance", "last_epoch", "visits"):
            setattr(self, name, state[name].numpy().copy())
        self.non_finite = state["non_finite"]
        self._pending.clear()
