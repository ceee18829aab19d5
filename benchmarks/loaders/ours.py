"""ast_dist's own loader, as the training loop uses it; float32 is normalised by the consumer, on the CPU."""

import numpy as np
import torch

from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.data_config import DataConfig
from ast_dist.model import Normalize
from benchmarks.loaders.source import SEED, Batches, Job, Source


def open_source(job: Job) -> Source:
    """Epochs of at least `epoch_images` samples, from the index on; small sets are read several times for that."""
    index, config, loader = open_loader(job)
    normalize = Normalize(config, torch.device("cpu"), channels_last=True)  # as the training command does
    epochs = iter(range(1 << 30))

    def epoch() -> Batches:
        number = next(epochs)
        copies = -(-job.epoch_images // index.num_samples)
        plan = Plan(np.concatenate([epoch_order(index.num_samples, SEED, number + copy) for copy in range(copies)]))
        start = 0 if number else job.start_batch
        for batch in loader.train_batches(plan, job.batch_size, SEED, number, start):
            yield (batch.images if job.output == "uint8" else normalize(batch.images)), batch.labels

    return Source(epoch, "the step's number", close=loader.close)


def open_loader(job: Job) -> tuple[Index, DataConfig, Loader]:
    """The job's shards and a loader of one rank over them."""
    root = job.paths["shards"]
    config = DataConfig(
        train=root, val=root, decoder=job.decoder, image_size=job.image_px, threads=job.workers, cache="none"
    )
    index = Index.open(root)
    return index, config, Loader(index, config, rank=0, world_size=1)
