"""From a region of an image to a row of a batch: cut, resize, mirror.

Every decoder on a CPU ends here, and that is why all of them give the same pixels.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

# PyTorch's own resize, as interpolate calls it, but for its result: into a row of the batch instead of new memory,
# which spares a third of its time (260 + 90 µs for a resize and its copy, 180 µs in place; 299 × 299 to 224 × 224).
_RESIZE = getattr(torch.ops.aten, "_upsample_bilinear2d_aa", None)


class Box(NamedTuple):
    """Pixels of an image. A box may reach outside; those pixels are 0."""

    top: int
    left: int
    height: int
    width: int

    def inside(self, height: int, width: int) -> "Box":
        """The part of it that lies in an image of this size; one pixel of the image where that is empty."""
        top, left = min(max(self.top, 0), height - 1), min(max(self.left, 0), width - 1)
        bottom, right = min(self.top + self.height, height), min(self.left + self.width, width)
        return Box(top, left, max(bottom - top, 1), max(right - left, 1))

    def meets(self, other: "Box") -> bool:
        """Whether the two share a pixel."""
        return (
            self.top < other.top + other.height
            and other.top < self.top + self.height
            and self.left < other.left + other.width
            and other.left < self.left + self.width
        )


def cut(image: Tensor, box: Box) -> Tensor:
    """The box's pixels of a whole image, a view. image: (3, H, W). box: inside the image."""
    return image[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize_region(region: Tensor, box: Box, held: Box, flip: bool, out: Tensor) -> None:
    """Resize a box to a row of a batch and mirror it if asked to.

    region: (3, h, w) uint8, the pixels of `held`. box: what was asked for. held: `box.inside` of its image. out: (3,
    size, size) uint8, written. Equal to torchvision's v2 resized_crop (bilinear, antialias), bit for bit.
    """
    size = out.shape[-1]
    if not box.meets(held):
        out.zero_()  # all of it lies outside, and `held` is the pixel that is nearest
        return
    if (box.height, box.width) == (size, size):
        _place(region, box, held, flip, out)
        return
    if held != box:
        region = _framed(region, box, held)
    if not flip:
        _resize_into(region[None], out[None])
        return
    # Mirrored after the resize, as torchvision does it; before, rounding differs in the last bit.
    row = _scratch(out)
    _resize_into(region[None], row[None])
    torch.ops.aten.flip.out(row, [-1], out=out)


def crop_resize(image: Tensor, box: np.ndarray, flip: bool, size: int, out: Tensor) -> None:
    """Cut `box` from a whole image, resize it to `size` × `size` and mirror it if asked to.

    image: (3, H, W) uint8. box: top, left, height, width; outside the image pixels are 0. out: (3, size, size)
    uint8, written.
    """
    wanted = Box(*(int(value) for value in box))
    held = wanted.inside(image.shape[1], image.shape[2])
    resize_region(cut(image, held), wanted, held, flip, out)


def _resize_into(image: Tensor, out: Tensor) -> None:
    size = [out.shape[-2], out.shape[-1]]
    # In place only from and to channels_last memory, where the channels lie side by side.
    if _RESIZE is not None and image.stride(1) == out.stride(1) == 1:
        _RESIZE.out(image, size, False, None, None, out=out)
    else:
        out.copy_(interpolate(image, size, mode="bilinear", antialias=True))


def _framed(region: Tensor, box: Box, held: Box) -> Tensor:
    """The whole box, with zeros around the pixels held."""
    whole = torch.zeros((box.height, box.width, 3), dtype=torch.uint8).permute(2, 0, 1)
    cut(whole, Box(held.top - box.top, held.left - box.left, held.height, held.width)).copy_(region)
    return whole


def _place(region: Tensor, box: Box, held: Box, flip: bool, out: Tensor) -> None:
    """Copy a box as large as `out`. One assignment: torch's crop and flip take ten times as long on small images."""
    target = out.numpy()[:, :, ::-1] if flip else out.numpy()
    top, left = held.top - box.top, held.left - box.left
    if held != box:
        target[...] = 0
    target[:, top : top + held.height, left : left + held.width] = region.numpy()


_kept = threading.local()


def _scratch(like: Tensor) -> Tensor:
    """A row of this thread's own; used again, it stays in the processor's cache."""
    row: Tensor | None = getattr(_kept, "row", None)
    if row is None or row.shape != like.shape or row.stride() != like.stride():
        row = _kept.row = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return row
