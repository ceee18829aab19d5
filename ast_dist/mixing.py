"""Mixup and CutMix: a step trains on blends of two samples, drawn by counter, so that a resumed run draws the same.

The pairs are made within a rank's share of the batch, which costs no communication; which samples meet therefore
depends on the number of ranks, and so do the weights, unlike all else in a step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ast_dist.config import OptimConfig
from ast_dist.counter_rng import STREAM_MIX, uniform

_TRIES = 256


@dataclass(frozen=True)
class Mix:
    """How one step is mixed, alike on all ranks.

    own_share: weight of a row's own label, λ in both papers; its partner's label weighs the rest. box: top, left,
    bottom and right (pixels, the last two exclusive) of what the partner's image replaces; None blends the images.
    """

    own_share: float
    box: tuple[int, int, int, int] | None = None

    def images(self, images: Tensor, partners: Tensor) -> Tensor:
        """Mix images with their partners. images: (n, 3, H, W) floating. partners: (n,) int64 rows. Returns a copy."""
        if self.box is None:
            # Zhang et al. 2018 (arXiv:1710.09412), section 2: x̃ = λ·x + (1 - λ)·x'.
            mixed = images * self.own_share
            return mixed.add_(images[partners], alpha=1.0 - self.own_share)
        top, left, bottom, right = self.box
        mixed = images.clone()
        # Yun et al. 2019 (arXiv:1905.04899), equation 1: x̃ = M ⊙ x + (1 - M) ⊙ x'.
        mixed[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        return mixed

    def losses(self, own: Tensor, partners: Tensor) -> Tensor:
        """Mix the losses against a row's own label and its partner's, which is the loss of the mixed label.

        own, partners: (n,) floating. Returns (n,).
        """
        return self.own_share * own + (1.0 - self.own_share) * partners


def pair(is_active: Tensor) -> Tensor:
    """Each row's partner: the next active row, the first one for the last. Without waiting for the device.

    is_active: (n,) bool; a row where it is False is nobody's partner, and its own. Returns (n,) int64.
    """
    rows = torch.arange(len(is_active), device=is_active.device)
    active_first = torch.argsort((~is_active).to(torch.int8), stable=True)
    count = is_active.sum().clamp_min(1)
    place = torch.cumsum(is_active.to(torch.int64), dim=0)  # one past a row's own among the active ones
    return torch.where(is_active, active_first[place % count], rows)


class Mixer:
    """Draws which steps are mixed, and how: a pure function of seed, epoch and step.

    A share `mix_share` of the steps is mixed, the others not at all: those give the gate scores of whole samples. A
    mixed step is a mixup or, where both are on, by equal chances a CutMix.
    """

    def __init__(self, config: OptimConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self.is_on = config.mix_share > 0 and max(config.mixup_alpha, config.cutmix_alpha) > 0

    def mixed_steps(self, epoch: int, steps: np.ndarray) -> np.ndarray:
        """Which of an epoch's steps are mixed. steps: (S,) their numbers. Returns (S,) bool."""
        if not self.is_on:
            return np.zeros(len(steps), dtype=bool)
        return uniform(steps, STREAM_MIX, self._seed, epoch) < self._config.mix_share

    def whole_share(self, epoch: int, num_samples: int, global_batch_size: int) -> float:
        """Share of an epoch's `num_samples` planned samples that steps without mixing train."""
        steps = np.arange(-(-num_samples // global_batch_size))
        sizes = np.minimum(num_samples - steps * global_batch_size, global_batch_size)
        return float(sizes[~self.mixed_steps(epoch, steps)].sum()) / num_samples

    def draw(self, epoch: int, step: int, image_size: int) -> Mix | None:
        """How a step on images of `image_size` pixels a side is mixed; None where it is not."""
        if not self.mixed_steps(epoch, np.array([step])).item():
            return None
        key = (STREAM_MIX, self._seed, epoch, step)
        which, row, column = uniform(np.arange(3), *key).tolist()
        mixup, cutmix = self._config.mixup_alpha, self._config.cutmix_alpha
        if mixup > 0 and (cutmix == 0 or which < 0.5):
            return Mix(draw_beta(mixup, *key))
        return _cut(draw_beta(cutmix, *key), row, column, image_size)


def draw_beta(alpha: float, *key: int) -> float:
    """A draw from Beta(alpha, alpha) under a key, in [0, 1]. alpha: above 0, up to about 4.

    By rejection from pairs of uniform numbers (Jöhnk 1964, "Erzeugung von betaverteilten und gammaverteilten
    Zufallszahlen", Metrika 8); in logarithms, because u^(1/alpha) underflows for a small alpha.
    """
    first = 3  # counters below are the caller's
    while True:
        draws = uniform(np.arange(first, first + 2 * _TRIES), *key).reshape(2, _TRIES)
        log_u, log_v = np.log(1.0 - draws) / alpha  # 1 - u lies in (0, 1]
        log_sum = np.logaddexp(log_u, log_v)
        accepted = np.flatnonzero(log_sum <= 0.0)
        if len(accepted):
            return float(np.exp(log_u - log_sum)[accepted[0]])
        first += 2 * _TRIES


def _cut(own_share: float, row: float, column: float, image_size: int) -> Mix:
    """A box of the area 1 - own_share around a point, cut off at the image's edge; the labels follow the area left.

    row, column: of the box's centre, in [0, 1). Equation 2 of the paper; clipping as in its authors' code.
    """
    half = int(image_size * (1.0 - own_share) ** 0.5) // 2
    middle = (int(row * image_size), int(column * image_size))
    top, left = (max(0, at - half) for at in middle)
    bottom, right = (min(image_size, at + half) for at in middle)
    area = (bottom - top) * (right - left)
    return Mix(1.0 - area / image_size**2, (top, left, bottom, right))
