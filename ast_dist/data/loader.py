"""From planned sample ids to batches on the way to the device.

Decoding runs in threads: torchvision and DALI release the interpreter lock while they decode and resize, so threads
scale like processes here and need neither shared memory nor a second import of torch. A bounded number of batches is in
flight; nothing outside the plan is read.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.data import augment
from ast_dist.data.batch import MIN_ROWS, Batch, upload
from ast_dist.data.cache import make_cache
from ast_dist.data.decoder import RegionDecoder, make_decoder
from ast_dist.data.encoded import Encoded
from ast_dist.data.header import image_header
from ast_dist.data.index import Index
from ast_dist.data.order import Plan, rank_share, step_ids
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.remote import open_reader
from ast_dist.data.resize import Box, cut, resize_region
from ast_dist.data_config import DataConfig

_CPU = torch.device("cpu")

# Samples after a batch whose remote shards are fetched meanwhile, where the cache has room: a block of shards or two.
_AHEAD_SAMPLES = 32_768

# Rows that one thread takes at a time: decoding 64 regions at once costs 3 % less than 32, and more would only wait.
_MOST_ROWS = 64

# ids, heights, widths → crops: a pure function, so that it may be called for any part of a batch.
_Crops = Callable[[np.ndarray, np.ndarray, np.ndarray], augment.Crops]


class Loader:
    """Reads, decodes and assembles one rank's batches of a split.

    device: what the batches are for. On a GPU, DALI decodes there.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        rank: int,
        world_size: int,
        local_world_size: int = 1,
        device: torch.device = _CPU,
    ) -> None:
        self.index = index
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.reader = open_reader(index, config)
        self.cache = make_cache(index, config)
        self.samples_decoded = 0
        self._count_lock = threading.Lock()
        self.threads = config.threads or max(1, _available_cores() // local_world_size)
        self.decoder = make_decoder(config, device, self.threads, keeps_whole=self.cache is not None)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        # A decoder of whole batches is asked by two threads in turn, which mostly wait for it.
        self._batch_pool = ThreadPoolExecutor(2, thread_name_prefix="batch")

    def train_batches(
        self,
        plan: Plan,
        global_batch_size: int,
        seed: int,
        epoch: int,
        start_step: int = 0,
        image_size: Callable[[int], int] | None = None,
    ) -> Iterator[Batch]:
        """This rank's batches of an epoch's plan from `start_step` on. Every rank yields the same number.

        image_size: side of a step's images, pixels, by its number; data.image_size unless given.
        """

        def crops(ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> augment.Crops:
            return augment.train_crops(ids, heights, widths, seed, epoch, self.config)

        def start(step: int) -> _Pending:
            ids = step_ids(plan.ids, step, global_batch_size)
            weights = None if plan.weights is None else step_ids(plan.weights, step, global_batch_size)
            chances = step_ids(plan.chances, step, global_batch_size) if isinstance(plan.chances, np.ndarray) else None
            last = (step + 1) * global_batch_size
            ahead = plan.ids[last : last + _AHEAD_SAMPLES] if self.index.is_remote else None
            size = image_size(step) if image_size else self.config.image_size
            return self._start(step, ids, weights, chances, crops, size, ahead, step == start_step)

        return self._prefetched(map(start, range(start_step, plan.num_steps(global_batch_size))))

    def val_batches(self, global_batch_size: int) -> Iterator[Batch]:
        """This rank's share of the whole split, in index order, with central crops."""

        def crops(ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> augment.Crops:
            return augment.val_crops(heights, widths, self.config)

        count = self.index.num_samples

        def start(step: int) -> _Pending:
            first = step * global_batch_size
            last = min(first + global_batch_size, count)
            ahead = np.arange(last, min(last + _AHEAD_SAMPLES, count)) if self.index.is_remote else None
            ids, size = np.arange(first, last), self.config.image_size
            return self._start(step, ids, None, None, crops, size, ahead, step == 0)

        return self._prefetched(map(start, range(-(-count // global_batch_size))))

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self.reader.stop()
        self._batch_pool.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()
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

    def _start(
        self,
        step: int,
        global_ids: np.ndarray,
        global_weights: np.ndarray | None,
        global_chances: np.ndarray | None,
        crops: _Crops,
        size: int,
        ahead: np.ndarray | None,
        is_first: bool,
    ) -> "_Pending":
        ids = rank_share(global_ids, self.rank, self.world_size)
        self.reader.will_need(ids if self.cache is None else self.cache.missing(ids), ahead)
        rows = max(len(ids), MIN_ROWS)
        on_device = not isinstance(self.decoder, RegionDecoder)
        batch = Batch(
            step=step,
            ids=torch.full((rows,), -1, dtype=torch.int64),
            images=_unwritten(0 if on_device else rows, size),
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
        if global_chances is not None:
            batch.chances = torch.ones(rows, dtype=torch.float32)
            batch.chances[: len(ids)] = torch.from_numpy(rank_share(global_chances, self.rank, self.world_size))
        # As few parts as keep all threads at work, since each costs; the first batch is waited for, and shared by all.
        share = self.threads if is_first else -(-self.threads // self.config.prefetch_batches)
        chunk = min(_MOST_ROWS, -(-len(ids) // share)) or 1
        parts = [range(first, min(first + chunk, len(ids))) for first in range(0, len(ids), chunk)]
        if not on_device:
            return _Pending(batch, [self._pool.submit(self._fill, batch, ids, part, crops) for part in parts])
        reads = [self._pool.submit(self._read, batch, ids, part) for part in parts]
        decoded = self._batch_pool.submit(self._decode_whole, batch, reads, crops, size)
        return _Pending(batch, [*reads, decoded])

    def _read(self, batch: Batch, ids: np.ndarray, rows: range) -> list[Encoded | None]:
        """Read samples; None stands for those that are damaged, which are marked."""
        samples: list[Encoded | None] = []
        for row in rows:
            sample_id = int(ids[row])
            try:
                samples.append(self._sample(sample_id))
            except DamagedSampleError as error:
                _mark_damaged(batch, row, error)
                samples.append(None)
        return samples

    def _sample(self, sample_id: int) -> Encoded:
        index = self.index
        height, width = int(index.height[sample_id]), int(index.width[sample_id])
        data, key = self.reader.read(sample_id), index.key(sample_id)
        if not height:
            try:
                header = image_header(data)
            except ValueError as error:
                raise DamagedSampleError(sample_id, f"sample {key} (id {sample_id}) does not decode: {error}") from None
            height, width = header.height, header.width
        return Encoded(data, sample_id, key, height, width)

    def _fill(self, batch: Batch, ids: np.ndarray, rows: range, crops: _Crops) -> None:
        """Read, decode and resize some rows of a batch, in a decoding thread."""
        if self.cache is not None:
            self._fill_from_cache(batch, ids, rows, crops)
            return
        assert isinstance(self.decoder, RegionDecoder)
        samples = self._read(batch, ids, rows)
        found = [(row, sample) for row, sample in zip(rows, samples, strict=True) if sample is not None]
        drawn = _drawn([sample for _, sample in found], crops)
        wanted = [Box(*box) for box in drawn.boxes.tolist()]
        held = [box.inside(sample.height, sample.width) for box, (_, sample) in zip(wanted, found, strict=True)]
        regions = self.decoder.regions([sample for _, sample in found], held)
        decoded = 0
        for place, (row, _) in enumerate(found):
            region = regions[place]
            if isinstance(region, DamagedSampleError):
                _mark_damaged(batch, row, region)
                continue
            decoded += 1
            resize_region(region, wanted[place], held[place], bool(drawn.flips[place]), batch.images[row])
        self._count_decoded(decoded)

    def _fill_from_cache(self, batch: Batch, ids: np.ndarray, rows: range, crops: _Crops) -> None:
        """Fill rows with crops of whole images that are kept; what is not there yet is decoded whole and kept."""
        part = ids[rows.start : rows.stop]
        drawn = crops(part, self.index.height[part], self.index.width[part])
        for place, row in enumerate(rows):
            try:
                image = self._whole(int(ids[row]))
            except DamagedSampleError as error:
                _mark_damaged(batch, row, error)
                continue
            wanted = Box(*drawn.boxes[place].tolist())
            held = wanted.inside(image.shape[1], image.shape[2])
            resize_region(cut(image, held), wanted, held, bool(drawn.flips[place]), batch.images[row])

    def _whole(self, sample_id: int) -> Tensor:
        assert self.cache is not None and isinstance(self.decoder, RegionDecoder)
        cached = self.cache.get(sample_id)
        if cached is not None:
            return torch.from_numpy(cached)
        sample = self._sample(sample_id)
        [image] = self.decoder.regions([sample], [Box(0, 0, sample.height, sample.width)])
        if isinstance(image, DamagedSampleError):
            raise image
        self._count_decoded(1)
        self.cache.put(sample_id, image.numpy())
        return image

    def _decode_whole(
        self, batch: Batch, reads: "list[Future[list[Encoded | None]]]", crops: _Crops, size: int
    ) -> None:
        """Decode a batch where the decoder does so on the device."""
        assert not isinstance(self.decoder, RegionDecoder)
        samples = [sample for read in reads for sample in read.result()]
        drawn = _drawn([sample for sample in samples if sample is not None], crops)
        boxes, flips = np.zeros((len(samples), 4), np.int64), np.zeros(len(samples), bool)
        is_there = np.array([sample is not None for sample in samples], dtype=bool)
        boxes[is_there], flips[is_there] = drawn.boxes, drawn.flips
        padding = [None] * (len(batch.ids) - len(samples))
        images, damaged, batch.ready = self.decoder.decode(
            [*samples, *padding], [Box(*box) for box in boxes.tolist()], flips, size, self._pool.map
        )
        batch.images = images
        rows = {sample.sample_id: row for row, sample in enumerate(samples) if sample is not None}
        for error in damaged:
            _mark_damaged(batch, rows[error.sample_id], error)
        self._count_decoded(int(is_there.sum()) - len(damaged))

    def _count_decoded(self, count: int) -> None:
        with self._count_lock:
            self.samples_decoded += count


def _unwritten(rows: int, size: int) -> Tensor:
    """(rows, 3, size, size) uint8 in channels_last memory, in which decoders write and most models read."""
    return torch.empty((rows, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def _drawn(samples: list[Encoded], crops: _Crops) -> augment.Crops:
    numbers = np.array([(s.sample_id, s.height, s.width) for s in samples], np.int64).reshape(-1, 3)
    return crops(numbers[:, 0], numbers[:, 1], numbers[:, 2])


def _mark_damaged(batch: Batch, row: int, error: DamagedSampleError) -> None:
    batch.is_active[row] = False
    batch.weights[row] = 0.0
    batch.damaged.append(str(error))


def _available_cores() -> int:
    """Cores that this process may use: a container or batch system may grant fewer than the host has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Pending:
    """A batch that threads are filling."""

    batch: Batch
    futures: "list[Future[Any]]"

    def result(self) -> Batch:
        for future in self.futures:
            future.result()
        batch = self.batch
        if batch.ready is not None:
            batch.ready.wait()  # the current stream waits, not the host
            batch.images.record_stream(torch.cuda.current_stream(batch.images.device))
        is_active = batch.is_active
        if not is_active.any():
            batch.images.zero_()
        elif not is_active.all():
            # Padding and damaged rows repeat a sample: a black image would bend this rank's batch statistics.
            # By an index on the device, which a mask would have to be counted for.
            first, others = int(is_active.nonzero()[0]), (~is_active).nonzero()[:, 0]
            repeated = batch.images[first].expand(len(others), -1, -1, -1).clone()
            batch.images.index_copy_(0, upload(others, batch.images.device), repeated)
        return batch

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()
