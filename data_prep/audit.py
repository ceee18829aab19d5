"""One shard held against its manifest, its index and DALI's index."""

import hashlib
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.data.checksum import crc32
from ast_dist.data.index import FIELDS, KEYS_NAME, load_field
from data_prep.dali_index import Member, dali_index
from data_prep.facts import WIDE_PNG
from data_prep.image import DamagedImage, decode_rgb
from data_prep.pool import advance, counted
from data_prep.tar import bytes_behind_end


@dataclass(frozen=True)
class ShardAudit:
    """What a shard should be.

    root: the split's folder. data_root: the folder that the shard's name starts from. number: the shard's.
    manifest_entry: its name, bytes and sha256, as the manifest states them. rows: ids of its samples; None when the
    index cannot be read. num_samples, num_classes: of the whole split. decode: decode every image, too.
    """

    root: Path
    data_root: Path
    number: int
    manifest_entry: dict[str, Any]
    rows: range | None
    num_samples: int
    num_classes: int
    decode: bool


@dataclass
class ShardFaults:
    """What a shard is. faults: one line each. keys: of the samples found in the tar."""

    faults: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def audit_shard(task: ShardAudit) -> ShardFaults:
    """Read one shard whole and list what is wrong with it."""
    found = ShardFaults()
    path = task.data_root / task.manifest_entry["name"]
    if not check_file(path, task.manifest_entry, found):
        return found
    members, labels = _members(path, found)
    _check_dali_index(path, members, found)
    if task.rows is not None:
        _check_samples(task, path, task.rows, members, labels, found)
    return found


def check_file(path: Path, stated: dict[str, Any], found: ShardFaults) -> bool:
    """Hold a shard's size and SHA-256 against its entry in the manifest. Returns whether it is there."""
    if not path.is_file():
        found.faults.append(f"missing; the manifest states {stated['bytes']:,} bytes")
        return False
    size = path.stat().st_size
    if size != stated["bytes"]:
        found.faults.append(f"has {size:,} bytes, but the manifest states {stated['bytes']:,}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != stated["sha256"]:
        found.faults.append(f"SHA-256 is {digest[:16]}…, but the manifest states {stated['sha256'][:16]}…")
    return True


def _members(path: Path, found: ShardFaults) -> tuple[list[Member], dict[str, bytes]]:
    """What a reader of tars finds, up to the first fault, and the contents of each sample's .cls."""
    members: list[Member] = []
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                member = Member(info.name, info.offset_data, info.size)
                members.append(member)
                if member.extension == "cls":
                    content = tar.extractfile(info)
                    labels[member.key] = content.read() if content else b""
            if behind := bytes_behind_end(path, tar.offset):
                found.faults.append(f"{behind}, where readers stop")
    except (tarfile.TarError, EOFError, OSError) as error:
        after = f"after {members[-1].name}" if members else "at its start"
        found.faults.append(f"the tar cannot be read {after} ({error})")
    found.keys = list(dict.fromkeys(member.key for member in members))
    return members, labels


def _check_dali_index(path: Path, members: list[Member], found: ShardFaults) -> None:
    idx = path.with_suffix(".idx")
    if not idx.is_file():
        found.faults.append(f"{idx.name} is missing")
        return
    there, expected = idx.read_bytes().splitlines(), dali_index(members).encode("ascii", "replace").splitlines()
    if there == expected:
        return
    lines = max(len(there), len(expected))
    wrong = [n for n in range(lines) if there[n : n + 1] != expected[n : n + 1]]
    found.faults.append(
        f"{idx.name} differs from the tar in {len(wrong):,} of {lines:,} lines, the first is line {wrong[0] + 1}"
    )


def _check_samples(
    task: ShardAudit, path: Path, rows: range, members: list[Member], labels: dict[str, bytes], found: ShardFaults
) -> None:
    names = [*FIELDS, KEYS_NAME]
    fields = {name: load_field(task.root, name, task.num_samples)[rows.start : rows.stop] for name in names}
    if np.any(fields["shard"] != task.number):
        found.faults.append(f"index/shard.npy: samples {rows.start} to {rows.stop - 1} are not all in this shard")
    images = {member.key: member for member in members if member.extension != "cls"}
    beyond: list[str] = []
    unlisted: list[str] = []
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        for row in range(len(rows)):
            advance()
            key = bytes(fields[KEYS_NAME][row]).decode("ascii", "replace")
            offset, size, label = (int(fields[name][row]) for name in ("offset", "size", "label"))
            sample = f"sample {rows[row]} ({key})"
            if offset < 0 or size < 0 or offset + size > end:
                beyond.append(sample)
                continue
            fault = fault_of_bytes(os.pread(file.fileno(), size, offset), fields, row, task.decode)
            member = images.pop(key, None)
            if fault:
                found.faults.append(f"{sample}: {fault}")
            elif member is None:
                unlisted.append(sample)
            elif (member.offset, member.size) != (offset, size):
                found.faults.append(
                    f"{sample}: the index states {size:,} bytes at {offset:,}, the tar {member.size:,} at "
                    f"{member.offset:,}"
                )
            elif labels.get(key) != str(label).encode("ascii"):
                in_tar = labels[key].decode("ascii", "replace") if key in labels else "none"
                found.faults.append(f"{sample}: the index states label {label}, the tar {in_tar}")
            elif not 0 <= label < task.num_classes:
                found.faults.append(f"{sample}: label {label}, but there are {task.num_classes} classes")
    if beyond:
        found.faults.append(f"{counted(len(beyond), 'sample')} beyond the file's end at {end:,}: {ends(beyond)}")
    if unlisted:
        listed = f"ends with {members[-1].name}" if members else "is empty"
        found.faults.append(
            f"{counted(len(unlisted), 'sample')} missing in the tar's listing, which {listed}: {ends(unlisted)}"
        )
    known = {bytes(key).decode("ascii", "replace") for key in fields[KEYS_NAME]}
    unknown = [key for key in images if key not in known]
    if unknown:
        found.faults.append(
            f"{counted(len(unknown), 'sample')} of the tar missing in the index, the first is {unknown[0]}"
        )


def ends(names: list[str]) -> str:
    """The first and the last of some names."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def fault_of_bytes(data: bytes, fields: dict[str, np.ndarray], row: int, decode: bool) -> str:
    """What is wrong with a sample's bytes; empty when nothing is."""
    found, stated = crc32(data), int(fields["crc32"][row])
    if found != stated:
        return f"damaged, CRC-32 is {found:08x}, but the index states {stated:08x}"
    if decode:
        try:
            height, width = decoded_size(data)
        except DamagedImage as error:
            return f"cannot be decoded ({error})"
        if (height, width) != (int(fields["height"][row]), int(fields["width"][row])):
            return f"{width}×{height} pixels, but the index states {fields['width'][row]}×{fields['height'][row]}"
    return ""


def decoded_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as training decodes it, pixels. Raises DamagedImage where training would refuse."""
    pixels = decode_rgb(data)
    if pixels.dtype != np.uint8:
        raise DamagedImage(WIDE_PNG)
    return pixels.shape[0], pixels.shape[1]
