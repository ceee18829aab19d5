"""The index beside the shards: where every sample lies, and what it is.

A split is one folder:

    DST/train/train-000000.tar, train-000000.idx, …    shards (WebDataset) and DALI's own index (wds2idx v1.2)
    DST/train/index/{shard,offset,size,label,height,width,crc32,keys}.npy
    DST/train/manifest.json                            written last: a folder without it is not a finished set

A sample's id is its row, 0 … num_samples - 1, in the order of the shards. Arrays are memory-mapped, so opening
costs the same for a thousand samples and for a billion.

Format 2 is format 1 with two more keys in the manifest, for data that lie elsewhere and stay as they are:

    "data_root"  folder or URL that the shards' names start from; without it, the manifest's own folder
    "layout"     "shards" (as without it), or "files": no shard at all, and each key is a file's name below data_root

Optional keys of any format: "index_sha256" holds the SHA-256 of each file in index/, by its field's name;
"listing_sha256" says which samples a set was made of, to tell two splits of the same samples.

With "files", offset is 0, and size, height, width and crc32 are 0 where they are not known before the file is read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ast_dist.errors import UserError

FORMAT_VERSION = 2  # the newest that is read; sets that need no more are written as the first
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
_FILES_A_SHARD = 4096
KEYS_NAME = "keys"  # WebDataset keys or files' names, UTF-8, fixed width


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
    def layout(self) -> Literal["shards", "files"]:
        return self.manifest.get("layout", "shards")

    @property
    def data_root(self) -> str:
        """Folder or URL that the names of shards or files start from."""
        return self.manifest.get("data_root", str(self.root))

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie behind a URL."""
        return "://" in self.data_root

    @property
    def shard_sizes(self) -> np.ndarray:
        """(S,) int64: samples of each shard. Loose files count as shards of equal size, in the index's order."""
        if self.layout == "files":
            ends = np.arange(_FILES_A_SHARD, self.num_samples + _FILES_A_SHARD, _FILES_A_SHARD)
            return np.diff(np.minimum(ends, self.num_samples), prepend=0)
        return np.array([shard["samples"] for shard in self.manifest["shards"]], np.int64)

    @property
    def location(self) -> str:
        """Where a person finds the set: its URL, or its folder."""
        return self.data_root if self.is_remote else str(self.root)

    @property
    def shard_paths(self) -> list[Path]:
        """The shards' files, in the order of their numbers; where `is_remote`, they are not there."""
        return [Path(self.data_root, shard["name"]) for shard in self.manifest["shards"]]

    def key(self, sample_id: int) -> str:
        """The sample's WebDataset key, for messages."""
        return bytes(self.keys[sample_id]).decode()

    @classmethod
    def open(cls, root: Path | str) -> "Index":
        """Open a finished split and check that every shard is there in full (for remote ones, see `data/remote.py`).

        Raises UserError when the folder, the manifest or a shard is missing, when a shard's size is not the one
        the manifest states, when a field has the wrong length or type, or when the set was written by a newer format.
        """
        root = Path(root)
        manifest, digest = read_manifest(root)
        fields = {name: load_field(root, name, manifest["num_samples"]) for name in [*FIELDS, KEYS_NAME]}
        index = cls(root=root, manifest=manifest, hash=digest, **fields)
        if not index.is_remote:
            index._check_files()
        return index

    def _check_files(self) -> None:
        shards = self.manifest["shards"]
        if not Path(self.data_root).is_dir():
            raise UserError(
                f"{self.data_root}: no such folder, but the index in {self.root} is of data there. Restore it, or run "
                "data_prep.make_shards again."
            )
        if self.layout == "files" and self.num_samples and not (first := Path(self.data_root, self.key(0))).is_file():
            raise UserError(
                f"{first}: missing, the first of {self.num_samples:,} files that the index in {self.root} names. "
                "Restore them, or run data_prep.make_shards again."
            )
        for number, (shard, path) in enumerate(zip(shards, self.shard_paths, strict=True)):
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


