"""Turn images into shards with an index: `python -m data_prep.make_shards SRC DST --split train`.

SRC is a folder with one folder of images per class (or one that holds such a folder per split: train, val, test), or
one of the other sources in `data_prep/sources`: Kaggle's ImageNet, parquet files of the Hugging Face Hub, MNIST's idx
files, `torchvision:NAME`, or `digits` for the digits that come with scikit-learn. The shards land in DST/SPLIT;
`ast_dist/data/index.py` has the layout. JPEGs are stored byte for byte; `data_prep/image.py` names the exceptions.

Two runs give the same bytes, whatever the number of workers. A run that was killed leaves finished shards and a folder
`.unfinished`, and no manifest; the same command goes on from there.
"""

import dataclasses
import errno
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from ast_dist import __version__
from ast_dist.arguments import parse_arguments
from ast_dist.data.index import MANIFEST_NAME, replaced_file, write_index, write_manifest
from ast_dist.errors import UserError, run_command
from data_prep.destination import INDEXING, UNFINISHED, held_alone, refuse_finished, refuse_foreign, remove_empty
from data_prep.image import JPEG_QUALITY
from data_prep.in_place import Settings, index_files, index_tars
from data_prep.plan import Plan, plan_shards
from data_prep.pool import counted, run_tasks
from data_prep.shard import FIELDS, DamagedSourceError, ShardRecord, record_path, write_shard
from data_prep.sources import detect_format, list_samples
from data_prep.sources.files import list_files
from data_prep.sources.listing import Listing
from data_prep.sources.options import ClassFile, SourceOptions
from data_prep.splits import difference_of_classes, listing_sha256, other_split, refuse_same_samples

SHOWN_DAMAGED = 10
LARGEST_SHARD_MB = 1e6
# What decides how images are stored and where a source has them; data that stay where they are have no use for it.
_OF_CONVERSION = ("shard_mb", "jpeg_quality", "decode_check", "image_column", "label_column", "download_dir")


@dataclass(frozen=True)
class Arguments:
    """Turn images into shards with an index."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Folder with one folder of images per class, or one such folder per split; Kaggle's ImageNet; WebDataset tars;
    parquet files; idx files (MNIST); torchvision:NAME; or the word digits."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """Folder of the shard set; the shards land in DST/SPLIT."""
    split: Literal["train", "val"]
    """Which split to make."""
    format: Literal["auto", "imagefolder", "ilsvrc", "parquet", "idx", "torchvision", "digits", "wds"] = "auto"
    """What SRC is; auto finds out. wds are WebDataset tars, which stay as they are: only an index is written."""
    index_only: bool = False
    """Copy nothing: index files where they lie, in class folders or as Kaggle has ImageNet. They must stay there."""
    check_files: bool = False
    """With --index-only, open every file, to leave out what is no image and to know the sizes beforehand."""
    class_names: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of WebDataset tars: a file with the classes' names, one a line, in the order of their numbers."""
    classes: Annotated[Path | None, arg(metavar="FILE")] = None
    """Take these classes only: one a line, as in the lists of ImageNet-100."""
    shard_mb: float = 256.0
    """Largest size of a shard, MB. Each shard is one task, so small sets convert faster in smaller shards."""
    resize_short: Annotated[int | None, arg(metavar="PX")] = None
    """Reduce images whose short side is longer than this, in pixels (Lanczos)."""
    jpeg_quality: int = JPEG_QUALITY
    """JPEG quality of the images that are encoded again, 1 to 100; all others keep their bytes."""
    workers: int = 0
    """Worker processes; 0 takes all cores."""
    seed: int = 0
    """Seed of the order in which the samples lie in the shards. An index of what is there keeps its order."""
    decode_check: bool = True
    """Decode every image once and leave out those that fail. Without it, only the headers are read, which is faster."""
    image_column: Annotated[str | None, arg(metavar="NAME")] = None
    """Column of parquet files with the images; found where it is image or img."""
    label_column: Annotated[str | None, arg(metavar="NAME")] = None
    """Column of parquet files with the classes; found where it is label, labels or fine_label."""
    download_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where torchvision's data sets lie or are downloaded to (default: ~/.cache/ast_dist/torchvision)."""

    def __post_init__(self) -> None:
        if not 0 < self.shard_mb <= LARGEST_SHARD_MB:
            raise UserError(
                f"--shard-mb is {self.shard_mb:g}, but must be above 0 and at most {LARGEST_SHARD_MB:,.0f}."
            )
        if self.resize_short is not None and self.resize_short < 1:
            raise UserError(f"--resize-short is {self.resize_short}, but must be at least 1 pixel.")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality is {self.jpeg_quality}, but must be from 1 to 100.")
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}, but must be at least 0 (0 = all cores).")
        if self.index_only and self.resize_short is not None:
            raise UserError(
                "--resize-short changes images, but --index-only leaves them as they are. Take one of them."
            )
        if self.check_files and not self.index_only:
            raise UserError("--check-files goes with --index-only; a conversion reads every image anyway.")
        if self.index_only:
            self.refuse_idle("--index-only")

    def refuse_idle(self, why: str) -> None:
        """Refuse options of a conversion that were given, and that `why` leaves without effect. Raises UserError."""
        for field in dataclasses.fields(self):
            if field.name in _OF_CONVERSION and getattr(self, field.name) != field.default:
                option = f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"
                raise UserError(f"{option} has no effect with {why}, which stores nothing anew. Leave it out.")


