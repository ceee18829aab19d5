"""The MNIST family's own files: one of images, one of labels, packed with gzip or not.

    train-images-idx3-ubyte, train-labels-idx1-ubyte        and t10k-… for val (MNIST, Fashion-MNIST, KMNIST)
    emnist-letters-train-images-idx3-ubyte.gz, …            and …-test-… for val (EMNIST)

EMNIST's files hold the pictures with rows and columns exchanged; they stay so, as in torchvision.

Sources: http://yann.lecun.com/exdb/mnist (the format, at its end); G. Cohen et al., "EMNIST", arXiv:1702.05373.
The grey images are stored as grey PNGs, without loss. The classes are the labels that occur, in numeric order.
"""

import functools
import gzip
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.sources.listing import Listing
from data_prep.sources.options import NO_OPTIONS, SourceOptions
from data_prep.sources.pixels import expected_sizes, png_bytes

# `train-images-idx3-ubyte`, and with a dot where somebody's unpacker put one.
_IMAGES = re.compile(r"(?P<set>.*?)(?P<split>train|t10k|test)-images[-.]idx3-ubyte(?P<gz>\.gz)?")
_SPLITS = {"train": ("train",), "val": ("t10k", "test")}
_UNSIGNED_BYTES = 0x08  # the third byte of an idx file: the type of its values


@dataclass(frozen=True)
class ReadIdx:
    """Gives images of an idx file as PNG; a name ends in the image's number."""

    path: str

    def __call__(self, name: str) -> bytes:
        from PIL import Image

        images = _load(self.path)
        return png_bytes(Image.fromarray(images[int(name.rpartition("/")[2].removesuffix(".png"))]))


def find_images(src: Path, split: str) -> list[Path]:
    """The files of a split's images in a folder, or `src` itself where it is such a file, or its other split's."""
    folder, prefix = src, ""
    if src.is_file():
        match = _IMAGES.fullmatch(src.name)
        if not match:
            return []
        folder, prefix = src.parent, match["set"]
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"{glob_escaped(prefix)}*-images?idx3-ubyte*")) if folder.is_dir() else []:
        match = _IMAGES.fullmatch(path.name)
        if match and match["split"] in _SPLITS[split] and (not src.is_file() or match["set"] == prefix):
            found.setdefault(path.name.removesuffix(".gz"), path)  # unpacked and packed: the first, which is unpacked
    return list(found.values())


def glob_escaped(text: str) -> str:
    """A text in which no sign is special to `Path.glob`."""
    return re.sub(r"([*?[])", r"[\1]", text)


def list_samples(src: str, split: str, options: SourceOptions = NO_OPTIONS) -> Listing:
    """List one split of an MNIST-like set. src: the folder with its files, or one of its files of images.

    Raises UserError when a file is missing, is no idx file or is cut, when images and labels differ in number, and when
    the folder holds several sets.
    """
    found = find_images(Path(src), split)
    if not found:
        wanted = " or ".join(f"{name}-images-idx3-ubyte" for name in _SPLITS[split])
        raise UserError(
            f"{src}: holds no {wanted} (.gz), of which the split {split} is made. Name the folder that does."
        )
    if len(found) > 1:
        raise UserError(
            f"{src}: holds {len(found)} sets ({found[0].name}, {found[1].name}, …). Name one by its file: {found[0]}"
        )
    (images_path,) = found
    labels_path = _labels_of(images_path)
    images, numbers = _load(str(images_path)), _load(str(labels_path))
    if images.ndim != 3 or numbers.ndim != 1:
        path, array, expected = (images_path, images, 3) if images.ndim != 3 else (labels_path, numbers, 1)
        raise UserError(f"{path}: an idx file with {array.ndim} dimensions, but {expected} were expected.")
    if len(images) != len(numbers):
        raise UserError(
            f"{images_path}: {len(images):,} images, but {labels_path.name} has {len(numbers):,} labels. Download both "
            "again."
        )
    if not len(images):
        raise UserError(f"{images_path}: holds no image. Download it again.")
    present, labels = np.unique(numbers, return_inverse=True)
    classes = [str(number) for number in present.tolist()]
    names = [f"{classes[label]}/{row:06d}.png" for row, label in enumerate(labels.tolist())]
    read = ReadIdx(str(images_path))
    stamp = max(images_path.stat().st_mtime_ns, labels_path.stat().st_mtime_ns)
    return Listing(
        format="idx",
        classes=classes,
        names=names,
        labels=labels.astype(np.int32),
        sizes=expected_sizes(read, names),
        stamps=np.full(len(names), stamp, np.int64),
        read=read,
    )


def _labels_of(images: Path) -> Path:
    """The file of labels beside a file of images: packed as that one is, or not."""
    name = images.name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    for path in (images.with_name(name), images.with_name(f"{name}.gz")):
        if path.is_file():
            return path
    raise UserError(f"{images.with_name(name)}: missing, which holds the labels of {images.name}. Put it there.")


@functools.lru_cache(maxsize=2)
def _load(path: str) -> np.ndarray:
    """An idx file as an array of uint8. Unpacked files are mapped; of packed ones, each worker holds one in memory."""
    try:
        if path.endswith(".gz"):
            with gzip.open(path) as packed:
                content = np.frombuffer(packed.read(), np.uint8)
        else:
            content = np.memmap(path, np.uint8, "r")
    except (EOFError, zlib.error, ValueError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}). Download it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    head = content[:4].tobytes()
    if len(head) < 4 or head[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or len(content) < 4 + 4 * head[3]:
        raise UserError(
            f"{path}: not an idx file of unsigned bytes (it starts with {head.hex(' ')}). Download it again."
        )
    shape = struct.unpack(f">{head[3]}I", content[4 : 4 + 4 * head[3]].tobytes())
    stated, held = int(np.prod(shape, dtype=np.int64)), len(content) - 4 - 4 * head[3]
    if stated != held:
        raise UserError(f"{path}: states {stated:,} bytes of values, but holds {held:,}. Download it again.")
    return content[4 + 4 * head[3] :].reshape(shape)
