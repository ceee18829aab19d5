"""Decode, crop and resize with torchvision, on the CPU.

The contract of every decoder: (bytes, crop box, flip, output size) → uint8 pixels, the same for all decoders up to
their stated tolerance. Normalisation is not done here but on the device.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as transforms

from ast_dist.data.read import DamagedSampleError


def decode(data: bytes, sample_id: int, key: str) -> Tensor:
    """Decode an image whole.

    Returns (3, height, width) uint8 RGB. EXIF orientation is not applied: conversion settles it, once.
    Raises DamagedSampleError when the bytes are no image.
    """
    try:
        # torch.frombuffer warns on read-only memory; the copy of a few kB costs nothing beside the decoding.
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        if image.ndim != 3 or image.dtype != torch.uint8:  # animations, PNGs with 16 bits a channel
            raise ValueError(f"it gives {image.dtype} {tuple(image.shape)}, not one image of 8 bits a channel")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedSampleError(sample_id, f"sample {key} (id {sample_id}) does not decode: {reason}") from None
    return image


def crop_resize(image: Tensor, box: np.ndarray, flip: bool, size: int, out: Tensor) -> None:
    """Cut `box` from an image, resize it to `size` × `size` and mirror it if asked to.

    image: (3, H, W) uint8. box: top, left, height, width; outside the image pixels are 0. out: (3, size, size)
    uint8, written. Inside the image this equals torchvision's v2 resized_crop (bilinear, antialias), bit for bit.
    """
    top, left, height, width = (int(value) for value in box)
    if (height, width) == (size, size):
        _cut(image.numpy(), top, left, flip, out.numpy())
        return
    crop = transforms.crop(image, top, left, height, width)
    crop = transforms.resize(crop, [size, size], antialias=True)
    out.copy_(crop.flip(-1) if flip else crop)


def _cut(image: np.ndarray, top: int, left: int, flip: bool, out: np.ndarray) -> None:
    """Copy a box as large as `out`. One assignment: torch's crop and flip take ten times as long on small images."""
    rows = slice(max(0, -top), min(out.shape[1], image.shape[1] - top))
    columns = slice(max(0, -left), min(out.shape[2], image.shape[2] - left))
    target = out[:, :, ::-1] if flip else out
    if rows.stop - rows.start < out.shape[1] or columns.stop - columns.start < out.shape[2]:
        out[...] = 0
    if rows.start < rows.stop and columns.start < columns.stop:
        target[:, rows, columns] = image[
            :, top + rows.start : top + rows.stop, left + columns.start : left + columns.stop
        ]
