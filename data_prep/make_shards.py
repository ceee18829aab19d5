"""Turn images into shards with an index: `python -m data_prep.make_shards SRC DST --split train`.

SRC is a folder with one folder of images per class (or one that holds such a folder per split: train, val, test), or
the word `digits` for the digits that come with scikit-learn. The shards land in DST/SPLIT; `ast_dist/data/index.py` has
the layout. JPEGs are stored byte for byte; `data_prep/image.py` names the exceptions.

Two runs give the same bytes, whatever the number of workers. A run that was killed leaves finished shards and a folder
`.unfinished`, and no manifest; the same command goes on from there.
"""

import contextlib
import errno
import fcntl
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from ast_dist import __version__
from ast_dist.arguments import parse_arguments
from ast_dist.data.index import MANIFEST_NAME, read_manifest, replaced_file, write_index, write_manifest
from ast_dist.errors import UserError, run_command
from data_prep.plan import Plan, plan_shards
from data_prep.pool import counted, run_tasks
from data_prep.shard import FIELDS, UNFINISHED, DamagedSourceError, ShardRecord, record_path, write_shard
from data_prep.sources import SOURCES, detect_format
from data_prep.sources.listing import Listing

SHOWN_DAMAGED = 10


@dataclass(frozen=True)
class Arguments:
    """Turn images into shards with an index."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Folder with one folder of images per class, or one such folder per split; or the word digits."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """Folder of the shard set; the shards land in DST/SPLIT."""
    split: Literal["train", "val"]
    """Which split to make."""
    format: Literal["auto", "imagefolder", "digits"] = "auto"
    """What SRC is; auto finds out."""
    shard_mb: float = 256.0
    """Largest size of a shard, MB. Each shard is one task, so small sets convert faster in smaller shards."""
    resize_short: Annotated[int | None, arg(metavar="PX")] = None
    """Reduce images whose short side is longer than this, in pixels (Lanczos, JPEG quality 95)."""
    workers: int = 0
    """Worker processes; 0 takes all cores."""
    seed: int = 0
    """Seed of the order in which the samples lie in the shards."""
    decode_check: bool = True
    """Decode every image once and leave out those that fail. Without it, only the headers are read, which is faster."""

    def __post_init__(self) -> None:
        if not 0 < self.shard_mb < float("inf"):
            raise UserError(f"--shard-mb is {self.shard_mb:g}, but must be above 0.")
        if self.resize_short is not None and self.resize_short < 1:
            raise UserError(f"--resize-short is {self.resize_short}, but must be at least 1 pixel.")
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}, but must be at least 0 (0 = all cores).")


def main(argv: list[str]) -> int:
    """Make one split. Returns the exit code 0; raises UserError for what the person can mend."""
    arguments = parse_arguments(Arguments, argv, "python -m data_prep.make_shards")
    folder = arguments.dst / arguments.split
    _refuse_finished(folder)
    source = detect_format(arguments.src) if arguments.format == "auto" else arguments.format
    listing = SOURCES[source](arguments.src, arguments.split)
    _refuse_other_classes(arguments, listing)
    _refuse_foreign(folder)
    if listing.passed_over:
        found = ", ".join(f"{count:,} × {suffix}" for suffix, count in Counter(listing.passed_over).most_common(5))
        print(f"{arguments.split}: files passed over, since they are no images: {found}", file=sys.stderr, flush=True)
    plan = plan_shards(
        listing,
        folder,
        folder / UNFINISHED,
        split=arguments.split,
        shard_mb=arguments.shard_mb,
        resize_short=arguments.resize_short,
        decode=arguments.decode_check,
        seed=arguments.seed,
    )
    _refuse_full_disk(folder, plan)
    started = time.monotonic()
    with _writable(folder) as created:
        try:
            records, reused = _write_shards(folder, arguments, plan)
            manifest = _manifest(arguments, listing, records)
        except DamagedSourceError:
            _remove_own(folder, created, arguments.split)
            raise
        _finish(folder, records, manifest)
    _report(folder, manifest, reused, time.monotonic() - started)
    return 0


def _refuse_finished(folder: Path) -> None:
    if not (folder / MANIFEST_NAME).is_file():
        return
    try:
        manifest, _ = read_manifest(folder)
    except UserError:
        raise UserError(
            f"{folder}: holds a set already, though its {MANIFEST_NAME} cannot be read. Choose another DST, or delete "
            "that folder to make it anew."
        ) from None
    raise UserError(
        f"{folder}: holds a finished set already ({manifest['num_samples']:,} samples in "
        f"{counted(len(manifest['shards']), 'shard')}). Choose another DST, or delete that folder to make it anew."
    )


def _refuse_other_classes(arguments: Arguments, listing: Listing) -> None:
    """Class numbers follow the sorted names, so splits with different classes would disagree on the numbers."""
    for other in {"train", "val"} - {arguments.split}:
        if not (arguments.dst / other / MANIFEST_NAME).is_file():
            continue
        classes = read_manifest(arguments.dst / other)[0]["classes"]
        if classes != listing.classes:
            differing = sorted({*classes} ^ {*listing.classes})
            named = f"; {differing[0]} is in one only" if differing else ""
            raise UserError(
                f"{arguments.src}: the split {arguments.split} has {len(listing.classes)} classes, but "
                f"{arguments.dst / other} has {len(classes)}{named}. Both need the same, since a class's number is its "
                "place among the sorted names."
            )


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / UNFINISHED).is_dir():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: a file, but the shards need a folder there. Choose another DST.")
    held = sorted(path.name for path in folder.iterdir())
    if held:
        raise UserError(
            f"{folder}: holds {len(held):,} files that make_shards did not write ({held[0]}, …). Choose another DST, "
            "or empty that folder."
        )


def _refuse_full_disk(folder: Path, plan: Plan) -> None:
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    kept = _kept_records(folder, plan)
    needed = sum(size for number, size in enumerate(plan.planned_bytes) if number not in kept)
    if needed > shutil.disk_usage(existing).free:
        raise UserError(_disk_full(existing, folder, needed))


def _disk_full(existing: Path, folder: Path, needed_bytes: int) -> str:
    return (
        f"{folder}: the shards still to write need about {needed_bytes:,} bytes, but "
        f"{shutil.disk_usage(existing).free:,} are free. Make room or choose another DST."
    )


def _kept_records(folder: Path, plan: Plan) -> dict[int, ShardRecord]:
    """Shards that an interrupted run of the same plan finished, by number."""
    state = folder / UNFINISHED / "plan"
    if not state.is_file() or state.read_text(encoding="ascii") != plan.fingerprint:
        return {}
    found = {number: ShardRecord.load(record_path(task)) for number, task in enumerate(plan.tasks)}
    return {number: record for number, record in found.items() if record is not None}


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[list[Path]]:
    """Make the split's folder and hold it alone. Yields the folders that were made, innermost first."""
    created = [path for path in [folder, *folder.parents] if not path.exists()]
    unfinished = folder / UNFINISHED
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock = (unfinished / "lock").open("wb")
    except OSError as error:
        _remove_empty(created)
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another DST.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another make_shards is writing there. Wait for it, or choose another DST."
            ) from None
        except OSError:
            pass  # a file system without locks: then nobody but the person can see to it that one run writes
        try:
            _refuse_finished(folder)  # the run that held the lock before may have just finished
        except UserError:
            shutil.rmtree(unfinished)
            raise
        yield created


