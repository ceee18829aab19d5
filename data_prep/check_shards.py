"""Verify shards, sample by sample: `python -m data_prep.check_shards DST`.

DST is a split's folder, or one that holds such folders. The index is held against its checksums, and every shard is
read whole: its checksum, its structure as a tar, DALI's .idx, and for every sample of the index the bytes' CRC, the
label and the size of the decoded image. Of data that were indexed where they lie, every tar is held against its index
the same way (it needs no .idx), and every loose file is read, held against what the index knows of it, and decoded.
Prints every fault and ends with exit code 0 when there is none, 1 when there is any, 2 when DST holds no set, or the
folder of its data is not there.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from ast_dist.arguments import parse_arguments
from ast_dist.data.index import FIELDS, KEYS_NAME, MANIFEST_NAME, field_path, file_sha256, load_field, read_manifest
from ast_dist.errors import UserError, run_command
from data_prep.audit import ShardAudit, ShardFaults, audit_shard
from data_prep.audit_in_place import FILES_A_TASK, FilesAudit, audit_files, audit_tar
from data_prep.destination import INDEXING, UNFINISHED
from data_prep.pool import counted, run_tasks


@dataclass(frozen=True)
class Arguments:
    """Verify shards, sample by sample."""

    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """A split's folder, or a folder of splits."""
    workers: int = 0
    """Worker processes; 0 takes all cores."""
    decode: bool = True
    """Decode every image. Without it, checksums still find every byte that changed since the conversion."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}, but must be at least 0 (0 = all cores).")


def main(argv: list[str]) -> int:
    """Check one split or several. Returns the exit code: 0 clean, 1 when anything is damaged.

    Raises UserError when there is no finished set to check.
    """
    arguments = parse_arguments(Arguments, argv, "python -m data_prep.check_shards")
    faults = 0
    for path in sorted(path for state in (UNFINISHED, INDEXING) for path in arguments.dst.glob(f"*/{state}")):
        if not (path.parent / MANIFEST_NAME).is_file():
            print(f"{path.parent}: its conversion did not finish; run data_prep.make_shards again")
            faults += 1
    # All manifests first: a folder that is no set must not be found out after an hour of checking another.
    splits = [(root, read_manifest(root)[0]) for root in _splits(arguments.dst)]
    for root, manifest in splits:
        _refuse_absent_data(root, _data_root(root, manifest))
    for root, manifest in splits:
        check = _check_files if manifest.get("layout") == "files" else _check_split
        found = check(root, manifest, arguments)
        for fault in found:
            print(f"{root}: {fault}")
        verdict = counted(len(found), "fault") if found else "clean"
        left_out = f", {len(manifest['damaged']):,} left out at conversion" if manifest.get("damaged") else ""
        held = (
            f"{manifest['num_samples']:,} samples in {_container(root, manifest)}, {len(manifest['classes']):,} classes"
        )
        print(f"{root}: {held}{left_out}: {verdict}", flush=True)
        faults += len(found)
    return 1 if faults else 0


def _splits(dst: Path) -> list[Path]:
    if dst.is_dir() and not (dst / MANIFEST_NAME).is_file():
        below = sorted(path.parent for path in dst.glob(f"*/{MANIFEST_NAME}"))
        if below:
            return below
    return [dst]  # where this is no set either, reading its manifest says so


def _data_root(root: Path, manifest: dict[str, Any]) -> str:
    return str(manifest.get("data_root", root))


def _refuse_absent_data(root: Path, data_root: str) -> None:
    if "://" in data_root:
        raise UserError(f"{root}: its data lie at {data_root}. Check them where they are local files.")
    if not Path(data_root).is_dir():
        raise UserError(f"{root}: its data lie in {data_root}, but there is no such folder. Mount or restore it.")


def _container(root: Path, manifest: dict[str, Any]) -> str:
    if manifest.get("layout") == "files":
        return f"files below {_data_root(root, manifest)}"
    return counted(len(manifest["shards"]), "shard")


def _check_files(root: Path, manifest: dict[str, Any], arguments: Arguments) -> list[str]:
    """Every fault of a split of loose files, in the order of the samples."""
    readable, faults = _faults_of_index(root, manifest)
    if not readable:
        return faults
    count = manifest["num_samples"]
    audits = [
        FilesAudit(
            root=root,
            data_root=Path(_data_root(root, manifest)),
            rows=range(at, min(at + FILES_A_TASK, count)),
            num_samples=count,
            num_classes=len(manifest["classes"]),
            decode=arguments.decode,
        )
        for at in range(0, count, FILES_A_TASK)
    ]
    found: dict[int, list[str]] = {}
    run_tasks(
        audit_files,
        audits,
        found.__setitem__,
        workers=arguments.workers,
        total=count,
        label=root.name,
        preload=["data_prep.audit_in_place", *(["torchvision.io"] if arguments.decode else [])],
    )
    return faults + [fault for number in range(len(audits)) for fault in found[number]]


def _check_split(root: Path, manifest: dict[str, Any], arguments: Arguments) -> list[str]:
    """Every fault of one split, in the order of the shards."""
    readable, faults = _faults_of_index(root, manifest)
    shards = manifest["shards"]
    ends = np.cumsum([shard["samples"] for shard in shards]).tolist()
    audits = [
        ShardAudit(
            root=root,
            data_root=Path(_data_root(root, manifest)),
            number=number,
            manifest_entry=shard,
            rows=range(end - shard["samples"], end) if readable else None,
            num_samples=manifest["num_samples"],
            num_classes=len(manifest["classes"]),
            decode=arguments.decode,
        )
        for number, (shard, end) in enumerate(zip(shards, ends, strict=True))
    ]
    found: dict[int, ShardFaults] = {}
    run_tasks(
        audit_tar if manifest.get("source") == "wds" else audit_shard,
        audits,
        found.__setitem__,
        workers=arguments.workers,
        total=manifest["num_samples"],
        label=root.name,
        preload=["data_prep.audit_in_place", *(["torchvision.io"] if arguments.decode else [])],
    )
    faults += _repeated_keys(found[number].keys for number in range(len(shards)))
    return faults + [f"{shards[n]['name']}: {fault}" for n in range(len(shards)) for fault in found[n].faults]


def _faults_of_index(root: Path, manifest: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether every field can be read, and what is wrong with them."""
    readable, faults = True, []
    stated = manifest.get("index_sha256", {})
    for name in [*FIELDS, KEYS_NAME]:
        try:
            load_field(root, name, manifest["num_samples"])
        except UserError as error:
            readable = False
            faults.append(str(error).removeprefix(f"{root}/"))
            continue
        if name in stated and (found := file_sha256(field_path(root, name))) != stated[name]:
            faults.append(f"index/{name}.npy: SHA-256 is {found[:16]}…, but the manifest states {stated[name][:16]}…")
    return readable, faults


def _repeated_keys(keys: Iterable[list[str]]) -> list[str]:
    seen = Counter(key for shard in keys for key in shard)
    return [f"key {key} stands for {count} samples" for key, count in seen.items() if count > 1]


if __name__ == "__main__":
    sys.exit(run_command(main))
