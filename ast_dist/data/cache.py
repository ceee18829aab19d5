"""Decoded images kept in memory, for sets of small images that fit."""

import numpy as np

from ast_dist.data.index import Index
from ast_dist.data_config import DataConfig
from ast_dist.errors import UserError


class DecodedCache:
    """Whole decoded images, kept after their first use.

    images: (num_samples, 3, height, width) uint8; rows that no one asked for take no memory. Threads may fill
    different rows at once; the same row twice gets the same bytes.
    """

    def __init__(self, num_samples: int, height: int, width: int) -> None:
        self.images = np.empty((num_samples, 3, height, width), dtype=np.uint8)
        self._is_filled = np.zeros(num_samples, dtype=bool)

    def get(self, sample_id: int) -> np.ndarray | None:
        """The sample's (3, height, width) uint8 image, or None when it is not there yet."""
        return self.images[sample_id] if self._is_filled[sample_id] else None

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Those of some samples that are not there yet. ids: (n,) int64."""
        return ids[~self._is_filled[ids]]

    def put(self, sample_id: int, image: np.ndarray) -> None:
        """Keep a sample's decoded image."""
        self.images[sample_id] = image
        self._is_filled[sample_id] = True


def make_cache(index: Index, config: DataConfig) -> DecodedCache | None:
    """The cache that `data.cache` asks for: None where it says none, or where auto finds the images too large.

    Raises UserError when `ram` is asked for and the images do not fit, or differ in size.
    """
    if config.cache == "none" or index.num_samples == 0:
        return None
    # Images of one size need at least this; where it is too much, a huge index is not looked through.
    least_mb = index.num_samples * 3 * int(index.height[0]) * int(index.width[0]) / 1e6
    if config.cache == "auto" and least_mb > config.cache_mb:
        return None
    heights, widths = np.asarray(index.height), np.asarray(index.width)
    if not (heights.all() and widths.all()):
        if config.cache == "auto":
            return None
        raise UserError(
            f"{index.root}: data.cache ram needs images of one known size, but the index states none for "
            f"{np.count_nonzero(heights * widths == 0):,} of {index.num_samples:,}. Use --data.cache none, or make "
            "shards: python -m data_prep.make_shards SRC DST"
        )
    uniform = (heights == heights[0]).all() and (widths == widths[0]).all()
    needed_mb = index.num_samples * 3 * int(heights.max()) * int(widths.max()) / 1e6
    if uniform and needed_mb <= config.cache_mb:
        return DecodedCache(index.num_samples, int(heights[0]), int(widths[0]))
    if config.cache == "auto":
        return None
    if not uniform:
        raise UserError(
            f"{index.root}: data.cache ram needs images of one size, but they go from {heights.min()}×{widths.min()} "
            f"to {heights.max()}×{widths.max()} pixels. Use --data.cache none."
        )
    raise UserError(
        f"{index.root}: data.cache ram needs {needed_mb:,.0f} MB a rank, but data.cache_mb allows {config.cache_mb:,}. "
        "Raise --data.cache-mb or use --data.cache none."
    )
