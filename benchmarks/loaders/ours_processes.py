"""Our reader and torch decoder in the worker processes of a DataLoader, to judge threads by.

A worker makes whole batches, and they come to the consumer through shared memory: nothing is pickled but numbers.
"""

import math

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ast_dist.data.augment import train_crops
from ast_dist.data.decode_torch import decode
from ast_dist.data.index import Index
from ast_dist.data.order import epoch_order, step_ids
from ast_dist.data.read import Reader
from ast_dist.data.resize import crop_resize
from ast_dist.data_config import DataConfig
from ast_dist.model import Normalize
from benchmarks.loaders.source import SEED, Batches, Job, Source


class _Steps(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item i is the i-th batch of the epoch."""

    def __init__(self, job: Job, config: DataConfig) -> None:
        self._job, self._config = job, config
        self._index = Index.open(job.paths["shards"])
        self._reader = Reader(self._index)
        self._order = epoch_order(self._index.num_samples, SEED, 0)

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._job.batch_size)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        index, size = self._index, self._job.image_px
        ids = step_ids(self._order, step, self._job.batch_size)
        crops = train_crops(ids, index.height[ids], index.width[ids], SEED, 0, self._config)
        images = torch.empty((len(ids), 3, size, size), dtype=torch.uint8)
        for row, sample_id in enumerate(ids.tolist()):
            image = decode(self._reader.read(sample_id), sample_id, index.key(sample_id))
            crop_resize(image, crops.boxes[row], bool(crops.flips[row]), size, images[row])
        return images, torch.from_numpy(index.label[ids].astype(np.int64))


def open_source(job: Job) -> Source:
    """Epochs in the order of our loader's first."""
    root = job.paths["shards"]
    config = DataConfig(train=root, val=root, image_size=job.image_px)
    steps = _Steps(job, config)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(job.start_batch, len(steps)),
        num_workers=job.workers,
        persistent_workers=True,
    )
    normalize = Normalize(config, torch.device("cpu"), channels_last=False)

    def epoch() -> Batches:
        for images, labels in loader:
            yield (images if job.output == "uint8" else normalize(images)), labels

    return Source(epoch, "the step's number")
