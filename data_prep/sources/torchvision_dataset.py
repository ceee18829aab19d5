"""torchvision's data sets by name: `torchvision:CIFAR10`, downloaded by torchvision where they are not there yet.

Where a data set holds image files (Food101, Flowers102, OxfordIIITPet, Imagenette, EuroSAT, …), their own bytes are
taken. Where it holds arrays (CIFAR, MNIST, SVHN, STL10, …), each image is stored as PNG, without loss. Classes have
torchvision's numbers. `train` is the split that torchvision calls train, trainval (OxfordIIITPet) or train-standard
(Places365), `val` the one that it calls val, valid, validation or test, each the first of these that there is. Of a
data set without splits (EuroSAT, Caltech101) a fifth of each class is drawn for `val`, once and for all. A data set
whose parts are told apart by something else (INaturalist, Omniglot, EMNIST) is refused.
"""

import contextlib
import difflib
import functools
import inspect
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.errors import UserError
from data_prep.image import SUFFIXES
from data_prep.sources.digits import val_mask
from data_prep.sources.imagefolder import ReadFile
from data_prep.sources.listing import Listing
from data_prep.sources.options import NO_OPTIONS, SourceOptions, cache_folder
from data_prep.sources.pixels import expected_sizes, png_bytes

PREFIX = "torchvision:"
_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "validation", "test")}
# Arguments by which data sets without `train` and `split` choose a part: what is drawn for val from the part that they
# take by default would be called validation images, although there are others.
_CHOOSES_PART = ("version", "background", "classes", "image_set", "subset", "partition", "fold", "year", "mode")
_UNKNOWN_SPLIT = re.compile(r"Unknown value .* for argument split\b")
# Where torchvision keeps the paths of a data set's files, alone or each with its label, and where the labels.
_PATHS = ("samples", "_samples", "_image_files", "_images", "imgs")
_LABELS = ("targets", "labels", "_labels", "y")


@dataclass(frozen=True)
class ReadDataset:
    """Gives a data set's images as PNG; a name ends in the image's position. arguments: those it is opened with."""

    name: str
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, name: str) -> bytes:
        image, _ = _open(self.name, self.arguments)[int(name.rpartition("/")[2].removesuffix(".png"))]
        return png_bytes(image)


def list_samples(src: str, split: str, options: SourceOptions = NO_OPTIONS) -> Listing:
    """List one split of a data set of torchvision, after downloading it where that has not been done.

    Raises UserError when there is no such data set, when the download fails (nothing of it then stays), when it lacks
    the split, and when it is not one of images with a class each.
    """
    name = src.removeprefix(PREFIX)
    folder = (options.download_dir or cache_folder()) / name
    with _kept_on_success(folder):
        dataset, arguments = _find(name, folder, split)
    _check_kind(name, dataset)
    labels = _labels(dataset)
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes) and len(classes) > labels.max()):
        classes = [str(number) for number in range(int(labels.max()) + 1)]
    rows = np.arange(len(labels))
    if not {"train", "split"} & arguments.keys():
        rows = np.flatnonzero(val_mask(labels) == (split == "val"))
    paths = _paths(dataset)
    if paths:
        stats = [paths[row].stat() for row in rows.tolist()]
        return Listing(
            format="torchvision",
            classes=classes,
            names=[str(paths[row].relative_to(folder)) for row in rows.tolist()],
            labels=labels[rows],
            sizes=np.asarray([stat.st_size for stat in stats], np.int64),
            stamps=np.asarray([stat.st_mtime_ns for stat in stats], np.int64),
            read=ReadFile(str(folder)),
        )
    names = [f"{classes[labels[row]].replace('/', '-')}/{row:06d}.png" for row in rows.tolist()]
    read = ReadDataset(name, tuple(arguments.items()))
    return Listing(
        format="torchvision",
        classes=classes,
        names=names,
        labels=labels[rows],
        sizes=expected_sizes(read, names),
        stamps=np.zeros(len(rows), np.int64),  # torchvision holds its files against checksums
        read=read,
    )


@contextlib.contextmanager
def _kept_on_success(folder: Path) -> Iterator[None]:
    """Remove what a failed download left in a folder that was not there before."""
    created = [path for path in [folder, *folder.parents] if not path.exists()]
    try:
        yield
    except BaseException:
        if created:
            shutil.rmtree(folder, ignore_errors=True)
            for path in created[1:]:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise


