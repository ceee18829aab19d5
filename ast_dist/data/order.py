"""Which samples a step trains on: pure functions of the seed, the epoch and the position.

    order = orders.of(epoch)                            every sample once, the same on all ranks
    plan  = policy.plan(epoch, order)                   what the gate keeps of it, in the same order
    ids   = step_ids(plan.ids, step, global_batch_size) the global batch of a step
    mine  = rank_share(ids, rank, world_size)           this rank's part of it

Nothing is keyed by rank or remembered between steps, so the position in the data is two numbers (epoch, step) and
another world size trains the same global batches.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ast_dist.counter_rng import STREAM_ORDER, STREAM_SHARDS, hash_ids, hash_key

# Above this, an order is drawn block by block as it is used: whole, it would take 128 MiB a rank and more.
LARGEST_WHOLE_ORDER = 2**24
_KEPT_BLOCKS = 4


class BlockOrder:
    """An epoch's order that is never held as a whole: shards in random order, a few of them shuffled at a time.

    Reading it needs the shards of one block at a time, which suits remote and spinning storage; and memory for one
    block, whatever the number of samples. A conversion shuffles the samples over all shards, and a block of
    them is a random draw of the whole set; tars of others may be sorted by class, and take larger blocks or none.
    MosaicML's streaming shuffles the same way and calls it py1b.

    shard_sizes: (S,) samples of each shard; ids count through the shards in turn. block_shards: shards of a block.
    Slices give (n,) int64 sample ids; `numpy.asarray` gives all of them.
    """

    def __init__(self, shard_sizes: np.ndarray, block_shards: int, seed: int, epoch: int) -> None:
        self._key = (seed, epoch)
        self._block_shards = block_shards
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, stride = part.indices(len(self))
        if stride != 1:
            return np.asarray(self)[part]
        if start >= stop:
            return np.zeros(0, np.int64)
        first, last = np.searchsorted(self._block_ends, [start, stop - 1], side="right").tolist()
        ids = np.concatenate([self._block(number) for number in range(first, last + 1)])
        before = int(self._block_ends[first - 1]) if first else 0
        return ids[start - before : stop - before]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        blocks = [self._draw(number) for number in range(len(self._block_ends))]
        return np.concatenate([np.zeros(0, np.int64), *blocks]).astype(dtype or np.int64, copy=False)

    @cached_property
    def id(self) -> str:
        """SHA-256 (hex, 16 digits) of all that the order follows from."""
        digest = hashlib.sha256(self._sizes.tobytes())
        digest.update(repr((self._key, self._block_shards)).encode("ascii"))
        return digest.hexdigest()[:16]

    @cached_property
    def _shards(self) -> np.ndarray:
        return epoch_order(len(self._sizes), hash_key(STREAM_SHARDS, self._key[0]), self._key[1])

    @cached_property
    def _block_ends(self) -> np.ndarray:
        """(blocks,) int64: position in the order one past each block's last sample."""
        sizes = self._sizes[self._shards]
        return np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self._block_shards)))

    @cached_property
    def _first_ids(self) -> np.ndarray:
        return np.cumsum(self._sizes) - self._sizes

    def _block(self, number: int) -> np.ndarray:
        if number not in self._cache:
            self._cache[number] = self._draw(number)
            while len(self._cache) > _KEPT_BLOCKS:
                self._cache.popitem(last=False)
        return self._cache[number]

    def _draw(self, number: int) -> np.ndarray:
        shards = self._shards[number * self._block_shards : (number + 1) * self._block_shards]
        ids = np.concatenate([self._first_ids[shard] + np.arange(self._sizes[shard]) for shard in shards])
        return ids[np.argsort(hash_ids(ids, STREAM_ORDER, *self._key), kind="stable")]


@dataclass(frozen=True)
class Orders:
    """The order of every epoch of a set.

    shard_sizes: (S,) samples of each shard. block_shards: shards that are shuffled at a time; 0 or below for all.
    """

    shard_sizes: np.ndarray
    seed: int
    block_shards: int = 0

    @cached_property
    def num_samples(self) -> int:
        return int(np.sum(self.shard_sizes))

    def of(self, epoch: int) -> "np.ndarray | BlockOrder":
        """An epoch's order: (num_samples,) int64, as an array where that is no burden."""
        if self.block_shards <= 0:
            return epoch_order(self.num_samples, self.seed, epoch)
        order = BlockOrder(self.shard_sizes, self.block_shards, self.seed, epoch)
        return order if self.num_samples > LARGEST_WHOLE_ORDER else np.asarray(order)


@dataclass(frozen=True)
class Plan:
    """The samples that an epoch trains on, in order.

    ids: (P,) int64 sample ids, each at most once; a BlockOrder stands for itself, whole. weights: (P,) float32 loss
    weights, or None for all ones. chances: (P,) float32 in (0, 1], with which each sample was selected, or one number
    where all were with the same; 0 marks samples that were added for another reason than a draw, and that no estimate
    counts. None where they are not known, as when some samples had no chance at all.

    Chances change nothing of what is trained: they serve to estimate what the samples left out would have shown.
    """

    ids: np.ndarray | BlockOrder
    weights: np.ndarray | None = None
    chances: np.ndarray | float | None = None

    @property
    def id(self) -> str:
        """SHA-256 (hex, 16 digits) of ids and weights: ranks and restarts that train one plan show one id.

        Chances are left out: no weight of the model depends on them.
        """
        if isinstance(self.ids, BlockOrder) and self.weights is None:
            return self.ids.id
        digest = hashlib.sha256(np.ascontiguousarray(self.ids).tobytes())
        if self.weights is not None:
            digest.update(np.ascontiguousarray(self.weights).tobytes())
        return digest.hexdigest()[:16]

    def bits(self, num_samples: int) -> np.ndarray:
        """Which samples it holds, one bit each: (ceil(num_samples / 8),) uint8. The order follows from the epoch.

        (0,) uint8 for a BlockOrder, which holds all.
        """
        if isinstance(self.ids, BlockOrder):
            return np.zeros(0, np.uint8)
        is_planned = np.zeros(num_samples, dtype=bool)
        is_planned[self.ids] = True
        return np.packbits(is_planned)

    @classmethod
    def from_bits(
        cls,
        bits: np.ndarray,
        order: np.ndarray | BlockOrder,
        weights: np.ndarray | None = None,
        chances: np.ndarray | float | None = None,
    ) -> "Plan":
        """The plan whose `bits` these are.

        order: (num_samples,) the epoch's order. weights, chances: (P,) in that order, as the plan had them.
        """
        if not len(bits):
            return cls(order, weights, chances)
        order = np.asarray(order)
        is_planned = np.unpackbits(bits, count=len(order)).astype(bool)
        return cls(order[is_planned[order]], weights, chances)

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


def step_ids(ids: np.ndarray | BlockOrder, step: int, global_batch_size: int) -> np.ndarray:
    """The global batch of one step, (global_batch_size,) of `ids`; shorter at the end."""
    return ids[step * global_batch_size : (step + 1) * global_batch_size]


def rank_share(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """This rank's samples of a global batch: every world_size-th. Shares differ by one at most and may be empty."""
    return ids[rank::world_size]