def _write_shards(folder: Path, arguments: Arguments, plan: Plan) -> tuple[list[ShardRecord], int]:
    """Write what an interrupted run of the same plan has not finished yet.

    Returns the records of all shards, and the number of images that were there already.
    """
    unfinished = folder / UNFINISHED
    kept = _kept_records(folder, plan)
    _remove_stale(folder, arguments.split, {plan.tasks[number].path.stem for number in kept})
    with replaced_file(unfinished / "plan") as file:
        file.write(plan.fingerprint.encode("ascii"))
    if kept:
        print(f"{arguments.split}: {len(kept)} of {len(plan.tasks)} shards are there already", file=sys.stderr)
    records = dict(kept)
    missing = [number for number in range(len(plan.tasks)) if number not in kept]

    def keep(position: int, record: ShardRecord) -> None:
        records[missing[position]] = record

    try:
        run_tasks(
            write_shard,
            [plan.tasks[number] for number in missing],
            keep,
            workers=arguments.workers,
            total=sum(len(plan.tasks[number].names) for number in missing),
            label=arguments.split,
            preload=["data_prep.shard", "webdataset.writer", *(["torchvision.io"] if arguments.decode_check else [])],
        )
    except KeyboardInterrupt:
        print(f"{arguments.split}: {_how_far(records, plan)}; the same command goes on from there.", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = sum(size for number, size in enumerate(plan.planned_bytes) if number not in records)
        raise UserError(
            f"{_disk_full(folder, folder, needed)} {_how_far(records, plan)}; the same command goes on from there."
        ) from None
    return [records[number] for number in range(len(plan.tasks))], sum(len(record.keys) for record in kept.values())


def _how_far(records: dict[int, ShardRecord], plan: Plan) -> str:
    return f"{len(records)} of {len(plan.tasks)} shards are finished and kept"


def _remove_stale(folder: Path, split: str, kept: set[str]) -> None:
    """Remove what a killed run left: temporary files, and shards that have no record of this plan."""
    for path in (folder / UNFINISHED).iterdir():
        if path.name != "lock" and path.stem not in kept:
            path.unlink()
    for path in folder.iterdir():
        if re.fullmatch(rf"{split}-\d{{6,}}\.(tar|idx)", path.name) and path.stem not in kept:
            path.unlink()
    (folder / f"{MANIFEST_NAME}.tmp").unlink(missing_ok=True)
    if (folder / "index").is_dir():
        shutil.rmtree(folder / "index")


def _manifest(arguments: Arguments, listing: Listing, records: list[ShardRecord]) -> dict[str, Any]:
    """What manifest.json states. Raises DamagedSourceError when a class has no sample left."""
    damaged = [{"file": name, "reason": reason} for record in records for name, reason in record.damaged]
    labels = np.concatenate([record.fields["label"] for record in records])
    left = np.bincount(labels, minlength=len(listing.classes))
    if not left.all():
        label = int(np.flatnonzero(left == 0)[0])
        tried = {listing.names[row] for row in np.flatnonzero(listing.labels == label)}
        first = next(entry for entry in damaged if entry["file"] in tried)
        raise DamagedSourceError(
            f"{arguments.src}: no image of class {listing.classes[label]} can be decoded ({len(tried):,} tried); the "
            f"first is {first['file']} ({first['reason']}). Mend them, or remove the class."
        )
    rewritten: Counter[str] = Counter()
    for record in records:
        rewritten.update(record.rewritten)
    return {
        "format_version": 1,
        "converter_version": __version__,
        "split": arguments.split,
        "source": listing.format,
        "seed": arguments.seed,
        "decode_check": arguments.decode_check,
        "resize_short": arguments.resize_short,
        "num_samples": len(labels),
        "classes": listing.classes,
        "shards": [
            {"name": record.name, "bytes": record.bytes, "samples": len(record.keys), "sha256": record.sha256}
            for record in records
        ],
        "rewritten": dict(sorted(rewritten.items())),
        "damaged": damaged,
    }


def _finish(folder: Path, records: list[ShardRecord], manifest: dict[str, Any]) -> None:
    fields = {name: np.concatenate([record.fields[name] for record in records]) for name in FIELDS}
    fields["shard"] = np.repeat(np.arange(len(records)), [len(record.keys) for record in records])
    checksums = write_index(folder, fields, np.concatenate([record.keys for record in records]))
    write_manifest(folder, {**manifest, "index_sha256": checksums})
    # After the manifest: a crash above keeps the records, so that no shard is made twice.
    shutil.rmtree(folder / UNFINISHED)


def _remove_own(folder: Path, created: list[Path], split: str) -> None:
    """Leave the disk as it was before this run."""
    _remove_stale(folder, split, set())
    shutil.rmtree(folder / UNFINISHED)
    _remove_empty(created)


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # not there, or somebody else put something in it meanwhile
            path.rmdir()


def _report(folder: Path, manifest: dict[str, Any], reused: int, seconds: float) -> None:
    count, shards = manifest["num_samples"], manifest["shards"]
    print(
        f"{folder}: {counted(count, 'image')}, {len(manifest['classes']):,} classes, {counted(len(shards), 'shard')}, "
        f"{sum(shard['bytes'] for shard in shards) / 1e6:,.1f} MB, {seconds:.1f} s "
        f"({(count - reused) / seconds:,.0f} images/s)"
    )
    for what, count in manifest["rewritten"].items():
        print(f"  encoded again: {count:,} ({what})")
    damaged = manifest["damaged"]
    if damaged:
        print(f"  left out, since they cannot be decoded: {len(damaged):,} (all are in {folder / MANIFEST_NAME})")
    for entry in damaged[:SHOWN_DAMAGED]:
        print(f"    {entry['file']}: {entry['reason']}")


if __name__ == "__main__":
    sys.exit(run_command(main))
