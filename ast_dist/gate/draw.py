"""The counter-based numbers of `counter_rng`, drawn on the device that holds the sample ids."""

import torch
from torch import Tensor

from ast_dist.counter_rng import GAMMA, MULTIPLIERS, hash_key


def uniform_on_device(ids: Tensor, *words: int) -> Tensor:
    """Draw one number in [0, 1) per id under a key, the same bits as `counter_rng.uniform`.

    ids: (n,) int64. words: the key, for instance (stream, seed, epoch). Returns (n,) float64 on the ids' device,
    without waiting for it.
    """
    # int64 arithmetic wraps as uint64's does; only the shifts need the sign's copies masked away.
    value = (ids ^ _signed(hash_key(*words))) + _signed(GAMMA)
    value = (value ^ _shifted(value, 30)) * _signed(MULTIPLIERS[0])
    value = (value ^ _shifted(value, 27)) * _signed(MULTIPLIERS[1])
    value = value ^ _shifted(value, 31)
    return _shifted(value, 11).to(torch.float64) * 2.0**-53


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit unsigned number."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)
