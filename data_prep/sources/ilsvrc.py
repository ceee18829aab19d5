"""ImageNet (ILSVRC 2012) as Kaggle's competition has it.

    LOC_synset_mapping.txt              `n01440764 tench, Tinca tinca`: the 1,000 classes and what people call them
    LOC_val_solution.csv                `ILSVRC2012_val_00048981,n03995372 85 1 499 272 …`: labels, then boxes
    ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10026.JPEG
    ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG        or sorted into class folders, as many people do

The split `val` is the real validation set, never a piece of `train`. The folder `test` has no labels.
"""

import csv
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.image import SUFFIXES
from data_prep.sources.imagefolder import ReadFile, class_folders, list_class_folders
from data_prep.sources.listing import Listing
from data_prep.sources.options import NO_OPTIONS, SourceOptions

SYNSETS = "LOC_synset_mapping.txt"
VAL_LABELS = "LOC_val_solution.csv"


@dataclass(frozen=True)
class IlsvrcPaths:
    """Where ImageNet lies. images: the folder CLS-LOC. synsets, val_labels: the two lists; None where not found."""

    images: Path
    synsets: Path | None
    val_labels: Path | None


def locate(src: str | Path) -> IlsvrcPaths | None:
    """Find ImageNet from the folder that holds `ILSVRC`, from `ILSVRC`, or from `ILSVRC/Data/CLS-LOC`.

    The two lists may lie in any folder from CLS-LOC up to the one that holds ILSVRC. None where `src` is none of these.
    """
    # By its own name first, since a link may lead to a folder of another; `..` has its name only once it is resolved.
    places = [Path(src).absolute(), Path(os.path.realpath(src))]
    below = ["ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ""]
    for images in (place / name for place in places for name in below):
        if images.name == "CLS-LOC" and any((images / split).is_dir() for split in ("train", "val")):
            folders = [images, *images.parents[:3]]
            found = [next((f / name for f in folders if (f / name).is_file()), None) for name in (SYNSETS, VAL_LABELS)]
            return IlsvrcPaths(images, *found)
    return None


def list_samples(src: str, split: str, options: SourceOptions = NO_OPTIONS) -> Listing:
    """List ImageNet's training or validation images, labelled by the sorted WordNet identifiers.

    Raises UserError when a list or a folder is missing, when they disagree, and when an image has no label.
    """
    paths, root = located(src, split)
    synsets = read_synsets(paths)
    classes = options.select(sorted(synsets))
    folders = class_folders(root)
    if split == "train" or folders:
        refuse_unknown(root, folders, synsets)
        _refuse_missing(root, folders, classes)
        listing = list_class_folders(root, classes, "ilsvrc")
    else:
        listing = _list_flat_val(root, paths, synsets, classes)
    return replace(listing, class_names=[synsets[name] for name in classes])


def located(src: str, split: str) -> tuple[IlsvrcPaths, Path]:
    """Where ImageNet lies, and the folder of one split's images. Raises UserError when there is none."""
    paths = locate(src)
    if paths is None:
        raise UserError(
            f"{src}: holds no ILSVRC/Data/CLS-LOC with train/ or val/. Name the folder that Kaggle's archive was "
            "unpacked to, or another --format."
        )
    root = paths.images / split
    if not root.is_dir():
        raise UserError(f"{root}: no such folder, but the split {split} is made of it. Unpack the archive whole.")
    return paths, root


def read_synsets(paths: IlsvrcPaths) -> dict[str, str]:
    """Identifier → what people call the class. Raises UserError when the list is missing or cannot be read."""
    if paths.synsets is None:
        raise UserError(
            f"{_top(paths)}: {SYNSETS} is missing, which names the classes. Unpack it there, or take the folder as it "
            "is: --format imagefolder"
        )
    try:
        lines = paths.synsets.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{paths.synsets}: not UTF-8 (at byte {error.start:,}). Unpack it again.") from None
    synsets = {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line.strip()}
    if not synsets:
        raise UserError(f"{paths.synsets}: names no class. Unpack it again.")
    return synsets


def refuse_unknown(root: Path, folders: list[str], synsets: dict[str, str]) -> None:
    """Raise a UserError unless all folders are called after classes."""
    unknown = sorted({*folders} - {*synsets})
    if unknown:
        raise UserError(
            f"{root / unknown[0]}: not one of the {len(synsets):,} classes in {SYNSETS} ({len(unknown):,} of "
            f"{len(folders):,} folders are not). Move it away, or take all folders as classes: --format imagefolder"
        )


def _refuse_missing(root: Path, folders: list[str], classes: list[str]) -> None:
    missing = sorted({*classes} - {*folders})
    if missing:
        raise UserError(
            f"{root}: no folder for the class {missing[0]} ({len(missing):,} of {len(classes):,} are missing). Unpack "
            "the archive whole, or name the classes that are there: --classes FILE"
        )


def _list_flat_val(root: Path, paths: IlsvrcPaths, synsets: dict[str, str], classes: list[str]) -> Listing:
    label_of = read_val_labels(paths, synsets)
    with os.scandir(root) as entries:
        files = sorted(
            (e for e in entries if not e.name.startswith(".") and Path(e.name).suffix.lower() in SUFFIXES),
            key=lambda e: e.name,
        )
    stems = [Path(entry.name).stem for entry in files]
    unlabelled = [stem for stem in stems if stem not in label_of]
    if unlabelled:
        raise UserError(
            f"{root}: {unlabelled[0]} has no label in {paths.val_labels} ({len(unlabelled):,} of {len(files):,} images "
            f"have none; it labels {len(label_of):,}). Unpack the list again, or move these images away."
        )
    number_of = {name: number for number, name in enumerate(classes)}
    there = set(stems)
    missing = [stem for stem, name in label_of.items() if name in number_of and stem not in there]
    if missing:
        raise UserError(
            f"{root}: {missing[0]} is missing, which {paths.val_labels} labels ({len(missing):,} of {len(label_of):,} "
            "are). Unpack the images again: part of the validation set would give another accuracy."
        )
    kept = [(entry, label_of[stem]) for entry, stem in zip(files, stems, strict=True) if label_of[stem] in number_of]
    stats = [entry.stat() for entry, _ in kept]
    return Listing(
        format="ilsvrc",
        classes=classes,
        names=[entry.name for entry, _ in kept],
        labels=np.asarray([number_of[name] for _, name in kept], np.int32),
        sizes=np.asarray([stat.st_size for stat in stats], np.int64),
        stamps=np.asarray([stat.st_mtime_ns for stat in stats], np.int64),
        read=ReadFile(str(root)),
    )


def read_val_labels(paths: IlsvrcPaths, synsets: dict[str, str] | None) -> dict[str, str]:
    """Image → identifier of its class: the first word of its PredictionString. synsets: None where not known.

    Raises UserError when the list is missing, cannot be read, or names no class that there is.
    """
    path = paths.val_labels
    if path is None:
        raise UserError(
            f"{_top(paths)}: {VAL_LABELS} is missing, which holds the labels of the images in "
            f"{paths.images / 'val'}. Unpack it there."
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if not {"ImageId", "PredictionString"} <= {*(rows.fieldnames or [])}:
                raise UserError(f"{path}: has no columns ImageId and PredictionString. Unpack it again.")
            label_of = {row["ImageId"]: (row["PredictionString"] or "").partition(" ")[0] for row in rows}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no list of labels ({error}). Unpack it again.") from None
    unknown = [image for image, name in label_of.items() if not name or (synsets is not None and name not in synsets)]
    if unknown:
        known = f"one of the {len(synsets):,} classes in {SYNSETS}" if synsets is not None else "a class"
        raise UserError(
            f"{path}: labels {unknown[0]} as {label_of[unknown[0]] or 'nothing'}, which is not {known} "
            f"({len(unknown):,} of {len(label_of):,} labels are not). Unpack both lists again."
        )
    return label_of


def _top(paths: IlsvrcPaths) -> Path:
    """The folder that holds ILSVRC, or what there is of it."""
    parents = paths.images.parents
    return parents[2] if parents[0].name == "Data" and len(parents) > 2 else paths.images
