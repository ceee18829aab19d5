"""A folder with one folder of images per class, as torchvision's ImageFolder reads it."""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.image import SUFFIXES
from data_prep.sources.listing import Listing
from data_prep.sources.options import NO_OPTIONS, SourceOptions

# What people call the folder of a split. The split's own name wins; the others count when they are alone.
SPLIT_FOLDERS = {"train": ["train", "training"], "val": ["val", "validation", "valid", "test"]}


@dataclass(frozen=True)
class ReadFile:
    """Reads files below a folder."""

    root: str

    def __call__(self, name: str) -> bytes:
        return Path(self.root, name).read_bytes()


def list_samples(src: str, split: str, options: SourceOptions = NO_OPTIONS, *, stat: bool = True) -> Listing:
    """List `src/CLASS/**/IMAGE`, or `src/SPLIT/CLASS/**/IMAGE` where `src` holds a folder for the split.

    Class numbers follow the sorted names, as in torchvision. stat: as for `list_class_folders`.
    Raises UserError when there is no folder, class or image, when a class is empty, and when it is not clear which
    folder holds the split.
    """
    root = _split_folder(Path(src), split)
    return list_class_folders(root, options.select(class_folders(root)), "imagefolder", stat=stat)


def list_class_folders(root: Path, classes: list[str], source: str, *, stat: bool = True) -> Listing:
    """List `root/CLASS/**/IMAGE` for these classes, numbered in this order.

    Hidden files and folders are passed over, and so are files without an image's extension; links are followed.
    stat: ask for every file's size and time of change; without it both are 0, and no file is looked at.
    Raises UserError when there is no image, when a class is empty, and when links lead nowhere.
    """
    real = root.resolve()
    above = frozenset(_identity(folder) for folder in (real, *real.parents))
    dead: list[str] = []
    names: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    stamps: list[int] = []
    other: Counter[str] = Counter()
    empty: list[str] = []
    for label, name in enumerate(classes):
        before, folder = len(names), str(root / name)
        for entry in _files_below(root / name, above, dead):
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a Path takes longer than the stat below
            if suffix not in SUFFIXES:
                other[suffix or entry.name] += 1
                continue
            names.append(name + entry.path[len(folder) :])
            labels.append(label)
            if stat:
                found = entry.stat()
                sizes.append(found.st_size)
                stamps.append(found.st_mtime_ns)
        if len(names) == before:
            empty.append(name)
    _refuse_dead(root, dead)
    if not names:
        raise UserError(_no_images(root, classes, other))
    if empty:
        raise UserError(
            f"{root / empty[0]}: no image in this class folder ({len(empty)} of {len(classes)} classes are empty). "
            "Add images or remove the folder."
        )
    return Listing(
        format=source,
        classes=classes,
        names=names,
        labels=np.asarray(labels, np.int32),
        sizes=np.asarray(sizes or np.zeros(len(names)), np.int64),
        stamps=np.asarray(stamps or np.zeros(len(names)), np.int64),
        read=ReadFile(str(root)),
        passed_over=dict(other),
    )


def _split_folder(src: Path, split: str) -> Path:
    """The folder whose subfolders are the classes of `split`."""
    if not src.exists():
        raise UserError(f"{src}: no such folder. Name a folder with one folder of images per class.")
    if not src.is_dir():
        raise UserError(f"{src}: a file, but SRC must be a folder with one folder of images per class.")
    known = {folder for folders in SPLIT_FOLDERS.values() for folder in folders}
    folders, dead = _scanned(src)
    _refuse_dead(src, [path for path in dead if Path(path).name in SPLIT_FOLDERS[split]])
    # A class may be called "test", too: a split's folder holds folders, a class's holds images.
    found = [folder for folder in folders if folder in known and subfolders(src / folder)]
    if not found:
        return src
    matching = [folder for folder in SPLIT_FOLDERS[split] if folder in found]
    if split in matching or len(matching) == 1:
        return src / (split if split in matching else matching[0])
    if matching:
        raise UserError(
            f"{src}: {' and '.join(f'{name}/' for name in matching)} could both be the split {split}. "
            f"Name one: {src / matching[0]}"
        )
    raise UserError(
        f"{src}: there is {' and '.join(f'{name}/' for name in found)}, but no folder for the split {split} "
        f"({', '.join(SPLIT_FOLDERS[split])}). Give it one of these names, or name the folder that holds the class "
        f"folders of {split} as SRC."
    )


def subfolders(root: Path) -> list[str]:
    """Sorted names of the folders in a folder, hidden ones left out. Raises UserError when it cannot be listed."""
    return _scanned(root)[0]


def class_folders(root: Path) -> list[str]:
    """As `subfolders`, but a link that leads nowhere is refused: as a class it would change all numbers after it."""
    folders, dead = _scanned(root)
    _refuse_dead(root, dead)
    return folders


def holds_classes(src: Path) -> bool:
    """Whether a folder holds two folders with images, itself or in a folder of a split; one may be of previews."""
    roots = [src, *(src / name for names in SPLIT_FOLDERS.values() for name in names if (src / name).is_dir())]
    return any(len(list(islice(filter(_holds_image, _paths(root)), 2))) == 2 for root in roots)


def _paths(root: Path) -> list[Path]:
    # A split's folder is none of the classes, though images lie below it.
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    return [root / name for name in subfolders(root) if name not in known]


def _holds_image(folder: Path) -> bool:
    return any(Path(entry.name).suffix.lower() in SUFFIXES for entry in _files_below(folder, frozenset(), []))


def _is_dead_link(entry: "os.DirEntry[str]") -> bool:
    """Whether this is a link that leads nowhere: to what is gone, or around to itself."""
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return True
        raise
    return False


def _scanned(root: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders in a folder, and sorted paths of the links that lead nowhere; no hidden ones."""
    try:
        with os.scandir(root) as listing:
            entries = [entry for entry in listing if not entry.name.startswith(".")]
            dead = sorted(entry.path for entry in entries if _is_dead_link(entry))
            return sorted(entry.name for entry in entries if not _is_dead_link(entry) and entry.is_dir()), dead
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror}).") from None


def _refuse_dead(root: Path, dead: list[str]) -> None:
    if dead:
        raise UserError(
            f"{dead[0]}: a link that leads nowhere ({len(dead):,} below {root}). Restore what it points to, or "
            "remove it."
        )


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _files_below(folder: Path, above: frozenset[tuple[int, int]], dead: list[str]) -> Iterator["os.DirEntry[str]"]:
    """Regular files at any depth, sorted by name folder by folder.

    A link to one of the folders `above` (device, inode), or back to one on the way, is not followed. dead: gets the
    paths of the links that lead nowhere.
    """
    try:
        here = _identity(folder)
        if here in above:
            return
        with os.scandir(folder) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}).") from None
    for entry in entries:
        if _is_dead_link(entry):
            dead.append(entry.path)
        elif entry.is_dir():
            yield from _files_below(Path(entry.path), above | {here}, dead)
        elif entry.is_file():
            yield entry


def _no_images(root: Path, classes: list[str], other: Counter[str]) -> str:
    if classes:
        found = ", ".join(f"{count:,} × {suffix}" for suffix, count in other.most_common(3))
        return (
            f"{root}: {len(classes)} class folders, but no image in them{f' (found {found})' if found else ''}. "
            f"Images end in {', '.join(sorted(SUFFIXES))}. Is SRC something else, say what: --format"
        )
    loose = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
    if loose:
        return f"{root}: {loose:,} images, but no class folders. Put each class's images into a folder of its name."
    return f"{root}: empty. Name a folder with one folder of images per class."
