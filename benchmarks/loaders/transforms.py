"""The augmentation that the peers share: RandomResizedCrop and flip, as torchvision's own examples have them."""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.loaders.source import MEAN, STD


def transform(decoder: str, output: str, image_px: int) -> Callable[[Any], Tensor]:
    """From a decoded image (PIL's, or a uint8 tensor for torchvision) to the loader's output, (3, px, px)."""
    if decoder == "pil":
        steps = [transforms.RandomResizedCrop(image_px), transforms.RandomHorizontalFlip()]
        if output == "uint8":
            return transforms.Compose([*steps, transforms.PILToTensor()])
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    tensor_steps = [v2.RandomResizedCrop(image_px, antialias=True), v2.RandomHorizontalFlip()]
    if output == "float32":
        tensor_steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(tensor_steps)


def decode(decoder: str, data: bytes) -> Any:
    """An RGB image from encoded bytes: PIL's, or a (3, H, W) uint8 tensor."""
    if decoder == "pil":
        return Image.open(io.BytesIO(data)).convert("RGB")
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
