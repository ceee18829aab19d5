"""One shard: from the images of a source to a tar, DALI's index and a record of what is inside."""

import hashlib
import json
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ast_dist.data.checksum import crc32
from ast_dist.data.index import replaced_file
from ast_dist.errors import UserError
from data_prep.dali_index import Member, dali_index
from data_prep.image import DamagedImage, store_image
from data_prep.pool import advance
from data_prep.sources.listing import Reader, ReadsTogether
from data_prep.tar import TarWriter, tar_bytes

FIELDS = ("offset", "size", "label", "height", "width", "crc32")


class DamagedSourceError(UserError):
    """The source has too little that can be decoded for a set to be made of it."""


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs for one shard.

    path: the tar's final name. unfinished: folder for what is not complete, on the same file system. read: gives the
    bytes of a name. names, labels, keys: the shard's samples in their order. resize_short, jpeg_quality, decode: see
    `store_image`.
    """

    path: Path
    unfinished: Path
    read: Reader
    names: list[str]
    labels: list[int]
    keys: list[str]
    resize_short: int | None
    jpeg_quality: int
    decode: bool


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard holds.

    damaged: name and reason of each sample left out. rewritten: how many images were changed, by what was done.
    fields: (samples,) arrays of the index, without the shard's number. keys: (samples,) bytes.
    """

    name: str
    bytes: int
    sha256: str
    damaged: list[tuple[str, str]]
    rewritten: dict[str, int]
    fields: dict[str, np.ndarray]
    keys: np.ndarray

    def save(self, path: Path) -> None:
        """Write the record to a file, for a later run that goes on from here."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("fields", "keys")}
        with replaced_file(path) as file:
            arrays: dict[str, Any] = {**self.fields, "keys": self.keys, "record": np.asarray(json.dumps(plain))}
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ShardRecord | None":
        """Read a record; None where there is none, or where it does not belong to the shard beside it."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                plain = json.loads(str(arrays["record"]))
                record = cls(
                    **{**plain, "damaged": [tuple(pair) for pair in plain["damaged"]]},
                    fields={name: arrays[name] for name in FIELDS},
                    keys=arrays["keys"],
                )
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None  # the shard is then made again
        shard = path.parent.parent / record.name
        whole = shard.is_file() and shard.stat().st_size == record.bytes and shard.with_suffix(".idx").is_file()
        return record if whole else None


def record_path(task: ShardTask) -> Path:
    """Where the record of a task's finished shard lies until the whole split is finished."""
    return task.unfinished / f"{task.path.stem}.npz"


def write_shard(task: ShardTask) -> ShardRecord:
    """Write one shard and its .idx; both appear under their names only when they are complete and on disk.

    Samples that cannot be decoded are left out and listed in the record. The bytes depend on the task alone: times,
    owners and modes in the tar are fixed.
    Raises UserError when a source file cannot be read, DamagedSourceError when no sample can be decoded, OSError when
    the disk refuses.
    """
    rows: dict[str, list[int]] = {name: [] for name in FIELDS}
    keys: list[bytes] = []
    members: list[Member] = []
    damaged: list[tuple[str, str]] = []
    rewritten: Counter[str] = Counter()
    temporary = task.unfinished / f"{task.path.name}.tmp"
    read = _opened(task)
    with replaced_file(task.path, temporary) as file:
        hashing = _HashingFile(file)
        tar = TarWriter(hashing)
        for name, label, key in zip(task.names, task.labels, task.keys, strict=True):
            advance()
            try:
                image = store_image(_read(read, name), task.resize_short, task.jpeg_quality, task.decode)
            except DamagedImage as error:
                damaged.append((name, str(error)))
                continue
            if image.rewritten:
                rewritten[image.rewritten] += 1
            cls, at = str(label).encode("ascii"), tar.offset
            files = [(f"{key}.cls", cls), (f"{key}.{image.extension}", image.data)]
            cls_offset, offset = tar.write(files)
            assert tar.offset == at + tar_bytes(len(image.data))
            members += [
                Member(f"{key}.cls", cls_offset, len(cls)),
                Member(f"{key}.{image.extension}", offset, len(image.data)),
            ]
            row = (offset, len(image.data), label, image.height, image.width, crc32(image.data))
            for field, value in zip(FIELDS, row, strict=True):
                rows[field].append(value)
            keys.append(key.encode("ascii"))
        if not keys:
            raise DamagedSourceError(_nothing_left(task, damaged))
        tar.close()
    with replaced_file(task.path.with_suffix(".idx"), temporary) as file:
        file.write(dali_index(members).encode("ascii"))
    record = ShardRecord(
        name=task.path.name,
        bytes=hashing.count,
        sha256=hashing.digest.hexdigest(),
        damaged=damaged,
        rewritten=dict(rewritten),
        fields={name: np.asarray(values, np.int64) for name, values in rows.items()},
        keys=np.asarray(keys, np.bytes_),
    )
    record.save(record_path(task))
    return record


def _opened(task: ShardTask) -> Reader:
    if not isinstance(task.read, ReadsTogether):
        return task.read
    try:
        return task.read.together(task.names, lambda: advance(0))
    except OSError as error:
        raise _unreadable(error, task.names[0]) from None


def _read(read: Reader, name: str) -> bytes:
    try:
        return read(name)
    except OSError as error:
        raise _unreadable(error, name) from None


def _unreadable(error: OSError, name: str) -> UserError:
    # Not a damaged image: another try may succeed, so it must not be left out for good.
    return UserError(
        f"{error.filename or name}: cannot be read ({error.strerror}). Mend it or move it away and run the same "
        "command again."
    )


def _nothing_left(task: ShardTask, damaged: list[tuple[str, str]]) -> str:
    name, reason = damaged[0]
    return (
        f"{task.path.name}: none of its {len(damaged):,} images can be decoded; the first is {name} ({reason}). "
        "Mend SRC, or raise --shard-mb where a shard holds very few images."
    )


class _HashingFile:
    """A file that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.count += len(data)
        self.digest.update(data)
        return self.file.write(data)
