"""The index beside the shards: where every sample lies, and what it is.

A split is one folder:

    DST/train/train-000000.tar, train-000000.idx, …    shards (WebDataset) and DALI's own index (wds2idx v1.2)
    DST/train/index/{shard,offset,size,label,height,width,crc32,keys}.npy
    DST/train/manifest.json                            written last: a folder without it is not a finished set

A sample's id is its row, 0 … num_samples - 1, in the order of the shards. Arrays are memory-mapped, so opening
costs the same for a thousand samples and for a billion.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
FIELDS: dict[str, type[np.generic]] = {
    "shard": np.int32,  # position in manifest["shards"]
    "offset": np.int64,  # bytes from the start of the shard to the image's first byte
    "size": np.int64,  # bytes of the encoded image
    "label": np.int32,  # class number, 0 … num_classes - 1
    "height": np.int32,  # pixels, as decoded
    "width": np.int32,
    "crc32": np.uint32,  # zlib.crc32 of the encoded bytes
}


@dataclass(frozen=True)
class Index:
    """A finished split, opened for reading.

    root: the split's folder. manifest: the parsed manifest.json. hash: SHA-256 (hex) of the manifest's bytes; it
    covers the shards' checksums, so equal hashes mean equal data. Fields are (N,) arrays, dtypes as in FIELDS.
    """

    root: Path
    manifest: dict[str, Any]
    hash: str
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    height: np.ndarray
    width: np.ndarray
    crc32: np.ndarray
    keys: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.label)

    @property
    def num_classes(self) -> int:
        return len(self.manifest["classes"])

    @property
    def shard_paths(self) -> list[Path]:
        return [self.root / shard["name"] for shard in self.manifest["shards"]]

    def key(self, sample_id: int) -> str:
        """The sample's WebDataset key, for messages."""
        return self.keys[sample_id].decode()

    @classmethod
    def open(cls, root: Path | str) -> "Index":
        """Open a finished split and check that every shard is there in full.

        Raises UserError when the folder, the manifest or a shard is missing, when a shard's size is not the one
        the manifest states, or when the set was written by a newer format.
        """
        root = Path(root)
        manifest_path = root / MANIFEST_NAME
        if not root.is_dir():
            raise UserError(f"{root}: no such folder. Make it: python -m data_prep.make_shards SRC {root.parent}")
        if not manifest_path.is_file():
            found = sorted(p.parent.name for p in root.glob(f"*/{MANIFEST_NAME}"))
            hint = (
                f"Did you mean {root / found[0]}?"
                if found
                else "Conversion did not finish, or this is not a shard folder: run data_prep.make_shards (again)."
            )
            raise UserError(f"{root}: no {MANIFEST_NAME} in this folder. {hint}")
        raw = manifest_path.read_bytes()
        try:
            manifest = json.loads(raw)
            version, shards, count = manifest["format_version"], manifest["shards"], manifest["num_samples"]
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{manifest_path}: not a manifest ({error!r}). Run data_prep.make_shards again.") from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"{manifest_path}: format {version}, but this ast_dist reads up to {FORMAT_VERSION}. Upgrade ast-dist."
            )
        for number, shard in enumerate(shards):
            path = root / shard["name"]
            if not path.is_file():
                raise UserError(
                    f"{path}: shard {number + 1} of {len(shards)} is missing (the manifest states {shard['bytes']:,} "
                    "bytes). Restore the file or run data_prep.make_shards again."
                )
            if path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"{path}: the file has {path.stat().st_size:,} bytes, but the manifest states "
                    f"{shard['bytes']:,}. Restore the file or run data_prep.make_shards again."
                )
        fields = {name: load_field(root, name, count) for name in [*FIELDS, "keys"]}
        return cls(root=root, manifest=manifest, hash=hashlib.sha256(raw).hexdigest(), **fields)


def field_path(root: Path, name: str) -> Path:
    """Where one field of the index lies."""
    return root / "index" / f"{name}.npy"


def load_field(root: Path, name: str, count: int) -> np.ndarray:
    """Memory-map one field and check its length against the manifest's count."""
    path = field_path(root, name)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Run data_prep.make_shards again.") from None
    if len(array) != count:
        raise UserError(
            f"{path}: {len(array):,} rows, but the manifest states {count:,}. Run data_prep.make_shards again."
        )
    return array
