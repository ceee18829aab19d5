"""torchvision's ImageFolder in a DataLoader: PIL, or decode_image with v2 transforms on tensors."""

from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image

from benchmarks.loaders.source import SEED, Job, Source
from benchmarks.loaders.transforms import transform


def _tensor(path: str) -> Any:
    return decode_image(path, mode=ImageReadMode.RGB)


def open_source(job: Job) -> Source:
    """A shuffled epoch; a resumed one draws the same permutation and begins in it."""
    images = ImageFolder(
        job.paths["images"],
        transform(job.decoder, job.output, job.image_px),
        loader=default_loader if job.decoder == "pil" else _tensor,
    )
    order: Any = None
    if job.start_batch:
        generator = torch.Generator().manual_seed(SEED)
        order = torch.randperm(len(images), generator=generator).tolist()[job.start_batch * job.batch_size :]
    loader = DataLoader(
        images,
        job.batch_size,
        shuffle=order is None,
        sampler=order,
        num_workers=job.workers,
        persistent_workers=True,
    )
    return Source(lambda: iter(loader), "the permutation from there on, as a sampler")
