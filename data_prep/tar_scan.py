"""One tar that somebody else wrote, read once from front to back: where its samples lie, and what they are.

As plain webdataset sees it: files that follow each other and have the same name up to the first dot of its last part
are a sample, and what has no such name, or starts with a dot or two underscores, is passed over. Where that would
put several images into one sample (`img.001.jpg`, `img.002.jpg`), the name ends at the extension instead.

A sample's image is its .jpg, .jpeg, .png or .webp. Its label is the number in .cls or .cls.txt, else that of the key
label, class, cls or class_index in .json, else a .txt that holds a number and nothing more.
"""

import hashlib
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ast_dist.data.checksum import crc32
from ast_dist.errors import UserError
from data_prep.dali_index import Member
from data_prep.facts import DECODED_SUFFIXES, ImageFacts, image_facts
from data_prep.image import DamagedImage
from data_prep.shard import FIELDS, DamagedSourceError
from data_prep.tar import bytes_behind_end

LARGEST_INCOMPLETE_SHARE = 0.01  # of a tar's samples; more than these are a layout that is not understood
_LABEL_KEYS = ("label", "class", "cls", "class_index")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_PIECE = 1 << 20


@dataclass
class TarRecord:
    """What a tar holds.

    bytes, sha256: of the whole file. damaged: name and reason of each sample left out. unusual: how many images are
    odd, by what they are. fields: (samples,) int64 arrays of the index, without the shard's number. keys: (samples,)
    bytes. modified_ns: the file's time of change before it was read.
    """

    name: str
    bytes: int
    sha256: str
    modified_ns: int
    damaged: list[tuple[str, str]]
    unusual: dict[str, int]
    fields: dict[str, np.ndarray]
    keys: np.ndarray


class _Part(NamedTuple):
    """One file of a sample: an image with its facts or what is wrong with it, a label or what is wrong with it."""

    member: Member
    facts: ImageFacts | None = None
    crc32: int = 0
    label: int | None = None
    fault: str = ""
    is_image: bool = False
    rank: int = 9  # of several labels, the lowest


@dataclass
class _Samples:
    rows: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in FIELDS})
    keys: list[str] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    incomplete: list[tuple[str, str]] = field(default_factory=list)
    unusual: Counter[str] = field(default_factory=Counter)


def scan_tar(path: Path, name: str, on_sample: Callable[[], None]) -> TarRecord:
    """Read a tar once. name: what the record calls it. on_sample: called after each sample.

    Samples whose image has no header, and up to 1 % of the tar's samples that lack an image or a label, are left out
    and listed. Raises UserError when the tar cannot be read, is compressed or ends early, and DamagedSourceError when
    more samples are incomplete or there is none at all.
    """
    found = _Samples()
    try:
        with path.open("rb", buffering=_PIECE) as raw:
            file = _HashedFile(raw)
            modified_ns = path.stat().st_mtime_ns
            _refuse_compressed(path, raw)
            for _, group in itertools.groupby(_parts(path, file), key=lambda part: part.member.key):
                _add_group(list(group), found, name)
                on_sample()
            file.skip_to_end()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    total = len(found.keys) + len(found.damaged) + len(found.incomplete)
    if len(found.incomplete) > LARGEST_INCOMPLETE_SHARE * total:
        first, reason = found.incomplete[0]
        raise DamagedSourceError(
            f"{path}: {len(found.incomplete):,} of {total:,} samples have no image or no label that is understood; the "
            f"first is {first.removeprefix(f'{name}: ')} ({reason}). Labels are numbers in .cls, .cls.txt, .json or "
            ".txt."
        )
    if not found.keys:
        why = f"; the first is {found.damaged[0][0]} ({found.damaged[0][1]})" if found.damaged else ""
        raise DamagedSourceError(f"{path}: none of its {total:,} samples can be used{why}. Move the tar away.")
    return TarRecord(
        name=name,
        bytes=file.position,
        sha256=file.digest.hexdigest(),
        modified_ns=modified_ns,
        damaged=found.damaged + found.incomplete,
        unusual=dict(found.unusual),
        fields={name: np.asarray(values, np.int64) for name, values in found.rows.items()},
        # Keys of tars are for messages, so a name in an unknown encoding is no reason to fail.
        keys=np.asarray([key.encode("utf-8", "replace") for key in found.keys], np.bytes_),
    )


def estimated_samples(path: Path, total_bytes: int) -> int:
    """How many samples tars of so many bytes hold, judged by the first ones of one tar; for the progress alone."""
    keys: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for info in itertools.islice(tar, 300):
                keys.add(Member(info.name, 0, 0).key)
            return max(1, round(total_bytes * len(keys) / max(1, tar.offset)))
    except (tarfile.TarError, OSError):
        return 1  # whoever reads it next says what is wrong


