"""Data that stay where they are: only the index and the manifest are written.

Two kinds: WebDataset tars, read once to find what is in them, and loose files, named but not opened. SRC is only ever
read, so it may be a read-only mount. Where the tars lie in DST/SPLIT already, the index lands beside them.
"""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist import __version__
from ast_dist.data.index import MANIFEST_NAME, write_index, write_manifest
from ast_dist.errors import UserError
from data_prep.destination import INDEXING, UNFINISHED, held_alone, refuse_foreign, remove_empty
from data_prep.facts import WARNINGS
from data_prep.file_check import CheckedFiles, FilesTask, check_files
from data_prep.pool import counted, run_tasks
from data_prep.shard import FIELDS, DamagedSourceError
from data_prep.sources.imagefolder import ReadFile
from data_prep.sources.listing import Listing
from data_prep.sources.tars import find_tars
from data_prep.splits import difference_of_classes, listing_sha256, other_split, refuse_same_tars
from data_prep.tar_scan import TarRecord, estimated_samples
from data_prep.tar_task import TarTask, index_tar, load_record

SHOWN_DAMAGED = 10
FILES_A_TASK = 1024
MOST_CLASSES = 1_000_000  # beyond it, a number in a .json is somebody's id and no class


@dataclass(frozen=True)
class Settings:
    """What the command was told: `python -m data_prep.make_shards SRC DST --split SPLIT`; folder is DST/SPLIT."""

    src: str
    folder: Path
    split: str
    seed: int
    workers: int


def index_files(settings: Settings, listing: Listing, check: bool) -> None:
    """Write the index of loose files. check: open each one, to learn its size and whether it has an image's header.

    Raises UserError when the listing is not of files, when a name is not UTF-8 or when the folder cannot be written.
    """
    started = time.monotonic()
    folder = settings.folder
    refuse_foreign(folder, INDEXING)
    if not isinstance(listing.read, ReadFile):
        raise UserError(f"{settings.src}: --index-only is for files in folders. Convert it without that option.")
    root = os.path.abspath(listing.read.root)  # noqa: PTH100 - links stay: what they lead to may change
    count = len(listing.names)
    fields: dict[str, np.ndarray] = {name: np.zeros(count, np.int64) for name in ("shard", *FIELDS)}
    fields["label"] = listing.labels
    keys = _encoded(listing.names, root)
    damaged: list[tuple[str, str]] = []
    unusual: Counter[str] = Counter()
    with held_alone(folder, INDEXING) as created:
        try:
            _remove_stale(folder)
            if check:
                checked = _check_files(settings, root, listing.names)
                damaged = [pair for part in checked for pair in part.damaged]
                for part in checked:
                    unusual.update(part.unusual)
                for name in ("size", "height", "width"):
                    fields[name] = np.concatenate([getattr(part, name) for part in checked])
                whole = fields["size"] > 0
                fields, keys = {name: values[whole] for name, values in fields.items()}, keys[whole]
                _refuse_lost_class(settings, listing, fields["label"], damaged)
            manifest = _manifest(settings, listing.format, listing.classes, len(keys), damaged, unusual)
            manifest |= {"layout": "files", "data_root": root, "shards": []}
            manifest["listing_sha256"] = listing_sha256(listing, in_place=True)
            _finish(folder, fields, keys, manifest)
        except BaseException:
            _remove_own(folder, created)
            raise
    _report(settings, manifest, f"files below {root}", time.monotonic() - started, count)


