"""Decoding on the GPU: how many images a second each way gives, and how far it outruns training there.

All read our shards by position and cut the crops that the training loop would, so that they differ in the decoding
alone: our loader, DALI decoding the region of interest in a pipeline of its own, DALI decoding whole images that are
cut afterwards, and torchvision's decode_jpeg. Each ends with normalised float16 images of NHWC layout on the device. On
a CPU the same runs there.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms

from ast_dist.data.augment import Crops, train_crops
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order, step_ids
from ast_dist.data.read import Reader
from ast_dist.data_config import DataConfig
from ast_dist.model import Normalize
from benchmarks.loaders.source import is_installed
from benchmarks.loaders.usage import cpu_s
from benchmarks.timing import synchronize

_SEED = 0
_WARMUP_BATCHES = 5
_PASSES = 1000


@dataclass(frozen=True)
class Way:
    """A way to decode. cores: CPU cores it may use, also its number of threads; 0 takes all."""

    name: str
    decode: str
    cores: int = 0


WAYS = (
    Way("ast_dist, as it trains", "ours"),
    Way("ast_dist, as it trains", "ours", cores=2),
    Way("DALI, region of interest", "dali_region"),
    Way("DALI, region of interest", "dali_region", cores=2),
    Way("DALI, whole image, then cut", "dali_whole"),
    Way("torchvision decode_jpeg, then cut", "torchvision"),
)


def gpu_loader(
    device: torch.device,
    way: Way,
    index: Index,
    *,
    batch_size: int,
    image_px: int,
    target_s: float,
    training_images_per_s: float | None,
) -> dict[str, Any]:
    """Measure one way for about `target_s` seconds. Returns a row.

    training_images_per_s: what the training step alone reaches here; times_training is the pace over it.
    cpu_ms_per_image: user and system time of this process. The few images are read again and again, each time anew.
    """
    about = {"way": way.name, "batch_size": batch_size, "image_px": image_px}
    if way.decode != "torchvision" and not is_installed("nvidia.dali"):
        return {**about, "skipped": "DALI is not installed: pip install 'ast-dist[dali]'"}
    with _held_to(way.cores) as cores:
        run = decoding(device, way, index, batch_size, image_px, cores)
        for _ in range(_WARMUP_BATCHES):
            run()
        synchronize(device)
        began, cpu_began, images = time.perf_counter(), cpu_s(), 0
        while not images or time.perf_counter() - began < target_s:
            images += len(run())
        synchronize(device)
        seconds, used_s = time.perf_counter() - began, cpu_s() - cpu_began
    rate = images / seconds
    return {
        **about,
        "cores": cores,
        "images_per_s": rate,
        "cpu_ms_per_image": 1000.0 * used_s / images,
        "training_images_per_s": training_images_per_s,
        "times_training": rate / training_images_per_s if training_images_per_s else None,
        "jpeg_kb": float(index.size.mean()) / 1000.0,
    }


def decoding(
    device: torch.device, way: Way, index: Index, batch_size: int, image_px: int, threads: int
) -> Callable[[], Any]:
    """What gives the next batch, (n, px, px, 3) in memory: a tensor, or DALI's TensorList."""
    if way.decode == "ours":
        return _ours(device, index, batch_size, image_px, threads)
    if way.decode == "torchvision":
        return _torchvision(device, index, batch_size, image_px)
    return _dali(device, index, batch_size, image_px, threads, region=way.decode == "dali_region")


def _ours(device: torch.device, index: Index, batch_size: int, image_px: int, threads: int) -> Callable[[], Tensor]:
    config = DataConfig(decoder="dali", image_size=image_px, threads=threads, cache="none")
    normalize = Normalize(config, device, channels_last=True)

    def batches() -> Iterator[Tensor]:
        loader = Loader(index, config, 0, 1, device=device)
        try:
            # Epochs of many passes over the few images: at an epoch's end nothing is decoded ahead.
            for epoch in itertools.count():
                orders = [epoch_order(index.num_samples, _SEED, epoch + number) for number in range(_PASSES)]
                for batch in loader.train_batches(Plan(np.concatenate(orders)), batch_size, _SEED, epoch):
                    yield normalize(batch.to(device).images, torch.float16)
        finally:
            loader.close()

    return batches().__next__


