"""What no loader can beat: reading the bytes, and decoding whole images with libjpeg-turbo."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from ast_dist.data.index import Index
from ast_dist.data.order import epoch_order
from ast_dist.data.read import Reader
from benchmarks.loaders.source import SEED, Batches, Job, Source, is_installed

_HELD_IMAGES = 2000  # the bytes that decoding works on are held in memory
_AHEAD = 8


def open_source(job: Job) -> Source:
    """decoder "read": our Reader in the epoch's order. Otherwise each image of the held ones decoded whole."""
    index = Index.open(job.paths["shards"])
    reader = Reader(index)
    order = epoch_order(index.num_samples, SEED, 0).tolist()
    work: Callable[[Any], object] = reader.read
    items: list[Any] = order
    if job.decoder != "read":
        items = [reader.read(sample_id) for sample_id in order[:_HELD_IMAGES]]
        work = _simplejpeg() if job.decoder == "simplejpeg" else _torchvision
    pool = ThreadPoolExecutor(job.workers)

    def epoch() -> Batches:
        batches = [items[first : first + job.batch_size] for first in range(0, len(items), job.batch_size)]
        for count in _ahead(pool, lambda batch: [work(item) for item in batch], batches):
            yield torch.empty(0), torch.empty(count)

    return Source(epoch, "", close=pool.shutdown)


def best_decoder() -> str:
    """simplejpeg, a thin layer over libjpeg-turbo, where it is installed; torchvision's decode_jpeg otherwise."""
    return "simplejpeg" if is_installed("simplejpeg") else "torchvision"


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], batches: Iterable[Any]) -> Iterator[int]:
    """Sizes of the batches, each done by one thread; a few are always under way."""
    rest = iter(batches)
    pending: list[Future[Any]] = [pool.submit(work, batch) for batch in islice(rest, _AHEAD)]
    while pending:
        done = len(pending.pop(0).result())
        pending.extend(pool.submit(work, batch) for batch in islice(rest, 1))
        yield done


def _simplejpeg() -> Callable[[bytes], object]:
    import simplejpeg

    def decode(data: bytes) -> object:
        # CMYK files, a few in a million, have no way to RGB in libjpeg-turbo; warnings about odd files are no errors.
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=False)
        except ValueError:
            return simplejpeg.decode_jpeg(data, "CMYK", strict=False)

    return decode


def _torchvision(data: bytes) -> object:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