def main(argv: list[str]) -> int:
    """Make one split. Returns the exit code 0; raises UserError for what the person can mend."""
    arguments = parse_arguments(Arguments, argv, "python -m data_prep.make_shards")
    folder = arguments.dst / arguments.split
    try:
        return _make(arguments, folder)
    except OSError as error:
        if not _says_full(error):
            raise
        raise UserError(
            f"{folder}: the disk is full ({shutil.disk_usage(_existing(folder)).free:,} bytes are free). Make room or "
            "choose another DST, and run the same command again."
        ) from None


def _says_full(error: OSError) -> bool:
    # numpy writes arrays past Python's files and then knows no errno: "4096 requested and 1024 written".
    without_errno = error.errno is None and " requested and " in str(error)
    return without_errno or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _existing(folder: Path) -> Path:
    return next(path for path in [folder, *folder.absolute().parents] if path.exists())


def _make(arguments: Arguments, folder: Path) -> int:
    refuse_finished(folder)
    source = detect_format(arguments.src) if arguments.format == "auto" else arguments.format
    settings = Settings(arguments.src, folder, arguments.split, arguments.seed, arguments.workers)
    if source == "wds":
        _refuse_options_of_others(arguments)
        index_tars(settings, arguments.class_names)
        return 0
    if arguments.class_names is not None:
        raise UserError(f"--class-names is for WebDataset tars; the format {source} has names of its own.")
    refuse_foreign(folder, INDEXING if arguments.index_only else UNFINISHED)
    options = _source_options(arguments)
    if arguments.index_only and source in ("imagefolder", "ilsvrc"):
        listing = options.restrict(list_files(arguments.src, arguments.split, format=arguments.format))
    else:
        listing = list_samples(source, arguments.src, arguments.split, options)
    _refuse_other_classes(arguments, folder, listing)
    refuse_same_samples(arguments.src, folder, listing)
    if listing.passed_over:
        found = ", ".join(f"{count:,} × {suffix}" for suffix, count in Counter(listing.passed_over).most_common(5))
        print(f"{arguments.split}: files passed over, since they are no images: {found}", file=sys.stderr, flush=True)
    if arguments.index_only:
        index_files(settings, listing, arguments.check_files)
        return 0
    plan = plan_shards(
        listing,
        folder,
        folder / UNFINISHED,
        split=arguments.split,
        shard_mb=arguments.shard_mb,
        resize_short=arguments.resize_short,
        jpeg_quality=arguments.jpeg_quality,
        decode=arguments.decode_check,
        seed=arguments.seed,
    )
    _refuse_full_disk(folder, plan)
    started = time.monotonic()
    with held_alone(folder, UNFINISHED) as created:
        try:
            records, reused = _write_shards(folder, arguments, plan)
            manifest = _manifest(arguments, listing, records)
            _finish(folder, records, manifest)
        except (UserError, OSError) as error:
            # Finished shards stay for the next run, unless they can never become a set.
            is_of_use = not isinstance(error, DamagedSourceError) and bool(_kept_records(folder, plan))
            if not is_of_use and not (folder / MANIFEST_NAME).is_file():
                _remove_own(folder, created, arguments.split)
            raise
    _report(folder, manifest, reused, time.monotonic() - started)
    return 0


def _source_options(arguments: Arguments) -> SourceOptions:
    return SourceOptions(
        classes=ClassFile.read(arguments.classes) if arguments.classes else None,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        download_dir=arguments.download_dir,
    )


def _refuse_options_of_others(arguments: Arguments) -> None:
    arguments.refuse_idle(f"the tars of {arguments.src}")
    if arguments.check_files:
        raise UserError(
            f"--check-files opens loose files, but the tars of {arguments.src} are read whole. Leave it out."
        )
    if arguments.resize_short is not None:
        raise UserError(
            f"--resize-short changes images, but the tars of {arguments.src} are only indexed. Leave the option out."
        )
    if arguments.classes is not None:
        raise UserError(f"--classes takes some of the classes, but the tars of {arguments.src} are indexed whole.")


def _refuse_other_classes(arguments: Arguments, folder: Path, listing: Listing) -> None:
    """Splits with other classes, or with the same ones in another order, would disagree on their numbers."""
    found = other_split(folder)
    if found is None:
        return
    other, classes = found[0], found[1]["classes"]
    if difference := difference_of_classes(listing.classes, classes):
        raise UserError(
            f"{arguments.src}: the split {arguments.split} has {len(listing.classes)} classes, but {other} has "
            f"{len(classes)}; {difference}. Both need the same, since a class's number is its place among them."
        )


def _refuse_full_disk(folder: Path, plan: Plan) -> None:
    existing = _existing(folder)
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
            preload=["data_prep.shard", *(["torchvision.io"] if arguments.decode_check else [])],
        )
    except KeyboardInterrupt:
        print(f"{arguments.split}: {_how_far(records, plan)}; the same command goes on from there.", file=sys.stderr)
        raise
    except OSError as error:
        if not _says_full(error):
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
    lost = (left == 0) & (np.bincount(listing.labels, minlength=len(left)) > 0)
    if lost.any():
        label = int(np.flatnonzero(lost)[0])
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
        "listing_sha256": listing_sha256(listing, in_place=False),
        "seed": arguments.seed,
        "decode_check": arguments.decode_check,
        "resize_short": arguments.resize_short,
        "jpeg_quality": arguments.jpeg_quality,
        "num_samples": len(labels),
        "classes": listing.classes,
        **({"class_names": listing.class_names} if listing.class_names else {}),
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
    remove_empty(created)


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