def _find(name: str, folder: Path, split: str) -> tuple[Any, dict[str, Any]]:
    """The data set, opened or downloaded, and the arguments that open it."""
    from torchvision import datasets

    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1, cutoff=0.5)
        raise UserError(
            f"{PREFIX}{name}: torchvision has no such data set{f' (it has {near[0]})' if near else ''}. They are at "
            "https://docs.pytorch.org/vision/stable/datasets.html"
        )
    parameters = inspect.signature(getattr(datasets, name)).parameters
    common: dict[str, Any] = {"root": str(folder)} if "root" in parameters else {}
    if "train" in parameters:
        candidates = [{**common, "train": split == "train"}]
    elif "split" in parameters:
        candidates = [{**common, "split": word} for word in _SPLITS[split]]
    elif chooses := [parameter for parameter in _CHOOSES_PART if parameter in parameters]:
        raise UserError(
            f"{PREFIX}{name}: its parts are chosen by {chooses[0]}, so it is not known which are train and val. "
            "Unpack it, and name the folder of each split as SRC."
        )
    else:
        candidates = [common]
    refused = ""
    for arguments in candidates:
        try:
            return _open(name, tuple(arguments.items())), arguments
        except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
            if isinstance(error, ValueError) and _UNKNOWN_SPLIT.match(str(error)):
                refused = _reason(error)
                continue
            if "download" not in parameters or not isinstance(error, RuntimeError | OSError):
                raise UserError(f"{PREFIX}{name}: cannot be opened ({_reason(error)}).") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _open(name, (*arguments.items(), ("download", True))), arguments
        except (RuntimeError, OSError, ValueError, ImportError, EOFError) as error:
            raise UserError(
                f"{PREFIX}{name}: cannot be downloaded to {folder} ({_reason(error)}). Try again, or lay its files "
                "there as torchvision does."
            ) from None
    files = " Name its files as SRC: FOLDER/emnist-letters-train-images-idx3-ubyte" if name == "EMNIST" else ""
    raise UserError(f"{PREFIX}{name}: has no split that could be {split} ({refused.rstrip('.')}).{files}")


@functools.lru_cache(maxsize=2)
def _open(name: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    """A data set; each worker opens it once."""
    from torchvision import datasets

    return getattr(datasets, name)(**dict(arguments))


def _check_kind(name: str, dataset: Any) -> None:
    from PIL import Image

    try:
        image, label = dataset[0]
        is_classification = isinstance(image, Image.Image) and int(label) >= 0
        image.close()
    except (TypeError, ValueError, IndexError, AttributeError):
        is_classification = False
    if not is_classification:
        raise UserError(f"{PREFIX}{name}: not a data set of images with one class each, which is what training takes.")


def _labels(dataset: Any) -> np.ndarray:
    """(N,) int32: from where torchvision keeps them, or else from every sample in turn."""
    count = len(dataset)
    for attribute in _LABELS:
        values = np.asarray(getattr(dataset, attribute, None))
        if values.shape == (count,) and values.dtype.kind in "iu" and int(values[0]) == _label(dataset, 0):
            return values.astype(np.int32)
    for attribute in _PATHS[:2]:
        pairs = getattr(dataset, attribute, None)
        if isinstance(pairs, list) and len(pairs) == count and isinstance(pairs[0], tuple) and len(pairs[0]) == 2:
            values = np.asarray([pair[1] for pair in pairs])
            if values.dtype.kind in "iu" and int(values[0]) == _label(dataset, 0):
                return values.astype(np.int32)
    return np.asarray([_label(dataset, row) for row in range(count)], np.int32)


def _label(dataset: Any, row: int) -> int:
    image, label = dataset[row]
    image.close()  # some data sets give images that are opened, but not yet read
    return int(label)


def _paths(dataset: Any) -> list[Path]:
    """The data set's image files, in its order; empty where it does not show them, or makes more of them."""
    from PIL import Image

    for attribute in _PATHS:
        entries = getattr(dataset, attribute, None)
        if not isinstance(entries, list) or len(entries) != len(dataset):
            continue
        entries = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
        if not all(isinstance(entry, str | Path) and Path(entry).suffix.lower() in SUFFIXES for entry in entries):
            continue
        # A data set may cut its samples out of larger pictures: then the first differs from its file.
        with Image.open(entries[0]) as file, dataset[0][0] as given:
            if file.size == given.size:
                return [Path(entry) for entry in entries]
    return []


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