def index_tars(settings: Settings, class_names: Path | None) -> None:
    """Write the index of WebDataset tars.

    class_names: file with a class a line, by number; without it the other split's are taken, or else the numbers.
    Raises UserError as `find_tars` and `scan_tar` do, when a label has no class name, and when the folder cannot be
    written.
    """
    started = time.monotonic()
    folder = settings.folder
    names = _read_class_names(class_names) if class_names else None
    tars = find_tars(settings.src, settings.split)
    refuse_same_tars(settings.src, folder, tars)
    _refuse_unnamed(settings, names)
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    is_beside = folder.exists() and root.resolve() == folder.resolve()
    if not is_beside:
        refuse_foreign(folder, INDEXING)
    elif (folder / UNFINISHED).exists() or ((folder / "index").exists() and not (folder / INDEXING).is_dir()):
        raise UserError(f"{folder}: holds an index, or an unfinished set, beside the tars. Move it away first.")
    with held_alone(folder, INDEXING) as created:
        try:
            records, reused = _scan_tars(settings, root, tars)
            labels = np.concatenate([record.fields["label"] for record in records])
            classes = _classes(settings, names, class_names, int(labels.max()))
            damaged = [pair for record in records for pair in record.damaged]
            unusual = sum((Counter(record.unusual) for record in records), Counter[str]())
            manifest = _manifest(settings, "wds", classes, len(labels), damaged, unusual)
            if not is_beside:
                manifest["data_root"] = str(root)
            manifest["shards"] = [
                {"name": record.name, "bytes": record.bytes, "samples": len(record.keys), "sha256": record.sha256}
                for record in records
            ]
            fields = {name: np.concatenate([record.fields[name] for record in records]) for name in FIELDS}
            fields["shard"] = np.repeat(np.arange(len(records)), [len(record.keys) for record in records])
            _finish(folder, fields, np.concatenate([record.keys for record in records]), manifest)
        except BaseException:
            kept = len(list((folder / INDEXING).glob("*.npz")))
            if kept:
                print(
                    f"{settings.split}: {kept} of {counted(len(tars), 'tar')} indexed and kept; the same command goes "
                    "on from there.",
                    file=sys.stderr,
                )
            else:
                _remove_own(folder, created)
            raise
    _report(
        settings, manifest, f"{counted(len(tars), 'tar')} in {root}", time.monotonic() - started, len(labels) - reused
    )
    unused = np.setdiff1d(np.arange(len(classes)), labels)
    if len(unused):
        first = int(unused[0])
        print(f"  classes without a sample: {len(unused):,}, the first is {classes[first]} (number {first})")


def _encoded(names: Sequence[str], root: str) -> np.ndarray:
    try:
        return np.asarray([name.encode() for name in names], np.bytes_)
    except UnicodeEncodeError:
        bad = next(name for name in names if name != name.encode(errors="replace").decode())
        raise UserError(
            f"{root}: the name {bad.encode(errors='surrogateescape')!r} is not UTF-8. Rename that file."
        ) from None


def _check_files(settings: Settings, root: str, names: list[str]) -> list[CheckedFiles]:
    tasks = [FilesTask(root, names[at : at + FILES_A_TASK]) for at in range(0, len(names), FILES_A_TASK)]
    found: dict[int, CheckedFiles] = {}
    run_tasks(
        check_files,
        tasks,
        found.__setitem__,
        workers=settings.workers,
        total=len(names),
        label=settings.split,
        preload=["data_prep.file_check"],
    )
    return [found[number] for number in range(len(tasks))]


def _refuse_lost_class(
    settings: Settings, listing: Listing, labels: np.ndarray, damaged: list[tuple[str, str]]
) -> None:
    before = np.bincount(listing.labels, minlength=len(listing.classes))
    lost = np.flatnonzero((np.bincount(labels, minlength=len(before)) == 0) & (before > 0))
    if len(lost):
        name = listing.classes[int(lost[0])]
        raise DamagedSourceError(
            f"{settings.src}: none of the {before[lost[0]]:,} images of class {name} is whole; of all classes, the "
            f"first damaged file is {damaged[0][0]} ({damaged[0][1]}). Mend them, or remove the class."
        )


def _scan_tars(settings: Settings, root: Path, tars: list[Path]) -> tuple[list[TarRecord], int]:
    """The records of all tars, and how many samples an interrupted run had found already."""
    state = settings.folder / INDEXING
    names = [tar.relative_to(root).as_posix() for tar in tars]
    tasks = [TarTask(tar, name, state / f"{n:06d}.npz") for n, (tar, name) in enumerate(zip(tars, names, strict=True))]
    kept = {number: record for number, task in enumerate(tasks) if (record := load_record(task))}
    _remove_stale(settings.folder, keep={tasks[number].record.name for number in kept})
    if kept:
        print(f"{settings.split}: {len(kept)} of {len(tars)} tars are indexed already", file=sys.stderr)
    records = dict(kept)
    missing = [number for number in range(len(tars)) if number not in kept]

    def keep(position: int, record: TarRecord) -> None:
        records[missing[position]] = record

    run_tasks(
        index_tar,
        [tasks[number] for number in missing],
        keep,
        workers=settings.workers,
        total=_estimated_total([tars[number] for number in missing]),
        label=settings.split,
        preload=["data_prep.tar_task"],
    )
    return [records[number] for number in range(len(tars))], sum(len(record.keys) for record in kept.values())


