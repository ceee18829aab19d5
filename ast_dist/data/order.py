"""Which samples a step trains on: pure functions of the seed, the epoch and the position.

    order = epoch_order(num_samples, seed, epoch)       every sample once, the same on all ranks
    plan  = policy.plan(epoch, order)                   what the gate keeps of it, in the same order
    ids   = step_ids(plan.ids, step, global_batch_size) the global batch of a step
    mine  = rank_share(ids, rank, world_size)           this rank's part of it

Nothing is keyed by rank or remembered between steps, so the position in the data is two numbers (epoch, step) and
another world size trains the same global batches.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from ast_dist.counter_rng import STREAM_ORDER, hash_ids


@dataclass(frozen=True)
class Plan:
    """The samples that an epoch trains on, in order.

    ids: (P,) int64 sample ids, each at most once. weights: (P,) float32 loss weights, or None for all ones.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None

    @property
    def id(self) -> str:
        """SHA-256 (hex, 16 digits) of ids and weights: ranks and restarts that train one plan show one id."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids).tobytes())
        if self.weights is not None:
            digest.update(np.ascontiguousarray(self.weights).tobytes())
        return digest.hexdigest()[:16]

    def bits(self, num_samples: int) -> np.ndarray:
        """Which samples it holds, one bit each: (ceil(num_samples / 8),) uint8. The order follows from the epoch."""
        is_planned = np.zeros(num_samples, dtype=bool)
        is_planned[self.ids] = True
        return np.packbits(is_planned)

    @classmethod
    def from_bits(cls, bits: np.ndarray, order: np.ndarray, weights: np.ndarray | None = None) -> "Plan":
        """The plan whose `bits` these are. order: (num_samples,) the epoch's order. weights: (P,) in that order."""
        is_planned = np.unpackbits(bits, count=len(order)).astype(bool)
        return cls(order[is_planned[order]], weights)

    def num_steps(self, global_batch_size: int) -> int:
        """Steps of this epoch; the last one may be short."""
        return -(-len(self.ids) // global_batch_size)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permute all sample ids. Returns (num_samples,) int64, a pure function of its arguments.

    Sorting hashed ids gives a uniform permutation that does not depend on NumPy's version; 64-bit ties are broken
    by the id (stable sort).
    """
    ids = np.arange(num_samples, dtype=np.int64)
    return np.argsort(hash_ids(ids, STREAM_ORDER, seed, epoch), kind="stable").astype(np.int64, copy=False)


def step_ids(ids: np.ndarray, step: int, global_batch_size: int) -> np.ndarray:
    """The global batch of one step, a view of `ids`; shorter at the end."""
    return ids[step * global_batch_size : (step + 1) * global_batch_size]


def rank_share(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's samples of a global batch: every world_size-th. Shares differ by one at most and may be empty."""
    return ids[rank::world_size]
