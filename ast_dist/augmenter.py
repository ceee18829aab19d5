"""From a batch on the host to an augmented one on the device.

The order of all augmentation is that of torchvision's training references: crop and flip (by the decoder), RandAugment
or TrivialAugment, colour jitter (these on uint8, here), normalisation, random erasing (in the step), then mixup or
CutMix. What an image gets follows from seed, epoch and sample id, so the pixels that a scoring pass saw are those that
are trained, and a resumed run makes them again.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ast_dist.data.batch import Batch, upload
from ast_dist.data.pixel_draws import PixelDraws
from ast_dist.data.pixel_kernels import transform
from ast_dist.data_config import DataConfig


class Augmenter:
    """Augments the pixels of training batches on a device, without waiting for it."""

    def __init__(self, config: DataConfig, seed: int, device: torch.device) -> None:
        self._draws = PixelDraws(config, seed)
        self._device = device

    def __call__(self, host_batch: Batch, epoch: int) -> Batch:
        """Bring a batch to the device, augmented but for what is erased there after normalisation.

        host_batch: as the loader gives it, its ids on the CPU; it stays as it is. Padding and damaged rows hold some
        sample's pixels and are augmented like any, by what their id draws.
        """
        batch, ids, side = host_batch.to(self._device), host_batch.ids.numpy(), host_batch.images.shape[-1]
        rounds = self._draws.rounds(ids, epoch, side)
        images = batch.images.clone(memory_format=torch.contiguous_format) if rounds else batch.images
        for each in rounds:
            order = np.argsort(each.kernels, kind="stable")
            transform(images, each.kernels, self._upload(order), self._upload(each.parameters[order]))
        return dataclasses.replace(batch, images=images, erased=self.erased(ids, epoch, side))

    def erased(self, ids: np.ndarray, epoch: int, side: int) -> Tensor | None:
        """What `Batch.erased` is for images of these samples, on the device. side: pixels."""
        boxes = self._draws.erased(ids, epoch, side)
        return None if boxes is None else self._upload(boxes)

    def _upload(self, values: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(values), self._device)
