"""Batches for a training loop of one's own: what an epoch's plan holds, fetched from any map-style dataset."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from ast_dist.counter_rng import STREAM_WORKER, hash_key
from ast_dist.data.order import Plan, rank_share, step_ids
from ast_dist.errors import UserError

# BatchNorm refuses a single value per channel.
_MIN_ROWS = 2
# What torch's DataLoader takes and the plan already decides.
_DECIDED = ("shuffle", "sampler", "batch_sampler", "drop_last", "in_order")

Collate = Callable[[list[Any]], Any]


def check_request(dataset: Any, num_samples: int, batch_size: int, options: dict[str, Any]) -> None:
    """Raise UserError for a dataset that the plan's ids do not fit, and for options that contradict the plan."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            f"{type(dataset).__name__} is no map-style dataset: gate.loader needs len(dataset) and dataset[i], "
            "to skip samples without reading them."
        )
    if len(dataset) != num_samples:
        raise UserError(
            f"the dataset has {len(dataset)} samples, but Gate was made with num_samples={num_samples}. Give "
            "every process the whole dataset, and Gate num_samples=len(dataset)."
        )
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    decided = [name for name in _DECIDED if name in options]
    if decided:
        raise UserError(f"gate.loader takes no {decided[0]}: the gate decides which samples come, and in what order.")


def loss_scales(plan: Plan, num_samples: int, global_batch_size: int, world_size: int) -> np.ndarray:
    """What each sample's loss is multiplied with: its weight · world_size over the samples of its global batch.

    Returns (num_samples + 1,) float32, by id: NaN for samples not in the plan, and 0 in the last place, for id -1.
    """
    batch_sizes = np.full(len(plan.ids), global_batch_size)
    rest = len(plan.ids) % global_batch_size
    batch_sizes[len(plan.ids) - rest :] = rest
    scales = np.full(num_samples + 1, np.nan, dtype=np.float32)
    scales[plan.ids] = world_size * (1.0 if plan.weights is None else plan.weights) / batch_sizes
    scales[-1] = 0.0
    return scales


class RankBatches(Sampler[list[int]]):
    """Rows of one rank's batches. A row i ≥ 0 is sample i; ~i is sample i, there to fill the batch up.

    ids: (P,) int64, the epoch's plan. batch_size: per rank. start_batch: batches to pass over.
    """

    def __init__(self, ids: np.ndarray, batch_size: int, rank: int, world_size: int, start_batch: int) -> None:
        self.ids = ids
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.batch_size * self.world_size)) - self.start_batch

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_batch, self.start_batch + len(self)):
            ids = step_ids(self.ids, step, self.batch_size * self.world_size)
            mine = rank_share(ids, self.rank, self.world_size)
            num_rows = max(-(-len(ids) // self.world_size), min(_MIN_ROWS, self.batch_size))
            # The next ranks' samples, not one's own again: equal rows would bend the batch statistics.
            others = ids[(self.rank + 1 + np.arange(num_rows - len(mine))) % len(ids)]
            yield [*mine.tolist(), *(~others).tolist()]


class GateLoader:
    """One rank's batches of an epoch, from `Gate.loader`: iterable again and again, with a length.

    dataset, batch_size (per rank): as given. begin: called when an iteration begins; end: when it has come to the
    last batch's end, not where the loop was left before. seed: with start_batch and rank, what workers draw from.
    """

    def __init__(
        self,
        dataset: "Dataset[Any]",
        batches: RankBatches,
        seed: tuple[int, ...],
        options: dict[str, Any],
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self.dataset = dataset
        self.batch_size = batches.batch_size
        self._begin = begin
        self._end = end
        options = dict(options)
        collate = _CollateWithIds(options.pop("collate_fn", None) or default_collate)
        if options.get("generator") is None:
            # One of its own: drawing seeds from the global one would shift a resumed run's dropout.
            key = hash_key(STREAM_WORKER, *seed, batches.start_batch, batches.rank)
            options["generator"] = torch.Generator().manual_seed(key)
        self._batches: DataLoader[Any] = DataLoader(
            _WithIds(dataset), batch_sampler=batches, collate_fn=collate, **options
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        yield from self._batches
        self._end()


class _WithIds(Dataset[tuple[Any, int]]):
    """A dataset whose samples come as (sample, id), by the rows of `RankBatches`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: list[int]) -> list[tuple[Any, int]]:
        samples = [max(row, ~row) for row in rows]
        # Some datasets read a whole batch faster than its samples one by one.
        if callable(getattr(self.dataset, "__getitems__", None)):
            read = self.dataset.__getitems__(samples)
        else:
            read = [self.dataset[sample] for sample in samples]
        return [(sample, max(row, -1)) for sample, row in zip(read, rows, strict=True)]


class _CollateWithIds:
    """Puts the ids behind what a collate function makes of the samples."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[Any, int]]) -> Any:
        batch = self.collate([sample for sample, _ in rows])
        ids = torch.tensor([sample_id for _, sample_id in rows], dtype=torch.int64)
        if isinstance(batch, Mapping) and "ids" not in batch:
            return {**batch, "ids": ids}
        if isinstance(batch, (tuple, list)) and len(batch) >= 2:
            return (*batch, ids)
        found = 'dicts with a key "ids" of their own' if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise UserError(f"the batches are {found}, but gate.loader adds ids to tuples like (x, y) and to dicts.")