def _estimated_total(tars: list[Path]) -> int:
    try:
        return estimated_samples(tars[0], sum(tar.stat().st_size for tar in tars)) if tars else 0
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from None


def _read_class_names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path}: cannot be read ({error}).") from None
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "the file is empty"
        raise UserError(f"--class-names {path}: {where}, but each line must hold a class's name, in order of number.")
    return names


def _classes(settings: Settings, names: list[str] | None, path: Path | None, highest: int) -> list[str]:
    """Names for the classes 0 … highest, the same in both splits of a set."""
    if highest >= MOST_CLASSES:
        raise UserError(f"{settings.src}: label {highest:,} is no class number (0 to {MOST_CLASSES - 1:,}).")
    if names is not None and len(names) <= highest:
        raise UserError(f"--class-names {path}: {len(names):,} names, but the highest label is {highest:,}.")
    found = other_split(settings.folder)
    if found is None:
        return names or [str(number) for number in range(highest + 1)]
    other, there = found[0], list(map(str, found[1]["classes"]))
    difference = difference_of_classes(names, there) if names else ""
    if len(there) <= highest or difference:
        raise UserError(
            f"{settings.src}: {len(names) if names else highest + 1:,} classes, but {other} has {len(there):,}, and "
            f"both splits need the same{f'; {difference}' if difference else ''}. Name all of them with --class-names "
            "when you index either."
        )
    return there


def _refuse_unnamed(settings: Settings, names: list[str] | None) -> None:
    """Tars have numbers alone: whether another source numbered its classes alike, only the person knows."""
    found = other_split(settings.folder)
    if names is None and found and found[1].get("source") != "wds":
        raise UserError(
            f"{settings.src}: its labels are numbers, and {found[0]} was not made of tars, so nothing says whether "
            "they mean the same classes. Name them in the order of their numbers with --class-names."
        )


def _manifest(
    settings: Settings,
    source: str,
    classes: list[str],
    count: int,
    damaged: list[tuple[str, str]],
    unusual: Mapping[str, int],
) -> dict[str, Any]:
    return {
        "format_version": 2,
        "converter_version": __version__,
        "split": settings.split,
        "source": source,
        "seed": settings.seed,
        "decode_check": False,
        "resize_short": None,
        "num_samples": count,
        "classes": classes,
        "rewritten": {},
        "unusual": dict(sorted(unusual.items())),
        "damaged": [{"file": name, "reason": reason} for name, reason in damaged],
    }


def _finish(folder: Path, fields: Mapping[str, np.ndarray], keys: np.ndarray, manifest: Mapping[str, Any]) -> None:
    # Where no shard's checksum enters the manifest, its hash says what the data are by the index's.
    checksums = write_index(folder, fields, keys)
    write_manifest(folder, {**manifest, "index_sha256": checksums})
    # After the manifest: a crash above keeps the records, so that no tar is read twice.
    shutil.rmtree(folder / INDEXING)


def _remove_stale(folder: Path, keep: Set[str] = frozenset()) -> None:
    for path in (folder / INDEXING).iterdir():
        if path.name != "lock" and path.name not in keep:
            path.unlink()
    (folder / f"{MANIFEST_NAME}.tmp").unlink(missing_ok=True)
    if (folder / "index").is_dir():
        shutil.rmtree(folder / "index")


def _remove_own(folder: Path, created: list[Path]) -> None:
    """Leave the disk as it was before this run."""
    if not (folder / MANIFEST_NAME).is_file():
        _remove_stale(folder)
        shutil.rmtree(folder / INDEXING)
        remove_empty(created)


def _report(settings: Settings, manifest: Mapping[str, Any], where: str, seconds: float, seen: int) -> None:
    folder, damaged = settings.folder, manifest["damaged"]
    print(
        f"{folder}: {counted(manifest['num_samples'], 'image')}, {len(manifest['classes']):,} classes, an index of "
        f"{where}, {seconds:.1f} s ({seen / seconds:,.0f} images/s)"
    )
    if manifest["unusual"]:
        kinds = ", ".join(f"{count:,} {what} ({WARNINGS[what]})" for what, count in manifest["unusual"].items())
        print(f"  warning: these stay as they are: {kinds}")
    if damaged:
        print(
            f"  left out, since they are damaged or incomplete: {len(damaged):,} (all are in {folder / MANIFEST_NAME})"
        )
    for entry in damaged[:SHOWN_DAMAGED]:
        print(f"    {entry['file']}: {entry['reason']}")
