"""What is done to the pixels of each image after its crop and flip, drawn per (seed, epoch, sample id).

Numbers alone, made on the host from ids that the host knows; ast_dist/data/pixel_kernels.py does the work, on the
device. A draw does not depend on rank, batch, worker or restart. The distributions are those of torchvision's v2
RandAugment, TrivialAugmentWide, ColorJitter and RandomErasing.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from ast_dist.counter_rng import STREAM_AUTO_AUGMENT, STREAM_ERASE, STREAM_JITTER, uniform
from ast_dist.data_config import DataConfig

NUM_PARAMETERS = 6
_BINS = 31  # strengths from nothing to the largest
_TRIES = 10


class Kernel(IntEnum):
    """What can be done to an image; the parameters of each stand at its function in pixel_kernels."""

    NONE = 0
    AFFINE = 1
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    HUE = 5
    SHARPNESS = 6
    POSTERIZE = 7
    SOLARIZE = 8
    AUTOCONTRAST = 9
    EQUALIZE = 10


@dataclass(frozen=True)
class Round:
    """One operation on every image of a batch.

    kernels: (n,) int64, a Kernel for each image. parameters: (n, NUM_PARAMETERS) float32, the first ones used.
    """

    kernels: np.ndarray
    parameters: np.ndarray


class PixelDraws:
    """Draws operations and erased boxes: a pure function of config, seed, epoch and sample id."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._spaces: dict[int, Space] = {}  # by the images' side

    def rounds(self, ids: np.ndarray, epoch: int, side: int) -> list[Round]:
        """The operations on uint8 pixels, in their order: auto-augmentation, then colour jitter.

        ids: (n,) integers. side: of the square images, pixels.
        """
        rounds = []
        if self._config.auto_augment != "none":
            if side not in self._spaces:
                self._spaces[side] = Space(self._config.auto_augment, side)
            space = self._spaces[side]
            is_randaugment = self._config.auto_augment == "randaugment"
            for number in range(self._config.randaugment_ops if is_randaugment else 1):
                key = (STREAM_AUTO_AUGMENT, self._seed, epoch, number)
                which, strength, sign = (uniform(ids, *key, draw) for draw in range(3))
                bins = np.floor(strength * _BINS).astype(np.int64)
                if is_randaugment:
                    bins = np.full(len(ids), self._config.randaugment_magnitude)
                operations = np.floor(which * len(space.names)).astype(np.int64)
                rounds.append(space.look_up(operations, bins, sign < 0.5))
        return rounds + self._jitter(ids, epoch)

    def erased(self, ids: np.ndarray, epoch: int, side: int) -> np.ndarray | None:
        """The box that is erased of each image of `side` pixels: top, left, height, width, all 0 for none.

        Returns (n, 4) int64, or None where random erasing is off. As in torchvision, a box of the image's full height
        or width is drawn anew, and after ten tries nothing is erased.
        """
        config, key = self._config, (STREAM_ERASE, self._seed, epoch)
        if config.erase_share == 0.0:
            return None
        boxes = np.zeros((len(ids), 4), dtype=np.int64)
        open_rows = uniform(ids, *key) < config.erase_share
        (low, high), (log_low, log_high) = config.erase_scale, np.log(config.erase_ratio)
        for attempt in range(_TRIES):
            draw = [uniform(ids, *key, attempt, number) for number in range(4)]
            area = side**2 * (low + (high - low) * draw[0])
            ratio = np.exp(log_low + (log_high - log_low) * draw[1])
            box_h = np.round(np.sqrt(area * ratio)).astype(np.int64)
            box_w = np.round(np.sqrt(area / ratio)).astype(np.int64)
            fits = open_rows & (box_h < side) & (box_w < side)
            top = np.floor(draw[2] * (side - box_h + 1)).astype(np.int64)
            left = np.floor(draw[3] * (side - box_w + 1)).astype(np.int64)
            boxes[fits] = np.stack([top, left, box_h, box_w], axis=1)[fits]
            open_rows &= ~fits
            if not open_rows.any():
                break
        return boxes

    def _jitter(self, ids: np.ndarray, epoch: int) -> list[Round]:
        """Every image gets all changes that are on, in an order of its own."""
        kinds = (Kernel.BRIGHTNESS, Kernel.CONTRAST, Kernel.SATURATION, Kernel.HUE)
        used = [(kind, strength) for kind, strength in zip(kinds, self._config.color_jitter, strict=True) if strength]
        if not used:
            return []
        key = (STREAM_JITTER, self._seed, epoch)
        kernels = np.array([kind for kind, _ in used], dtype=np.int64)
        factors = np.empty((len(ids), len(used)))
        for column, (kind, strength) in enumerate(used):
            low, high = (-strength, strength) if kind == Kernel.HUE else (max(0.0, 1.0 - strength), 1.0 + strength)
            factors[:, column] = low + (high - low) * uniform(ids, *key, 0, kind)
        # Sorting random keys gives a uniform permutation.
        order = np.argsort(np.stack([uniform(ids, *key, 1, kind) for kind, _ in used], axis=1), axis=1)
        rounds = []
        for column in order.T:
            parameters = np.zeros((len(ids), NUM_PARAMETERS), dtype=np.float32)
            parameters[:, 0] = factors[np.arange(len(ids)), column]
            parameters[:, 1] = 1.0 - factors[np.arange(len(ids)), column]
            rounds.append(Round(kernels[column], parameters))
        return rounds


