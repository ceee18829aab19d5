"""Loose files that are indexed where they lie: listed without opening one, or asking the file system for its size.

Two layouts: a folder of images per class (`imagefolder`), and ImageNet as Kaggle has it (`ilsvrc`), of which one more
list is read here where it is there:

    ILSVRC/ImageSets/CLS-LOC/train_cls.txt      `n01440764/n01440764_10026 1`: the training images

On a network mount, one file costs far less than 1,000 folders.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.facts import DECODED_SUFFIXES
from data_prep.sources import ilsvrc, imagefolder
from data_prep.sources.ilsvrc import SYNSETS, IlsvrcPaths
from data_prep.sources.imagefolder import ReadFile
from data_prep.sources.listing import Listing, readable

TRAIN_LIST = "ImageSets/CLS-LOC/train_cls.txt"


def list_files(src: str, split: str, *, format: str = "auto") -> Listing:  # noqa: A002 - as the option is called
    """List a split's files in the order that the source names them; sizes and stamps are 0, which stands for unknown.

    format: `imagefolder` or `ilsvrc`; auto finds out. The listing's `read` is a ReadFile, whose root the names start
    from. Raises UserError when there are no images, when images need to be stored anew before training can read them,
    and when ImageNet's lists are missing or contradict the folders.
    """
    with readable(src):
        if format == "ilsvrc" or (format == "auto" and ilsvrc.locate(src)):
            listing = _list_ilsvrc(src, split)
        else:
            listing = imagefolder.list_samples(src, split, stat=False)
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


def _list_ilsvrc(src: str, split: str) -> Listing:
    """The classes are the WordNet ids in sorted order, as a conversion of the same set numbers them."""
    paths, root = ilsvrc.located(src, split)
    synsets = ilsvrc.read_synsets(paths) if paths.synsets else None
    listing = _of_train(paths, root, synsets) if split == "train" else _of_val(paths, root, synsets)
    return replace(listing, class_names=[synsets[name] for name in listing.classes]) if synsets else listing


def _of_train(paths: IlsvrcPaths, root: Path, synsets: dict[str, str] | None) -> Listing:
    list_path = paths.images.parent.parent / TRAIN_LIST
    if not list_path.is_file():
        return _of_folders(root, synsets)
    try:
        stems = list_path.read_text(encoding="utf-8").split()[::2]
    except UnicodeDecodeError as error:
        raise UserError(f"{list_path}: not UTF-8 (at byte {error.start:,}). Unpack it again.") from None
    return _of_list(root, list_path, stems, [stem.partition("/")[0] for stem in stems], synsets)


def _of_val(paths: IlsvrcPaths, root: Path, synsets: dict[str, str] | None) -> Listing:
    label_of = ilsvrc.read_val_labels(paths, synsets) if paths.val_labels else {}
    is_flat = any((root / f"{stem}.JPEG").is_file() for stem in list(label_of)[:1])
    # Whether images are sorted into folders is asked only where the first does not lie flat: the folder is large.
    if not is_flat and imagefolder.class_folders(root):
        return _of_folders(root, synsets)
    label_of = label_of or ilsvrc.read_val_labels(paths, synsets)
    assert paths.val_labels is not None
    return _of_list(root, paths.val_labels, list(label_of), list(label_of.values()), synsets)


def _of_folders(root: Path, synsets: dict[str, str] | None) -> Listing:
    folders = imagefolder.class_folders(root)
    if synsets:
        ilsvrc.refuse_unknown(root, folders, synsets)
    listing = imagefolder.list_class_folders(root, folders, "ilsvrc", stat=False)
    classes = sorted(synsets or folders)
    return replace(listing, classes=classes, labels=_numbers(classes, folders, root)[listing.labels])


def _of_list(
    root: Path, list_path: Path, stems: list[str], of_sample: list[str], synsets: dict[str, str] | None
) -> Listing:
    classes = sorted(synsets or set(of_sample))
    labels = _numbers(classes, of_sample, list_path)
    names = [f"{stem}.JPEG" for stem in stems]
    _refuse_missing(root, names, list_path)
    unknown = np.zeros(len(names), np.int64)
    return Listing("ilsvrc", classes, names, labels, unknown, unknown, ReadFile(str(root)))


def _numbers(classes: list[str], of_sample: list[str], where: Path) -> np.ndarray:
    number = {wnid: label for label, wnid in enumerate(classes)}
    try:
        return np.fromiter((number[wnid] for wnid in of_sample), np.int32, len(of_sample))
    except KeyError as error:
        raise UserError(
            f"{where}: {error.args[0]} is none of the {len(classes):,} classes of {SYNSETS}. Restore the two files."
        ) from None


def _refuse_missing(root: Path, names: list[str], list_path: Path) -> None:
    """Look at three of the files: an index of files that are not there must not be found out by training."""
    if not names:
        raise UserError(f"{list_path}: names no image. Download the file again.")
    for name in (names[0], names[len(names) // 2], names[-1]):
        if not Path(root, name).is_file():
            way_out = ", or move the list away: then the folder is listed" if root.name == "train" else ""
            raise UserError(f"{root / name}: missing, though {list_path} names it. Restore the files{way_out}.")
