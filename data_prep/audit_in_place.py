"""Data that stay where they are, held against their index: tars that somebody else wrote, and loose files."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_dist.data.index import FIELDS, KEYS_NAME, load_field
from ast_dist.errors import UserError
from data_prep.audit import ShardAudit, ShardFaults, check_file, decoded_size, ends, fault_of_bytes
from data_prep.facts import image_facts
from data_prep.image import DamagedImage
from data_prep.pool import advance, counted
from data_prep.tar_scan import TarRecord, scan_tar

FILES_A_TASK = 512


@dataclass(frozen=True)
class FilesAudit:
    """Some rows of an index of loose files.

    root: the split's folder. data_root: what the names start from. rows: ids of the samples. num_samples, num_classes:
    of the whole split. decode: decode every image; otherwise its header is read.
    """

    root: Path
    data_root: Path
    rows: range
    num_samples: int
    num_classes: int
    decode: bool


def audit_files(task: FilesAudit) -> list[str]:
    """Read every file and list what is wrong, one line a sample."""
    fields = _fields(task.root, task.num_samples, task.rows)
    faults = []
    for row, sample_id in enumerate(task.rows):
        advance()
        name = bytes(fields[KEYS_NAME][row]).decode(errors="replace")
        stated = {field: int(fields[field][row]) for field in FIELDS}
        fault = _fault_of_file(task.data_root / name, stated, task.decode)
        if not fault and not 0 <= stated["label"] < task.num_classes:
            fault = f"label {stated['label']}, but there are {task.num_classes} classes"
        if fault:
            faults.append(f"sample {sample_id} ({name}): {fault}")
    return faults


def _fault_of_file(path: Path, stated: dict[str, int], decode: bool) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stated["size"] and len(data) != stated["size"]:
        return f"has {len(data):,} bytes, but the index states {stated['size']:,}"
    try:
        height, width = decoded_size(data) if decode else image_facts(data)[:2]
    except DamagedImage as error:
        return f"cannot be decoded ({error})"
    if stated["height"] and (height, width) != (stated["height"], stated["width"]):
        return f"{width}×{height} pixels, but the index states {stated['width']}×{stated['height']}"
    return ""


def audit_tar(task: ShardAudit) -> ShardFaults:
    """Read one tar whole and list what is wrong with it. Keys may stand for several samples: tars are free in that."""
    found = ShardFaults()
    path = task.data_root / task.manifest_entry["name"]
    if not check_file(path, task.manifest_entry, found):
        return found
    record = None
    try:
        record = scan_tar(path, path.name, lambda: advance(0))
    except UserError as error:
        found.faults.append(str(error).removeprefix(f"{path}: "))
    if task.rows is not None:
        _check_rows(task, path, task.rows, record, found)
    return found


def _check_rows(task: ShardAudit, path: Path, rows: range, record: TarRecord | None, found: ShardFaults) -> None:
    fields = _fields(task.root, task.num_samples, rows)
    if np.any(fields["shard"] != task.number):
        found.faults.append(f"index/shard.npy: samples {rows.start} to {rows.stop - 1} are not all in this shard")
    in_tar = {} if record is None else {int(offset): at for at, offset in enumerate(record.fields["offset"])}
    beyond: list[str] = []
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        for row in range(len(rows)):
            advance()
            offset, size, label = (int(fields[name][row]) for name in ("offset", "size", "label"))
            sample = f"sample {rows[row]} ({bytes(fields[KEYS_NAME][row]).decode(errors='replace')})"
            if offset < 0 or size < 0 or offset + size > end:
                beyond.append(sample)
                continue
            fault = fault_of_bytes(os.pread(file.fileno(), size, offset), fields, row, task.decode)
            at = in_tar.pop(offset, None)
            if not fault and record is not None:
                fault = _difference(record, at, size, label)
            if not fault and not 0 <= label < task.num_classes:
                fault = f"label {label}, but there are {task.num_classes} classes"
            if fault:
                found.faults.append(f"{sample}: {fault}")
    if beyond:
        found.faults.append(f"{counted(len(beyond), 'sample')} beyond the file's end at {end:,}: {ends(beyond)}")
    if record is not None and in_tar:
        first = bytes(record.keys[min(in_tar.values())]).decode(errors="replace")
        found.faults.append(f"{counted(len(in_tar), 'sample')} of the tar missing in the index, the first is {first}")


def _difference(record: TarRecord, at: int | None, size: int, label: int) -> str:
    """What the tar says of a sample and the index does not."""
    if at is None:
        return "no image of the tar begins where the index states"
    sizes, labels = record.fields["size"], record.fields["label"]
    if sizes[at] != size:
        return f"the index states {size:,} bytes, the tar {sizes[at]:,}"
    return f"the index states label {label}, the tar {labels[at]}" if labels[at] != label else ""


def _fields(root: Path, num_samples: int, rows: range) -> dict[str, np.ndarray]:
    return {name: load_field(root, name, num_samples)[rows.start : rows.stop] for name in (*FIELDS, KEYS_NAME)}
