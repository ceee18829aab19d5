"""The two splits of one set held against each other: the same classes in the same order, and not the same samples."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.data.index import MANIFEST_NAME, read_manifest
from ast_dist.errors import UserError
from data_prep.sources.imagefolder import ReadFile
from data_prep.sources.listing import Listing

PROBED_FILES = 4
_PROBED_BYTES = 1 << 16


def other_split(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder and the manifest of the set's other split, where that is finished. folder: DST/train or DST/val."""
    other = folder.parent / ({"train": "val", "val": "train"}[folder.name])
    return (other, read_manifest(other)[0]) if (other / MANIFEST_NAME).is_file() else None


def difference_of_classes(mine: Sequence[str], there: Sequence[str]) -> str:
    """The first class that differs between two splits; empty where none does."""
    if differing := sorted({*mine} ^ {*there}):
        return f"{differing[0]} is in one only"
    for number, (name, other) in enumerate(zip_longest(mine, there)):
        if name != other:
            return f"the order differs: class {number} is {name} here and {other} there"
    return ""


def listing_sha256(listing: Listing, in_place: bool) -> str:
    """What tells the samples of one split from another's, cheaply: SHA-256 (hex) of names, labels and a third thing.

    For loose files that is the folder where they lie if `in_place`, since then none is opened; otherwise the beginning
    of a few of them, so that the same files below another folder count as the same. For other sources it is the sizes.
    """
    digest = hashlib.sha256()
    if not isinstance(listing.read, ReadFile):
        digest.update(np.ascontiguousarray(listing.sizes).tobytes())
    elif in_place:
        digest.update(os.path.realpath(listing.read.root).encode("utf-8", "surrogateescape") + b"\0")
    rows = sorted(range(len(listing.names)), key=listing.names.__getitem__)
    for row in rows:
        digest.update(listing.names[row].encode("utf-8", "surrogateescape") + b"\0")
    digest.update(listing.labels[rows].astype(np.int32).tobytes())
    if isinstance(listing.read, ReadFile) and not in_place:
        for row in rows[:: max(1, len(rows) // PROBED_FILES)][:PROBED_FILES]:
            digest.update(_beginning(Path(listing.read.root, listing.names[row])))
    return digest.hexdigest()


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_PROBED_BYTES)
    except OSError:
        return b""  # whoever reads all of it says what is wrong


def refuse_same_samples(src: str, folder: Path, listing: Listing) -> None:
    """Raise UserError when the other split was made of the samples that this one is to be made of."""
    found = other_split(folder)
    if found is None or "listing_sha256" not in found[1]:
        return
    other, manifest = found
    if listing_sha256(listing, in_place=manifest.get("layout") == "files") == manifest["listing_sha256"]:
        raise UserError(_same(src, folder, other))


def refuse_same_tars(src: str, folder: Path, tars: Sequence[Path]) -> None:
    """Raise UserError when the other split is an index of tars, and any of these is among them."""
    found = other_split(folder)
    if found is None:
        return
    theirs = {path.resolve() for path in _shards(*found)}
    shared = [tar for tar in tars if tar.resolve() in theirs]
    if len(shared) == len(tars):
        raise UserError(_same(src, folder, found[0]))
    if shared:
        raise UserError(
            f"{shared[0]}: in the split {folder.name} and in {found[0]}, as {len(shared):,} of {len(tars):,} tars are. "
            "Name the tars of each split by a pattern."
        )


def _shards(other: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    return (Path(manifest.get("data_root", other), shard["name"]) for shard in manifest["shards"])


def _same(src: str, folder: Path, other: Path) -> str:
    return (
        f"{src}: the samples of the split {folder.name} are those of {other.name}, which {other} holds. Name the "
        "folder of the split."
    )