def read_manifest(root: Path) -> tuple[dict[str, Any], str]:
    """Read a split's manifest.json. Returns it parsed, and the SHA-256 (hex) of its bytes.

    Raises UserError when the folder or the manifest is missing (naming a split below, if there is one), when it
    is no manifest, or when it was written by a newer format.
    """
    path = root / MANIFEST_NAME
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Make it: python -m data_prep.make_shards SRC {root.parent}")
    if not path.is_file():
        found = sorted(p.parent.name for p in root.glob(f"*/{MANIFEST_NAME}"))
        hint = (
            f"Did you mean {root / found[0]}?"
            if found
            else "Conversion did not finish, or this is not a shard folder: run data_prep.make_shards (again)."
        )
        raise UserError(f"{root}: no {MANIFEST_NAME} in this folder. {hint}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        version = manifest["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: format {version}, but this ast_dist reads up to {FORMAT_VERSION}. Upgrade ast-dist."
            )
        stated, in_shards = manifest["num_samples"], sum(shard["samples"] for shard in manifest["shards"])
        layout = manifest.get("layout", "shards")
        if layout not in ("shards", "files"):
            raise KeyError(f"layout is {layout}")
        if not (manifest["classes"] and all({"name", "bytes", "sha256"} <= {*s} for s in manifest["shards"])):
            raise KeyError("classes or shards are incomplete")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest ({error!r}). Run data_prep.make_shards again.") from None
    if in_shards != stated and layout == "shards":
        raise UserError(
            f"{path}: {stated:,} samples, but its shards hold {in_shards:,}. Run data_prep.make_shards again."
        )
    return manifest, hashlib.sha256(raw).hexdigest()


def field_path(root: Path, name: str) -> Path:
    """Where one field of the index lies."""
    return root / "index" / f"{name}.npy"


def load_field(root: Path, name: str, count: int) -> np.ndarray:
    """Memory-map one field and check its length against the manifest's count, and its type against FIELDS.

    Raises UserError when the file cannot be read or is not what the manifest and FIELDS state.
    """
    path = field_path(root, name)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Run data_prep.make_shards again.") from None
    if array.shape != (count,):
        raise UserError(
            f"{path}: {array.shape[0] if array.ndim == 1 else array.shape} rows, but the manifest states {count:,}. "
            "Run data_prep.make_shards again."
        )
    expected = FIELDS.get(name)
    if array.dtype != expected if expected else array.dtype.kind != "S":
        wanted = np.dtype(expected).name if expected else "bytes"
        raise UserError(f"{path}: values are {array.dtype}, not {wanted}. Run data_prep.make_shards again.")
    return array


def write_index(root: Path, fields: Mapping[str, np.ndarray], keys: Sequence[bytes] | np.ndarray) -> dict[str, str]:
    """Write the index of a split; the counterpart of `load_field`.

    fields: one (N,) array for every name in FIELDS, cast to its dtype. keys: the N samples' WebDataset keys.
    Returns the files' SHA-256 (hex) by field, for the manifest's "index_sha256".
    """
    if fields.keys() != FIELDS.keys():
        raise ValueError(f"fields are {sorted(fields)}, not {sorted(FIELDS)}")
    arrays = {name: np.asarray(fields[name], dtype) for name, dtype in FIELDS.items()}
    arrays[KEYS_NAME] = np.asarray(keys, np.bytes_)
    field_path(root, KEYS_NAME).parent.mkdir(exist_ok=True)
    for name, array in arrays.items():
        with replaced_file(field_path(root, name)) as file:
            np.save(file, array, allow_pickle=False)
    sync_folder(field_path(root, KEYS_NAME).parent)
    return {name: file_sha256(field_path(root, name)) for name in arrays}


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json, which makes the split a finished one: call it last.

    manifest: at least format_version, num_samples, classes (names, by class number) and shards (name, bytes,
    samples and sha256 of each, in the order of their numbers).
    """
    sync_folder(root)  # no crash may leave a manifest beside shards whose names are not on disk yet
    with replaced_file(root / MANIFEST_NAME) as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode("ascii"))
    sync_folder(root)


@contextlib.contextmanager
def replaced_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is complete and on disk.

    temporary: where it is written until then, on the same file system; PATH.tmp unless given. When the block
    raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
