"""From planned sample ids to batches on the way to the device.

Decoding runs in threads: torchvision releases the interpreter lock while it decodes and resizes, so threads scale
like processes here and need neither shared memory nor a second import of torch. A bounded number of batches is in
flight; nothing outside the plan is read.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ast_dist.config import DataConfig
from ast_dist.data import augment
from ast_dist.data.cache import make_cache
from ast_dist.data.decode_torch import crop_resize, decode
from ast_dist.data.index import Index
from ast_dist.data.order import Plan, rank_share, step_ids
from ast_dist.data.read import DamagedSampleError, Reader

# BatchNorm refuses a single value per channel, and a rank without samples must still take part in the step.
MIN_ROWS = 2

_Crops = Callable[[np.ndarray], augment.Crops]


@dataclass
class Batch:
    """One rank's part of a global batch.

    step: its number in the epoch. ids: (n,) int64 sample ids. images: (n, 3, size, size) uint8. labels: (n,) int64.
    weights: (n,) float32 loss weights. is_active: (n,) bool; False marks rows that must not train: padding (id -1)
    and damaged samples. planned: samples of the global batch over all ranks. damaged: what failed, by message.
    erased: (n, 4) int64 boxes (top, left, height, width) that become the mean once the images are normalised, or None.
    """

    step: int
    ids: Tensor
    images: Tensor
    labels: Tensor
    weights: Tensor
    is_active: Tensor
    planned: int
    damaged: list[str] = field(default_factory=list)
    erased: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device without waiting for it."""
        if device.type == "cpu":
            return self
        names = ("ids", "images", "labels", "weights", "is_active", "erased")
        moved = {name: upload(value, device) for name in names if (value := getattr(self, name)) is not None}
        return Batch(step=self.step, planned=self.planned, damaged=self.damaged, **moved)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; to a GPU through pinned memory, so that the host does not wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Loader:
    """Reads, decodes and assembles one rank's batches of a split."""

    def __init__(self, index: Index, config: DataConfig, rank: int, world_size: int, local_world_size: int = 1) -> None:
        self.index = index
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.reader = Reader(index)
        self.cache = make_cache(index, config)
        self.samples_decoded = 0
        self._count_lock = threading.Lock()
        self.threads = config.threads or max(1, _available_cores() // local_world_size)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def train_batches(
        self, plan: Plan, global_batch_size: int, seed: int, epoch: int, start_step: int = 0
    ) -> Iterator[Batch]:
        """This rank's batches of an epoch's plan from `start_step` on. Every rank yields the same number."""

        def crops(ids: np.ndarray) -> augment.Crops:
            return augment.train_crops(ids, self.index.height[ids], self.index.width[ids], seed, epoch, self.config)

        steps = range(start_step, plan.num_steps(global_batch_size))
        return self._prefetched(
            self._start(
                step,
                step_ids(plan.ids, step, global_batch_size),
                None if plan.weights is None else step_ids(plan.weights, step, global_batch_size),
                crops,
            )
            for step in steps
        )

    def val_batches(self, global_batch_size: int) -> Iterator[Batch]:
        """This rank's share of the whole split, in index order, with central crops."""

        def crops(ids: np.ndarray) -> augment.Crops:
            return augment.val_crops(self.index.height[ids], self.index.width[ids], self.config)

        ids = np.arange(self.index.num_samples, dtype=np.int64)
        steps = range(-(-len(ids) // global_batch_size))
        return self._prefetched(
            self._start(step, step_ids(ids, step, global_batch_size), None, crops) for step in steps
        )

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()

    def _prefetched(self, started: "Iterator[_Pending]") -> Iterator[Batch]:
        pending: deque[_Pending] = deque()
        try:
            for item in started:
                pending.append(item)
                if len(pending) > self.config.prefetch_batches:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # The consumer stopped early: what was prefetched was never trained, so it was never consumed.
            for item in pending:
                item.cancel()

    def _start(self, step: int, global_ids: np.ndarray, global_weights: np.ndarray | None, crops: _Crops) -> "_Pending":
        ids = rank_share(global_ids, self.rank, self.world_size)
        rows, size = max(len(ids), MIN_ROWS), self.config.image_size
        batch = Batch(
            step=step,
            ids=torch.full((rows,), -1, dtype=torch.int64),
            images=torch.zeros((rows, 3, size, size), dtype=torch.uint8),
            labels=torch.zeros(rows, dtype=torch.int64),
            weights=torch.zeros(rows, dtype=torch.float32),
            is_active=torch.zeros(rows, dtype=torch.bool),
            planned=len(global_ids),
        )
        batch.ids[: len(ids)] = torch.from_numpy(ids)
        batch.labels[: len(ids)] = torch.from_numpy(self.index.label[ids].astype(np.int64))
        batch.is_active[: len(ids)] = True
        batch.weights[: len(ids)] = 1.0
        if global_weights is not None:
            batch.weights[: len(ids)] = torch.from_numpy(rank_share(global_weights, self.rank, self.world_size))
        drawn = crops(ids)
        chunk = -(-len(ids) // self.threads) or 1
        futures = [
            self._pool.submit(self._fill, batch, ids, drawn, range(first, min(first + chunk, len(ids))))
            for first in range(0, len(ids), chunk)
        ]
        return _Pending(batch, futures)

    def _fill(self, batch: Batch, ids: np.ndarray, crops: augment.Crops, rows: range) -> None:
        for row in rows:
            try:
                image = self._image(int(ids[row]))
            except DamagedSampleError as error:
                batch.is_active[row] = False
                batch.weights[row] = 0.0
                batch.damaged.append(str(error))
                continue
            crop_resize(image, crops.boxes[row], bool(crops.flips[row]), self.config.image_size, batch.images[row])

    def _image(self, sample_id: int) -> Tensor:
        if self.cache is not None:
            cached = self.cache.get(sample_id)
            if cached is not None:
                return torch.from_numpy(cached)
        key, size = self.index.key(sample_id), (int(self.index.height[sample_id]), int(self.index.width[sample_id]))
        image = decode(self.reader.read(sample_id), sample_id, key)
        if image.shape[1:] != size:
            raise DamagedSampleError(
                sample_id,
                f"sample {key} (id {sample_id}) has {image.shape[1]}×{image.shape[2]} pixels (height × width), but the "
                f"index states {size[0]}×{size[1]}, from which its crop was drawn",
            )
        with self._count_lock:
            self.samples_decoded += 1
        if self.cache is not None:
            self.cache.put(sample_id, image.numpy())
        return image


def _available_cores() -> int:
    """Cores that this process may use: a container or batch system may grant fewer than the host has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Pending:
    """A batch that threads are filling."""

    batch: Batch
    futures: "list[Future[None]]"

    def result(self) -> Batch:
        for future in self.futures:
            future.result()
        images, is_active = self.batch.images, self.batch.is_active
        if is_active.any() and not is_active.all():
            # Padding and damaged rows repeat a sample: a black image would bend this rank's batch statistics.
            images[~is_active] = images[int(is_active.nonzero()[0])].clone()
        return self.batch

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()