class Space:
    """The operations of an auto-augmentation at all their strengths, for square images of `side` pixels.

    kind: randaugment (Cubuk et al. 2020, arXiv:1909.13719) or trivialaugment, in its wide space (Müller and Hutter
    2021, arXiv:2103.10158), with torchvision's names and strengths. Geometric operations interpolate linearly and
    leave black behind, as in torchvision's training references (its classes' own default takes the nearest pixel).
    """

    def __init__(self, kind: str, side: int) -> None:
        is_wide = kind == "trivialaugment"
        shift_px = 32.0 if is_wide else 150.0 / 331.0 * side
        color = 0.99 if is_wide else 0.9
        shear = 0.99 if is_wide else 0.3
        # Operation: its kernel, and the strengths of the first and the last bin.
        operations: dict[str, tuple[Kernel, float, float]] = {
            "Identity": (Kernel.NONE, 0.0, 0.0),
            "ShearX": (Kernel.AFFINE, 0.0, shear),
            "ShearY": (Kernel.AFFINE, 0.0, shear),
            "TranslateX": (Kernel.AFFINE, 0.0, shift_px),
            "TranslateY": (Kernel.AFFINE, 0.0, shift_px),
            "Rotate": (Kernel.AFFINE, 0.0, 135.0 if is_wide else 30.0),
            "Brightness": (Kernel.BRIGHTNESS, 0.0, color),
            "Color": (Kernel.SATURATION, 0.0, color),
            "Contrast": (Kernel.CONTRAST, 0.0, color),
            "Sharpness": (Kernel.SHARPNESS, 0.0, color),
            "Posterize": (Kernel.POSTERIZE, 8.0, 2.0 if is_wide else 4.0),
            "Solarize": (Kernel.SOLARIZE, 1.0, 0.0),
            "AutoContrast": (Kernel.AUTOCONTRAST, 0.0, 0.0),
            "Equalize": (Kernel.EQUALIZE, 0.0, 0.0),
        }
        self.names = list(operations)
        self._kernels = np.array([kernel for kernel, _, _ in operations.values()], dtype=np.int64)
        self._parameters = np.zeros((len(operations), _BINS, 2, NUM_PARAMETERS), dtype=np.float32)
        for row, (name, (_, first, last)) in enumerate(operations.items()):
            # torchvision's own steps, in float32: a threshold of 204.00001 would not be one of 204.
            for column, magnitude in enumerate(torch.linspace(first, last, _BINS).tolist()):
                for is_negative in (0, 1):
                    values = _parameters(name, magnitude, is_negative == 1, side)
                    self._parameters[row, column, is_negative, : len(values)] = values

    def look_up(self, operations: np.ndarray, bins: np.ndarray, is_negative: np.ndarray) -> Round:
        """The round of given operations (their place in `names`), strengths (0 … 30) and signs, each (n,).

        Posterize and Solarize have no sign, nor have operations without a strength: there it is passed over.
        """
        parameters = self._parameters[operations, bins, is_negative.astype(np.int64)]
        return Round(self._kernels[operations], parameters)


def _parameters(name: str, magnitude: float, is_negative: bool, side: int) -> list[float]:
    """What the kernel of an operation is told. side: of the images, pixels."""
    if name == "Posterize":
        return [256.0 - 2.0 ** (8 - round(magnitude))]  # as a mask of the bits that stay
    if name == "Solarize":
        return [255.0 * magnitude]
    signed = -magnitude if is_negative else magnitude
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return [1.0 + signed, -signed]
    # Matrices from a pixel of the result to the one it is taken from, about the image's centre. Shears leave the top
    # or the left edge where it is.
    turn, shift, half = math.radians(signed % 360.0), float(int(signed)), side / 2
    matrices = {
        "ShearX": [1.0, signed, signed * half, 0.0, 1.0, 0.0],
        "ShearY": [1.0, 0.0, 0.0, signed, 1.0, signed * half],
        "TranslateX": [1.0, 0.0, -shift, 0.0, 1.0, 0.0],
        "TranslateY": [1.0, 0.0, 0.0, 0.0, 1.0, -shift],
        "Rotate": [math.cos(turn), -math.sin(turn), 0.0, math.sin(turn), math.cos(turn), 0.0],
    }
    # Divided as float32, as torchvision does: the last bits count where a pixel lies between two.
    matrix = np.array(matrices.get(name, []), dtype=np.float32)
    in_half_sides: list[float] = (matrix / np.float32(half)).tolist()
    return in_half_sides