def _parts(path: Path, file: "_HashedFile") -> Iterator[_Part]:
    """What each regular file of the tar is. Reads strictly forward."""
    last = "its start"
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            for info in tar:
                stored = tar.offset - info.offset_data
                member = Member(info.name, info.offset_data, info.size)
                wanted = info.isfile() and not info.issparse() and _is_of_a_sample(member)
                data = file.take(stored, keep=wanted and _role(member.extension) != "other")
                if file.position < tar.offset:
                    raise UserError(
                        f"{path}: {info.name} needs {stored:,} bytes at offset {info.offset_data:,}, but the file ends "
                        f"at {file.position:,}. Fetch the tar again."
                    )
                if wanted:
                    yield _part(member, data[: info.size])
                last = info.name
    except tarfile.TarError as error:
        raise UserError(f"{path}: no tar, or damaged after {last} ({error}). Fetch the tar again.") from None
    # tarfile takes a damaged header for the end. A whole tar ends in zeros, or with its last file.
    if file.last_block.strip(b"\0"):
        raise UserError(
            f"{path}: the header after {last}, at offset {file.position - len(file.last_block):,}, is damaged or cut "
            "short. Fetch the tar again."
        )
    if behind := bytes_behind_end(path, tar.offset):
        raise UserError(
            f"{path}: {behind}, and readers stop there. Were tars joined? Join them with `tar --concatenate`, or index "
            "them apart."
        )


def _is_of_a_sample(member: Member) -> bool:
    base = member.name.rpartition("/")[2] or "."
    return "." in base[1:] and base[0] != "." and not re.search(r"__[^/]*__($|/)", member.name)


def _role(extension: str) -> str:
    """What a file of a sample is by its extension, which starts at the first dot: img.001.CLS.txt is 001.CLS.txt."""
    parts = extension.lower().split(".")
    if f".{parts[-1]}" in DECODED_SUFFIXES:
        return "image"
    if parts[-1] == "cls" or parts[-2:] == ["cls", "txt"]:
        return "cls"
    return parts[-1] if parts[-1] in ("json", "txt") else "other"


def _part(member: Member, data: bytes) -> _Part:
    role = _role(member.extension)
    if role == "image":
        try:
            return _Part(member, image_facts(data), crc32(data), is_image=True)
        except DamagedImage as error:
            return _Part(member, fault=str(error), is_image=True)
    if role == "cls":
        label = _number(data)
        fault = (
            "" if label is not None else f"label {data[:20].decode('ascii', 'replace').strip()!r} is no class number"
        )
        return _Part(member, label=label, fault=fault, rank=0)
    if role == "json":
        return _Part(member, label=_label_of_json(data), rank=1)
    if role == "txt":
        return _Part(member, label=_number(data), rank=2)
    return _Part(member)


def _number(text: bytes) -> int | None:
    number = int(text) if re.fullmatch(rb"\s*[0-9]{1,10}\s*", text) else None
    return number if number is not None and number < 1 << 31 else None


def _label_of_json(data: bytes) -> int | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # the latter for brackets in brackets in brackets
        return None
    if not isinstance(content, dict):
        return None
    for key in _LABEL_KEYS:
        value = content.get(key)
        if isinstance(value, int | str):  # True is no number: its text has no digits
            label = _number(str(value).encode("utf-8", "replace"))
            if label is not None:
                return label
    return None


def _add_group(parts: list[_Part], found: _Samples, tar_name: str) -> None:
    if sum(part.is_image for part in parts) < 2:
        _add_sample(parts[0].member.key, parts, found, tar_name)
        return
    by_stem: dict[str, list[_Part]] = {}
    for part in parts:
        by_stem.setdefault(re.sub(r"(?i)(\.cls\.txt|\.[^./]*)$", "", part.member.name), []).append(part)
    for stem, own in by_stem.items():
        _add_sample(stem, own, found, tar_name)


def _add_sample(key: str, parts: list[_Part], found: _Samples, tar_name: str) -> None:
    images = [part for part in parts if part.is_image]
    labels = sorted((part.rank, part.label) for part in parts if part.label is not None)
    if not images and not labels:
        return  # a file about the set
    where = f"{tar_name}: {key}"
    held = ", ".join(part.member.extension for part in parts)
    if len(images) != 1:
        found.incomplete.append((where, f"{len(images) or 'no'} images among {held}"))
    elif not labels:
        why = next((part.fault for part in parts if part.rank == 0 and part.fault), f"no label among {held}")
        found.incomplete.append((where, why))
    elif images[0].facts is None:
        found.damaged.append((f"{tar_name}: {images[0].member.name}", images[0].fault))
    else:
        image, facts = images[0], images[0].facts
        row = (image.member.offset, image.member.size, labels[0][1], facts.height, facts.width, image.crc32)
        for name, value in zip(FIELDS, row, strict=True):
            found.rows[name].append(value)
        found.keys.append(key)
        if facts.unusual:
            found.unusual[facts.unusual] += 1


def _refuse_compressed(path: Path, raw: BinaryIO) -> None:
    start = raw.read(2)
    raw.seek(0)
    if kind := _COMPRESSED.get(start):
        raise UserError(
            f"{path}: compressed with {kind}, so a sample cannot be read without all before it. Unpack it to a plain "
            ".tar."
        )


class _HashedFile:
    """What tarfile reads from: a file that is hashed as it is read, once and forward only."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.digest, self.last_block = file, 0, hashlib.sha256(), b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.position += len(data)
        self.last_block = data
        return data

    def take(self, size: int, keep: bool) -> bytes:
        """Read `size` bytes, or what is left, and return them if they are to be kept."""
        if keep:
            return self.read(size)
        end = self.position + size
        while self.position < end and self.read(min(_PIECE, end - self.position)):
            pass
        return b""

    def skip_to_end(self) -> None:
        while self.read(_PIECE):
            pass

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        assert position == self.position, "tarfile stands where the last file's bytes end"
