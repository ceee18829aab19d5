"""The MNIST family's idx files become grey PNGs without loss, and damaged ones are refused."""

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from ast_dist.data.index import Index
from tests.sources import convert, listed, not_listed, pixels

COUNT = 20


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder, prefix="", splits=("train", "t10k"), packed=False, first_label=0):
    """COUNT images of 6 × 8 pixels a split, of four classes from first_label. Returns split → (images, labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for number, split in enumerate(splits):
        images = np.stack([pixels(100 * number + i, channels=1) for i in range(COUNT)])
        labels = (np.arange(COUNT) % 4 + first_label).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array)
            path = folder / f"{prefix}{split}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
        sets[split] = (images, labels)
    return sets


@pytest.mark.parametrize(
    ("prefix", "splits", "packed"),
    [
        ("", ("train", "t10k"), False),
        ("", ("train", "t10k"), True),
        ("emnist-letters-", ("train", "test"), True),
    ],
)
def test_every_pixel_and_label_is_there(tmp_path, prefix, splits, packed):
    sets = write_set(tmp_path, prefix, splits, packed, first_label=1)
    for split, theirs in zip(("train", "val"), splits, strict=True):
        listing = listed(tmp_path, split)
        images, labels = sets[theirs]
        assert listing.format == "idx"
        assert listing.classes == ["1", "2", "3", "4"]
        assert [int(listing.classes[label]) for label in listing.labels] == labels.tolist()
        pictures = [Image.open(io.BytesIO(listing.read(name))) for name in listing.names]
        assert {picture.mode for picture in pictures} == {"L"}
        assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), images)


def test_shards_hold_grey_pngs_under_names_that_lead_back_to_the_row(tmp_path):
    write_set(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", split="val")
    index = Index.open(tmp_path / "dst" / "val")
    assert index.num_samples == COUNT
    assert {(h, w) for h, w in zip(index.height.tolist(), index.width.tolist(), strict=True)} == {(6, 8)}
    rows = sorted(int(index.key(row).rpartition("-")[2]) for row in range(COUNT))
    assert rows == list(range(COUNT))
    assert index.shard_paths[0].read_bytes()[index.offset[0] :][:4] == b"\x89PNG"


def test_several_sets_in_one_folder_are_told_apart_by_a_file(tmp_path):
    write_set(tmp_path, "emnist-digits-", ("train", "test"), packed=True)
    write_set(tmp_path, "emnist-letters-", ("train", "test"), packed=True, first_label=1)
    text = not_listed(tmp_path)
    assert "holds 2 sets" in text and "emnist-letters-train-images-idx3-ubyte.gz" in text
    # Either split's file names the set, for both splits.
    for split in ("train", "val"):
        listing = listed(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz", split)
        assert listing.classes == ["1", "2", "3", "4"]


def test_packed_and_unpacked_copies_side_by_side_are_one_set(tmp_path):
    write_set(tmp_path, packed=True)
    write_set(tmp_path, packed=False)
    assert len(listed(tmp_path).names) == COUNT


def damage(folder, kind):
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    if kind == "no labels":
        labels.unlink()
    elif kind == "cut":
        images.write_bytes(images.read_bytes()[:-7])
    elif kind == "other number":
        labels.write_bytes(idx(np.zeros(COUNT - 1, np.uint8)))
    elif kind == "not idx":
        images.write_bytes(b"<html>sign in first</html>")
    elif kind == "empty file":
        images.write_bytes(b"")
    elif kind == "colour":
        images.write_bytes(idx(np.zeros((COUNT, 2, 2, 3), np.uint8)))
    elif kind == "no image":
        images.write_bytes(idx(np.zeros((0, 2, 2), np.uint8)))
        labels.write_bytes(idx(np.zeros(0, np.uint8)))
    elif kind == "cut gzip":
        images.with_name(f"{images.name}.gz").write_bytes(gzip.compress(images.read_bytes())[:-9])
        images.unlink()
    elif kind == "no training files":
        images.unlink()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no labels", "train-labels-idx1-ubyte: missing"),
        ("cut", f"states {COUNT * 48:,} bytes of values, but holds {COUNT * 48 - 7:,}"),
        ("other number", f"{COUNT} images, but train-labels-idx1-ubyte has {COUNT - 1} labels"),
        ("not idx", "not an idx file of unsigned bytes (it starts with 3c 68 74 6d)"),
        ("empty file", "cannot be read"),
        ("colour", "4 dimensions, but 3 were expected"),
        ("no image", "holds no image"),
        ("cut gzip", "cannot be read"),
        ("no training files", "holds no train-images-idx3-ubyte"),
    ],
)
def test_damaged_or_missing_files_are_refused(tmp_path, kind, expected):
    write_set(tmp_path)
    damage(tmp_path, kind)
    assert expected in not_listed(tmp_path)
