"""torchvision's data sets by name, from files laid out as torchvision lays them out."""

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from ast_dist.data.index import Index
from ast_dist.errors import UserError
from data_prep.sources import torchvision_dataset
from data_prep.sources.options import SourceOptions
from tests.sources import by_name, convert, encoded, jpeg, listed, not_listed, pixels


def in_folder(folder):
    return SourceOptions(download_dir=folder)


def write_fashion_mnist(folder, count=20):
    raw = folder / "FashionMNIST" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for number, split in enumerate(("train", "t10k")):
        images = np.stack([pixels(100 * number + i, 28, 28, 1) for i in range(count)])
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())


def test_arrays_are_stored_without_loss_under_torchvisions_numbers(tmp_path):
    write_fashion_mnist(tmp_path)
    for split in ("train", "val"):
        listing = listed("torchvision:FashionMNIST", split, in_folder(tmp_path))
        reference = datasets.FashionMNIST(tmp_path / "FashionMNIST", train=split == "train")
        assert listing.format == "torchvision"
        assert listing.classes == reference.classes  # T-shirt/top comes first: not sorted, but torchvision's
        assert listing.labels.tolist() == reference.targets.tolist()
        pictures = [np.asarray(Image.open(io.BytesIO(listing.read(name)))) for name in listing.names]
        assert np.array_equal(np.stack(pictures), reference.data.numpy())


def test_workers_read_what_the_listing_names(tmp_path):
    write_fashion_mnist(tmp_path / "torchvision")
    options = [f"--download-dir={tmp_path / 'torchvision'}", "--no-decode-check"]
    convert("torchvision:FashionMNIST", tmp_path / "dst", *options, split="val")
    index = Index.open(tmp_path / "dst" / "val")
    raw = index.shard_paths[0].read_bytes()
    reference = datasets.FashionMNIST(tmp_path / "torchvision" / "FashionMNIST", train=False)
    rows = [int(index.key(i).rpartition("-")[2]) for i in range(index.num_samples)]
    assert sorted(rows) == list(range(20))
    for i, row in enumerate(rows):
        picture = Image.open(io.BytesIO(raw[index.offset[i] : index.offset[i] + index.size[i]]))
        assert np.array_equal(np.asarray(picture), reference.data[row].numpy())
        assert index.label[i] == reference.targets[row]


def write_food101(folder):
    base = folder / "Food101" / "food-101"
    names = ["apple_pie", "baby_back_ribs"]
    for directory in ("meta", *(f"images/{name}" for name in names)):
        (base / directory).mkdir(parents=True)
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        meta = {name: [f"{name}/{number}" for number in numbers] for name in names}
        (base / "meta" / f"{split}.json").write_text(json.dumps(meta))
        for place, name in enumerate(names):
            for number in numbers:
                (base / "images" / name / f"{number}.jpg").write_bytes(jpeg(10 * place + number))


def write_imagenette(folder):
    for place, wnid in enumerate(["n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916"]):
        for split, number in (("train", 1), ("val", 2)):
            target = folder / "Imagenette" / "imagenette2" / split / wnid
            target.mkdir(parents=True)
            (target / f"{number}.JPEG").write_bytes(jpeg(10 * place + number))


@pytest.mark.parametrize(("name", "write"), [("Food101", write_food101), ("Imagenette", write_imagenette)])
def test_files_keep_their_bytes(tmp_path, name, write):
    write(tmp_path)
    files = {path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".JPEG")}
    seen = {}
    for split in ("train", "val"):
        samples = by_name(listed(f"torchvision:{name}", split, in_folder(tmp_path)))
        assert all((tmp_path / name / file).read_bytes() == data for file, (_, data) in samples.items())
        assert not seen.keys() & samples.keys()
        seen |= samples
    assert {data for _, data in seen.values()} == files
    if name == "Food101":
        assert {(Path(file).parent.name, label) for file, (label, _) in seen.items()} == {
            ("apple_pie", "apple_pie"),
            ("baby_back_ribs", "baby_back_ribs"),
        }


def test_a_set_without_splits_gives_a_fifth_of_each_class_to_val(tmp_path):
    for place, name in enumerate(["AnnualCrop", "Forest"]):
        target = tmp_path / "EuroSAT" / "eurosat" / "2750" / name
        target.mkdir(parents=True)
        for number in range(10):
            (target / f"{name}_{number}.jpg").write_bytes(jpeg(10 * place + number))
    train, val = (listed("torchvision:EuroSAT", split, in_folder(tmp_path)) for split in ("train", "val"))
    assert (len(train.names), len(val.names)) == (16, 4)
    assert not set(train.names) & set(val.names)
    assert np.bincount(val.labels).tolist() == [2, 2]


def test_pictures_that_are_made_from_several_files_are_encoded_by_their_pixels(tmp_path):
    # Caltech101 shows no list of files; its grey pictures come out as RGB.
    target = tmp_path / "Caltech101" / "caltech101" / "101_ObjectCategories"
    for folder in (target / "BACKGROUND_Google", target.parent / "Annotations"):
        folder.mkdir(parents=True)
    for name in ("ant", "barrel"):
        (target / name).mkdir(parents=True)
        for number in range(5):
            (target / name / f"image_{number + 1:04d}.jpg").write_bytes(encoded(pixels(number)))
    listing = listed("torchvision:Caltech101", "train", in_folder(tmp_path))
    reference = datasets.Caltech101(tmp_path / "Caltech101")
    assert listing.classes == ["ant", "barrel"]
    assert len(listing.names) == 8
    for name, label in zip(listing.names, listing.labels.tolist(), strict=True):
        image, expected = reference[int(Path(name).stem)]
        assert label == expected
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(listing.read(name)))), np.asarray(image))


