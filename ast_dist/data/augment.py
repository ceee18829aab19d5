"""Crop boxes and flips, drawn per (seed, epoch, sample id) from counter-based numbers.

A draw does not depend on rank, batch, worker or restart. Boxes are drawn from the index's height and width, before
any byte is read, so that a decoder can decode the region alone.
"""

from dataclasses import dataclass

import numpy as np

from ast_dist.counter_rng import STREAM_CROP, STREAM_FLIP, uniform
from ast_dist.data_config import DataConfig

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crops:
    """What to cut from each image of a batch.

    boxes: (n, 4) int64 rows of top, left, height, width in pixels of the stored image. A box may reach outside the
    image; those pixels are 0. flips: (n,) bool, mirror left to right after cropping.
    """

    boxes: np.ndarray
    flips: np.ndarray


def train_crops(
    ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, config: DataConfig
) -> Crops:
    """Draw the training crops of samples. ids, heights, widths: (n,) integers."""
    if config.crop == "resized":
        boxes = _resized_boxes(ids, heights, widths, seed, epoch, config.crop_scale_min)
    elif config.crop == "padded":
        boxes = _padded_boxes(ids, heights, widths, seed, epoch, config.crop_pad_px)
    else:
        boxes = central_boxes(heights, widths, 1.0)
    flips = np.zeros(len(ids), dtype=bool)
    if config.flip:
        flips = uniform(ids, STREAM_FLIP, seed, epoch) < 0.5
    return Crops(boxes, flips)


def val_crops(heights: np.ndarray, widths: np.ndarray, config: DataConfig) -> Crops:
    """The central crops for validation: val_crop_ratio of the short side, not mirrored."""
    return Crops(central_boxes(heights, widths, config.val_crop_ratio), np.zeros(len(heights), dtype=bool))


def central_boxes(heights: np.ndarray, widths: np.ndarray, ratio: float) -> np.ndarray:
    """Square boxes in the middle, `ratio` of the short side. Returns (n, 4) int64.

    Cutting this box and resizing it equals resizing the short side and cutting the centre, but for the
    interpolation at the box's edge.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    side = np.maximum(1, np.round(np.minimum(heights, widths) * ratio)).astype(np.int64)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def _padded_boxes(
    ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, pad_px: int
) -> np.ndarray:
    """Shift a central square by up to `pad_px` pixels each way (He et al. 2016, section 4.2, CIFAR-10)."""
    boxes = central_boxes(heights, widths, 1.0)
    for axis in (0, 1):
        shift = uniform(ids, STREAM_CROP, seed, epoch, axis) * (2 * pad_px + 1)
        boxes[:, axis] += np.floor(shift).astype(np.int64) - pad_px
    return boxes


def _resized_boxes(
    ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, scale_min: float
) -> np.ndarray:
    """Random resized crops (Szegedy et al. 2015, "Going deeper with convolutions", section 6).

    The same distribution as torchvision's RandomResizedCrop.get_params: ten tries at an area share uniform in
    scale_min … 1 and an aspect ratio log-uniform in 3/4 … 4/3, then the largest central box of an allowed ratio.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    boxes = _fallback_boxes(heights, widths)
    open_rows = np.ones(len(ids), dtype=bool)
    for attempt in range(_TRIES):
        draw = [uniform(ids, STREAM_CROP, seed, epoch, attempt, number) for number in range(4)]
        area = heights * widths * (scale_min + (1.0 - scale_min) * draw[0])
        ratio = np.exp(np.log(_RATIO[0]) + (np.log(_RATIO[1]) - np.log(_RATIO[0])) * draw[1])
        box_w = np.round(np.sqrt(area * ratio)).astype(np.int64)
        box_h = np.round(np.sqrt(area / ratio)).astype(np.int64)
        fits = open_rows & (box_w > 0) & (box_w <= widths) & (box_h > 0) & (box_h <= heights)
        top = np.floor(draw[2] * (heights - box_h + 1)).astype(np.int64)
        left = np.floor(draw[3] * (widths - box_w + 1)).astype(np.int64)
        boxes[fits] = np.stack([top, left, box_h, box_w], axis=1)[fits]
        open_rows &= ~fits
        if not open_rows.any():
            break
    return boxes


def _fallback_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    ratio = widths / heights
    box_w = np.where(ratio > _RATIO[1], np.round(heights * _RATIO[1]), widths).astype(np.int64)
    box_h = np.where(ratio < _RATIO[0], np.round(widths / _RATIO[0]), heights).astype(np.int64)
    return np.stack([(heights - box_h) // 2, (widths - box_w) // 2, box_h, box_w], axis=1)
