"""Counter-based random numbers: a draw is a pure function of its key, never of who draws it or when.

That is what makes order, augmentation and dithering independent of rank, worker, prefetch depth and restarts.
The mixer is splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), applied once per key word. NumPy's own generators are not used for anything that must be
reproduced, since NumPy does not promise the same stream across versions (NEP 19).
"""

import numpy as np

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1

# One purpose, one stream: two draws for the same sample and epoch must not be correlated.
STREAM_ORDER = 1
STREAM_CROP = 2
STREAM_FLIP = 3
STREAM_KEEP = 4
STREAM_DITHER = 5
STREAM_CONVERT = 6
STREAM_INIT = 7
STREAM_MIX = 8
STREAM_WORKER = 9
STREAM_SHARDS = 10
STREAM_AUTO_AUGMENT = 11
STREAM_JITTER = 12
STREAM_ERASE = 13


def _mix_int(value: int) -> int:
    value = (value + GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def hash_key(*words: int) -> int:
    """Hash integers to one 64-bit integer, in [0, 2^64)."""
    state = 0
    for word in words:
        state = _mix_int(state ^ (int(word) & _MASK))
    return state


def hash_ids(ids: np.ndarray, *words: int) -> np.ndarray:
    """Hash sample ids under a key.

    ids: (N,) integers. words: the key, for instance (stream, seed, epoch).
    Returns (N,) uint64, the same for an id whatever else is in `ids`.
    """
    with np.errstate(over="ignore"):
        value = np.asarray(ids).astype(np.uint64) ^ np.uint64(hash_key(*words))
        value = value + np.uint64(GAMMA)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
        value = (value ^ (value >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
        return value ^ (value >> np.uint64(31))


def uniform(ids: np.ndarray, *words: int) -> np.ndarray:
    """Draw one number in [0, 1) per id under a key. Returns (N,) float64 with 53 random bits."""
    return (hash_ids(ids, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
