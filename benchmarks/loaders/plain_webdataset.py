"""webdataset over the shards, as its documentation has it: shuffle, decode, batch in the workers, WebLoader."""

from typing import Any

import torch
import webdataset

from benchmarks.loaders.source import Job, Source, shard_names
from benchmarks.loaders.transforms import decode, transform

_SHUFFLE_SAMPLES = 1000


def open_source(job: Job) -> Source:
    """An epoch over all shards, split between the workers; a resumed one passes over undecoded samples."""
    to_output = transform(job.decoder, job.output, job.image_px)

    def image(data: bytes) -> Any:
        return to_output(decode(job.decoder, data))

    dataset = webdataset.WebDataset(shard_names(job), shardshuffle=100, empty_check=False)
    dataset = dataset.shuffle(_SHUFFLE_SAMPLES)
    if job.start_batch:
        dataset = dataset.slice(job.start_batch * job.batch_size // job.workers, None)
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(image, int).batched(job.batch_size, collation_fn=_collate)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=job.workers, persistent_workers=True)
    return Source(lambda: iter(loader), "each worker reads and drops its share of the samples before decoding")


def _collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
