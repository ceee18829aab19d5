"""Loose files that are indexed where they lie: listed without opening one, or asking the file system for its size.

Two layouts: a folder of images per class, and ImageNet as Kaggle has it,

    ILSVRC/Data/CLS-LOC/train/WNID/*.JPEG      labels from the folders, names from ImageSets/CLS-LOC/train_cls.txt
    ILSVRC/Data/CLS-LOC/val/*.JPEG             labels from LOC_val_solution.csv
    LOC_synset_mapping.txt                     the classes

ImageNet's train_cls.txt is read where it is there: on a network mount, one file costs far less than 1,000 folders.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.facts import DECODED_SUFFIXES
from data_prep.sources import imagefolder
from data_prep.sources.imagefolder import ReadFile
from data_prep.sources.listing import Listing

TRAIN_LIST = "ImageSets/CLS-LOC/train_cls.txt"
VAL_LABELS = "LOC_val_solution.csv"
CLASS_NAMES = "LOC_synset_mapping.txt"


def list_files(src: str, split: str) -> Listing:
    """List a split's files in the order that the source names them; sizes and stamps are 0, which stands for unknown.

    The listing's `read` is a ReadFile, whose root the names start from.
    Raises UserError when there are no images, when images need to be stored anew before training can read them, and
    when ImageNet's lists are missing or contradict the folders.
    """
    cls_loc = _cls_loc(Path(src))
    if cls_loc is None:
        listing = imagefolder.list_samples(src, split, stat=False)
    elif split == "train":
        listing = _ilsvrc_train(cls_loc)
    else:
        listing = _ilsvrc_val(cls_loc)
    _refuse_undecoded(listing)
    return listing


def _refuse_undecoded(listing: Listing) -> None:
    others = Counter(suffix for name in listing.names if (suffix := _suffix(name)) not in DECODED_SUFFIXES)
    if others:
        first = next(name for name in listing.names if _suffix(name) in others)
        raise UserError(
            f"{first}: training decodes no {_suffix(first)} ({others.total():,} such files). Convert the set without "
            "--index-only, which stores them as PNG, or move them away."
        )


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _cls_loc(src: Path) -> Path | None:
    """ImageNet's folder CLS-LOC in what somebody named as its place."""
    for path in (src / "ILSVRC/Data/CLS-LOC", src / "Data/CLS-LOC", src / "CLS-LOC", src):
        if path.name == "CLS-LOC" and path.is_dir():
            return path
    return None


def _ilsvrc_train(cls_loc: Path) -> Listing:
    root = cls_loc / "train"
    list_path = cls_loc.parent.parent / TRAIN_LIST
    if not list_path.is_file():
        listing = imagefolder.list_samples(str(root), "train", stat=False)
        classes = _classes(cls_loc) or listing.classes
        labels = _numbers(classes, listing.classes, root)[listing.labels]
        return _listing(root, classes, listing.names, labels, listing.passed_over)
    words = _read(list_path).split()
    stems = words[::2]
    of_sample = [stem.partition("/")[0] for stem in stems]
    classes = _classes(cls_loc) or sorted(set(of_sample))
    labels = _numbers(classes, of_sample, list_path)
    names = [f"{stem}.JPEG" for stem in stems]
    _refuse_missing(root, names, list_path)
    return _listing(root, classes, names, labels)


def _ilsvrc_val(cls_loc: Path) -> Listing:
    root = cls_loc / "val"
    solution = _above(cls_loc, VAL_LABELS)
    if solution is None:
        raise UserError(
            f"{cls_loc}: the labels of val/ stand in {VAL_LABELS}, which is in no folder above. Put it beside ILSVRC/."
        )
    rows = [line.split(",", 1) for line in _read(solution).splitlines()[1:] if line.strip()]
    if bad := next((row for row in rows if len(row) != 2 or not row[1].split()), None):
        raise UserError(f"{solution}: `{','.join(bad)}` is no ImageId,PredictionString. Download the file again.")
    of_sample = [boxes.split()[0] for _, boxes in rows]
    classes = _classes(cls_loc) or sorted(set(of_sample))
    names = [f"{image}.JPEG" for image, _ in rows]
    _refuse_missing(root, names, solution)
    return _listing(root, classes, names, _numbers(classes, of_sample, solution))


def _listing(
    root: Path, classes: list[str], names: list[str], labels: np.ndarray, passed_over: dict[str, int] | None = None
) -> Listing:
    unknown = np.zeros(len(names), np.int64)
    read = ReadFile(str(root))
    return Listing("ilsvrc", classes, names, labels, unknown, unknown, read, passed_over or {})


def _classes(cls_loc: Path) -> list[str] | None:
    """The WordNet ids in sorted order, as a conversion of the same set numbers them."""
    path = _above(cls_loc, CLASS_NAMES)
    if path is None:
        return None
    return sorted(line.split()[0] for line in _read(path).splitlines() if line.strip())


def _above(cls_loc: Path, name: str) -> Path | None:
    folders = [cls_loc, *cls_loc.absolute().parents][:4]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _numbers(wnids: list[str], of_sample: list[str], where: Path) -> np.ndarray:
    number = {wnid: label for label, wnid in enumerate(wnids)}
    try:
        return np.fromiter((number[wnid] for wnid in of_sample), np.int32, len(of_sample))
    except KeyError as error:
        raise UserError(
            f"{where}: {error.args[0]} is none of the {len(wnids):,} classes of {CLASS_NAMES}. Restore the two files."
        ) from None


def _refuse_missing(root: Path, names: list[str], list_path: Path) -> None:
    """Look at three of the files: an index of files that are not there must not be found out by training."""
    if not names:
        raise UserError(f"{list_path}: names no image. Download the file again.")
    for name in (names[0], names[len(names) // 2], names[-1]):
        if not Path(root, name).is_file():
            raise UserError(
                f"{root / name}: missing, though {list_path} names it. Restore the files, or move the list away: then "
                "the folder is listed."
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