def test_a_failed_download_is_one_line_and_leaves_the_disk_as_it_was(tmp_path):
    # A proxy that refuses at once, so that the test is the same with and without a network.
    refusing = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "data_prep.make_shards", "torchvision:CIFAR10", str(tmp_path / "dst")]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--split=train"], capture_output=True, text=True, check=False, env={**cache, **refusing}
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    folder = tmp_path / "cache" / "ast_dist" / "torchvision" / "CIFAR10"
    assert f"torchvision:CIFAR10: cannot be downloaded to {folder}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_what_was_there_before(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "CIFAR10").mkdir()
    (tmp_path / "CIFAR10" / "notes.txt").write_text("mine")
    assert "cannot be downloaded" in not_listed("torchvision:CIFAR10", "train", in_folder(tmp_path))
    assert (tmp_path / "CIFAR10" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CIFAR11", "torchvision has no such data set (it has CIFAR10)"),
        ("", "torchvision has no such data set"),
        ("EMNIST", "has no split that could be train"),
        ("CocoDetection", "cannot be opened"),
    ],
)
def test_names_that_are_no_set_of_images_with_classes_are_refused_and_nothing_is_written(tmp_path, name, expected):
    assert expected in not_listed(f"torchvision:{name}", "train", in_folder(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_what_has_no_class_for_each_image_is_refused():
    with pytest.raises(UserError, match="not a data set of images with one class each"):
        torchvision_dataset._check_kind("Pairs", [(jpeg(0), {"boxes": []})])


def test_download_dir_is_refused_for_other_sources(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(jpeg(0))
    assert "only torchvision:NAME is downloaded" in not_listed(tmp_path, "train", in_folder(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"), [("INaturalist", "version"), ("Omniglot", "background"), ("LSUN", "classes")]
)
def test_sets_whose_parts_are_not_train_and_val_are_refused_before_a_download(tmp_path, name, part):
    for split in ("train", "val"):
        text = not_listed(f"torchvision:{name}", split, in_folder(tmp_path / "new"))
        assert f"torchvision:{name}: its parts are chosen by {part}" in text
    assert not (tmp_path / "new").exists()


def test_emnist_is_refused_with_what_to_name_instead(tmp_path):
    text = not_listed("torchvision:EMNIST", "train", in_folder(tmp_path / "new"))
    assert "Valid values are {'byclass', " in text
    assert "Name its files as SRC: FOLDER/emnist-letters-train-images-idx3-ubyte" in text


def write_pets(folder):
    base = folder / "OxfordIIITPet" / "oxford-iiit-pet"
    for name in ("images", "annotations/trimaps"):
        (base / name).mkdir(parents=True)
    for split, number in (("trainval", 1), ("test", 2)):
        (base / "annotations" / f"{split}.txt").write_text(f"Abyssinian_{number} 1 1 1\nbeagle_{number} 2 2 1\n")
        for place, name in enumerate(["Abyssinian", "beagle"]):
            (base / "images" / f"{name}_{number}.jpg").write_bytes(jpeg(10 * place + number))


def write_places(folder):
    base = folder / "Places365"
    base.mkdir(parents=True)
    (base / "categories_places365.txt").write_text("/a/airfield 0\n/b/bar 1\n")
    (base / "places365_train_standard.txt").write_text("/a/airfield/1.jpg 0\n/b/bar/1.jpg 1\n")
    (base / "places365_val.txt").write_text("v0.jpg 0\nv1.jpg 1\n")
    files = ["data_large_standard/a/airfield/1.jpg", "data_large_standard/b/bar/1.jpg"]
    for number, name in enumerate([*files, "val_large/v0.jpg", "val_large/v1.jpg"]):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(jpeg(number))


@pytest.mark.parametrize(("name", "write"), [("OxfordIIITPet", write_pets), ("Places365", write_places)])
def test_training_splits_with_other_names_are_known_and_files_keep_their_bytes(tmp_path, monkeypatch, name, write):
    write(tmp_path)
    monkeypatch.setattr(datasets.Places365, "_check_integrity", lambda *_: True)  # ours have other checksums
    files = {path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    train, val = (by_name(listed(f"torchvision:{name}", split, in_folder(tmp_path))) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 2)
    assert {data for _, data in (train | val).values()} == files
    assert {label for label, _ in train.values()} == {label for label, _ in val.values()}


def test_an_error_of_a_set_is_not_taken_for_a_missing_split(tmp_path, monkeypatch):
    def damaged(self):
        raise ValueError("the labels are damaged")

    monkeypatch.setattr(datasets.Food101, "_check_exists", damaged)
    text = not_listed("torchvision:Food101", "val", in_folder(tmp_path))
    assert "cannot be opened (the labels are damaged)" in text
