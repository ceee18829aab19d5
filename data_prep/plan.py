"""What a conversion will write, fixed before the first byte: a pure function of the source and the settings."""

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_dist import __version__
from ast_dist.counter_rng import STREAM_CONVERT, hash_ids
from data_prep.image import DamagedImage, store_image
from data_prep.shard import ShardTask
from data_prep.sources.listing import Listing
from data_prep.tar import RECORD, tar_bytes

KEY_NAME_LENGTH = 60  # with the number in front and the extension behind it stays well below tar's 100
PROBED_IMAGES = 64
# How far the samples of a row group are spread. Measured on a class-sorted set of 4,000 photographs in groups of 100,
# shards of 280, mixed over 1, 8 and all 14 shards: a shard holds 101, 230 and 256 classes, and an image takes 0.2, 0.6
# and 1.0 ms to read. Mixed over all shards, that time grows with the set.
MIXED_SHARDS = 8


@dataclass(frozen=True)
class Plan:
    """The shards of one split.

    tasks: one a shard, in order. planned_bytes: the expected size of each shard's tar. fingerprint: SHA-256 (hex) of
    everything that the shards' bytes depend on; shards of an interrupted run are kept when theirs is the same.
    """

    tasks: list[ShardTask]
    planned_bytes: list[int]
    fingerprint: str


def plan_shards(
    listing: Listing,
    folder: Path,
    unfinished: Path,
    *,
    split: str,
    shard_mb: float,
    resize_short: int | None,
    jpeg_quality: int,
    decode: bool,
    seed: int,
) -> Plan:
    """Order the samples by a seeded permutation and cut that order into shards of about equal bytes.

    folder: where the shards go. unfinished: where they lie while they are written. shard_mb: largest size, 10^6 bytes.
    Every shard holds a random draw of all classes, so reading the shards one after the other is as good as a shuffle;
    of sources that are read in blocks, it is a draw of the blocks that are mixed with each other.
    """
    count = len(listing.names)
    order = _order(listing, seed, int(MIXED_SHARDS * shard_mb * 1e6))
    sizes = listing.sizes[order]
    if resize_short:
        sizes = np.ceil(sizes * _shrinkage(listing, order, resize_short, jpeg_quality)).astype(np.int64)
    ends = np.cumsum(tar_bytes(sizes))
    shards = min(count, max(1, -(-int(ends[-1]) // max(1, int(shard_mb * 1e6)))))
    # Cut at equal shares of the bytes, and where a few large images would leave a shard empty, a sample later.
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shards) / shards, side="left") + 1
    bounds = np.unique(np.concatenate([[0], np.minimum(cuts, count), [count]]))

    width = max(8, len(str(count - 1)))
    tasks, planned = [], []
    for number, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
        rows = order[first:last].tolist()
        tasks.append(
            ShardTask(
                path=folder / f"{split}-{number:06d}.tar",
                unfinished=unfinished,
                read=listing.read,
                names=[listing.names[row] for row in rows],
                labels=listing.labels[rows].tolist(),
                keys=[f"{first + i:0{width}d}-{_slug(listing.names[row])}" for i, row in enumerate(rows)],
                resize_short=resize_short,
                jpeg_quality=jpeg_quality,
                decode=decode,
            )
        )
        planned.append(int(ends[last - 1] - (ends[first - 1] if first else 0)) + RECORD)
    settings = (__version__, listing.format, split, bounds.tolist(), resize_short, jpeg_quality, decode, seed)
    return Plan(tasks, planned, _fingerprint(settings, listing))


def _order(listing: Listing, seed: int, window_bytes: int) -> np.ndarray:
    """The samples, sorted by a hash of (seed, position in the listing).

    Where they are read in blocks, the blocks are drawn first, in the same way, and samples are mixed only among the
    blocks that fill one window; then a shard reads about MIXED_SHARDS times what it holds, whatever the set's size.
    """
    count = len(listing.names)
    drawn = hash_ids(np.arange(count), STREAM_CONVERT, seed)
    if listing.blocks is None:
        return np.argsort(drawn, kind="stable")
    _, first, block, held = np.unique(listing.blocks, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(hash_ids(first, STREAM_CONVERT, seed + 1), kind="stable")
    block_bytes = tar_bytes(listing.sizes[first]) * held
    windows = np.empty(len(first), np.int64)
    windows[order] = (np.cumsum(block_bytes[order]) - 1) // max(1, window_bytes)
    return np.lexsort((drawn, windows[block]))


def _slug(name: str) -> str:
    """A sample's name as part of its key: `airplane/0001.jpg` → `airplane-0001`.

    Keys hold no dot (WebDataset ends a key there), no blank (DALI's index is split at them) and only ASCII.
    """
    stem = re.sub(r"\.\w{1,5}$", "", name)
    return re.sub(r"[^A-Za-z0-9_]+", "-", stem)[-KEY_NAME_LENGTH:].strip("-")


def _shrinkage(listing: Listing, order: np.ndarray, resize_short: int, jpeg_quality: int) -> float:
    """The share of its bytes that an image keeps when it is reduced, on average over the order's first ones."""
    before = after = 0
    for row in order[:PROBED_IMAGES].tolist():
        name = listing.names[row]
        try:
            data = listing.read(name)
            after += len(store_image(data, resize_short, jpeg_quality).data)
            before += len(data)
        except (DamagedImage, OSError):
            continue  # the worker that meets it will say so
    return after / before if before else 1.0


def _fingerprint(settings: tuple[object, ...], listing: Listing) -> str:
    digest = hashlib.sha256(repr((settings, listing.classes)).encode("utf-8", "surrogateescape"))
    for name in listing.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for array in (listing.labels, listing.sizes, listing.stamps):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
