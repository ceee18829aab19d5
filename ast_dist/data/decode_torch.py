"""Decode with torchvision, on the CPU, for machines without DALI and for images that DALI decodes differently.

The contract of the decoders: (bytes, crop box) → uint8 pixels of that region, the same for all decoders up to their
stated tolerance. Normalisation is not done here but on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from ast_dist.data.encoded import Encoded
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.resize import Box, cut


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


class TorchDecoder:
    """Decodes whole images and cuts them. Safe between threads: torchvision frees the interpreter while it decodes."""

    name = "torch"

    def regions(self, samples: Sequence[Encoded], boxes: Sequence[Box]) -> list[Tensor | DamagedSampleError]:
        """The pixels of one box of each sample.

        boxes: inside the images, of the size that `samples` state. Returns (3, h, w) uint8 views, or why there are
        none.
        """
        found: list[Tensor | DamagedSampleError] = []
        for sample, box in zip(samples, boxes, strict=True):
            try:
                found.append(cut(whole(sample), box))
            except DamagedSampleError as error:
                found.append(error)
        return found

    def close(self) -> None:
        """Nothing is held."""


def whole(sample: Encoded) -> Tensor:
    """Decode a sample whole. Raises DamagedSampleError when it does not decode, or is not of the size stated."""
    image = decode(sample.data, sample.sample_id, sample.key)
    if image.shape[1:] != (sample.height, sample.width):
        raise sample.wrong_size(*image.shape[1:])
    return image
