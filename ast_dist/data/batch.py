"""One rank's part of a global batch, and its way to the device."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# BatchNorm refuses a single value per channel, and a rank without samples must still take part in the step.
MIN_ROWS = 2


@dataclass
class Batch:
    """One rank's part of a global batch.

    step: its number in the epoch. ids: (n,) int64 sample ids. images: (n, 3, size, size) uint8, in channels_last
    memory, on the device already where that decodes. labels: (n,) int64. weights: (n,) float32 loss weights.
    is_active: (n,) bool; False marks rows that must not train: padding (id -1) and damaged samples. planned: samples
    of the global batch over all ranks. damaged: what failed, by message. ready: what a GPU's stream must wait for
    before it uses images that were decoded there. erased: (n, 4) int64 boxes (top, left, height, width) that become the
    mean once the images are normalised, or None. chances: (n,) float32, with which the samples were selected, 1 for
    padding; None where all were with the same chance, or nobody knows.
    """

    step: int
    ids: Tensor
    images: Tensor
    labels: Tensor
    weights: Tensor
    is_active: Tensor
    planned: int
    damaged: list[str] = field(default_factory=list)
    ready: "torch.cuda.Event | None" = None
    erased: Tensor | None = None
    chances: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device without waiting for it."""
        if device.type == "cpu":
            return self
        names = ("ids", "images", "labels", "weights", "is_active", "erased", "chances")
        moved: dict[str, Any] = {
            name: upload(value, device) for name in names if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