def _dali(
    device: torch.device, index: Index, batch_size: int, image_px: int, threads: int, *, region: bool
) -> Callable[[], Any]:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    decoding = "mixed" if on_gpu else "cpu"
    config = DataConfig(image_size=image_px)

    def source() -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
        for encoded, crops in _encoded(index, batch_size, config):
            starts, shapes = (np.ascontiguousarray(part, np.int32) for part in np.split(crops.boxes, 2, axis=1))
            files = [np.frombuffer(data, dtype=np.uint8) for data in encoded]
            yield files, starts, shapes, crops.flips.astype(np.int32)

    # The adjustments that the index has settled already are off; the rest is what parity with torchvision takes.
    options: dict[str, Any] = {"device": decoding, "output_type": types.RGB, "adjust_orientation": False}
    if on_gpu:
        options["jpeg_fancy_upsampling"] = True

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device.index or 0 if on_gpu else None)
    def pipeline() -> Any:
        files, starts, shapes, flips = fn.external_source(source=source(), num_outputs=4)
        if region:
            images = fn.decoders.image_slice(files, starts, shapes, axes=[0, 1], **options)
        else:
            images = fn.slice(fn.decoders.image(files, **options), starts, shapes, axes=[0, 1])
        images = fn.resize(images, size=(image_px, image_px), interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT16,
            output_layout="HWC",
            mirror=flips,
            mean=[255.0 * value for value in config.mean],
            std=[255.0 * value for value in config.std],
        )

    made = pipeline()
    made.build()

    def run() -> Any:
        (images,) = made.run()
        return images

    return run


def _torchvision(device: torch.device, index: Index, batch_size: int, image_px: int) -> Callable[[], Any]:
    config = DataConfig(image_size=image_px)
    batches = _encoded(index, batch_size, config)
    mean = 255.0 * torch.tensor(config.mean, device=device).view(1, 3, 1, 1)
    std = 255.0 * torch.tensor(config.std, device=device).view(1, 3, 1, 1)

    def run() -> Tensor:
        encoded, crops = next(batches)
        files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]
        decoded = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        images = torch.stack(
            [
                transforms.resized_crop(image, *box, [image_px, image_px], antialias=True)
                for image, box in zip(decoded, crops.boxes.tolist(), strict=True)
            ]
        )
        flips = torch.from_numpy(crops.flips).to(device).view(-1, 1, 1, 1)
        images = torch.where(flips, images.flip(-1), images)
        return ((images.float() - mean) / std).half().contiguous(memory_format=torch.channels_last)

    return run


def _encoded(index: Index, batch_size: int, config: DataConfig) -> Iterator[tuple[list[bytes], Crops]]:
    """Whole batches of encoded images and their crops, epoch after epoch without an end."""
    reader = Reader(index)
    rest = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        while len(rest) < batch_size:
            rest = np.concatenate([rest, epoch_order(index.num_samples, _SEED, epoch)])
            epoch += 1
        ids, rest = step_ids(rest, 0, batch_size), rest[batch_size:]
        crops = train_crops(ids, index.height[ids], index.width[ids], _SEED, epoch - 1, config)
        yield [reader.read(sample_id) for sample_id in ids.tolist()], crops


@contextlib.contextmanager
def _held_to(cores: int) -> Iterator[int]:
    """Hold this thread, and those it starts, to so many CPU cores; 0 to all. Yields their number."""
    before = os.sched_getaffinity(0)
    taken = sorted(before)[: cores or len(before)]
    os.sched_setaffinity(0, taken)
    try:
        yield len(taken)
    finally:
        os.sched_setaffinity(0, before)
