"""Kaggle's ImageNet: found from any of its folders, labelled by its own lists, refused where they disagree."""

import json

import pytest

from ast_dist.data.index import Index
from ast_dist.errors import UserError
from data_prep.sources.files import list_files
from data_prep.sources.options import ClassFile, SourceOptions
from tests.sources import by_name, convert, jpeg, listed, not_listed

SYNSETS = {
    "n02": "dog, Canis",
    "n01": "tench, Tinca tinca",
    "n10": "crane",
}  # Kaggle's list is sorted; ours must not be
VAL = {"ILSVRC2012_val_00000001": "n10", "ILSVRC2012_val_00000002": "n01", "ILSVRC2012_val_00000003": "n02"}


def write_imagenet(root):
    """Kaggle's folders with 2 training images a class and 3 validation images. Returns CLS-LOC."""
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    for number, wnid in enumerate(SYNSETS):
        (images / "train" / wnid).mkdir(parents=True)
        for i in range(2):
            (images / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(jpeg(2 * number + i))
    (images / "val").mkdir()
    (images / "test").mkdir()
    (images / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(jpeg(99))
    for number, name in enumerate(VAL):
        (images / "val" / f"{name}.JPEG").write_bytes(jpeg(50 + number))
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in SYNSETS.items()))
    rows = "".join(f"{name},{wnid} 85 1 499 272 n99 1 2 3 4 \n" for name, wnid in VAL.items())
    (root / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    return images


@pytest.fixture
def imagenet(tmp_path):
    write_imagenet(tmp_path / "kaggle")
    return tmp_path / "kaggle"


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_any_of_its_folders_gives_the_same_training_and_validation_set(imagenet, below):
    train, val = listed(imagenet / below), listed(imagenet / below, "val")
    assert train.format == val.format == "ilsvrc"
    assert train.classes == val.classes == ["n01", "n02", "n10"]
    assert train.class_names == val.class_names == ["tench, Tinca tinca", "dog, Canis", "crane"]
    assert {name: label for name, (label, _) in by_name(train).items()} == {
        f"{wnid}/{wnid}_{i}.JPEG": wnid for wnid in SYNSETS for i in range(2)
    }
    assert by_name(val) == {
        f"{name}.JPEG": (wnid, jpeg(50 + number)) for number, (name, wnid) in enumerate(VAL.items())
    }


def test_it_is_found_from_a_relative_name_and_through_a_link(imagenet, monkeypatch, tmp_path):
    monkeypatch.chdir(imagenet / "ILSVRC" / "Data")
    assert listed("CLS-LOC", "val").format == "ilsvrc"
    monkeypatch.chdir(imagenet)
    assert listed(".", "val").format == "ilsvrc"
    (tmp_path / "input").symlink_to(imagenet)
    assert len(listed(tmp_path / "input", "val").names) == 3


def test_validation_images_that_are_sorted_into_class_folders_are_taken_as_they_lie(imagenet):
    val = imagenet / "ILSVRC/Data/CLS-LOC/val"
    for name, wnid in VAL.items():
        (val / wnid).mkdir()
        (val / f"{name}.JPEG").rename(val / wnid / f"{name}.JPEG")
    (imagenet / "LOC_val_solution.csv").unlink()
    listing = listed(imagenet, "val")
    assert {name: label for name, (label, _) in by_name(listing).items()} == {
        f"{wnid}/{name}.JPEG": wnid for name, wnid in VAL.items()
    }


def test_shards_hold_the_names_of_classes_and_the_same_numbers_in_both_splits(imagenet, tmp_path):
    for split in ("train", "val"):
        convert(imagenet, tmp_path / "dst", "--no-decode-check", split=split)
        manifest = json.loads((tmp_path / "dst" / split / "manifest.json").read_text())
        assert manifest["source"] == "ilsvrc"
        assert manifest["class_names"] == ["tench, Tinca tinca", "dog, Canis", "crane"]
    index = Index.open(tmp_path / "dst" / "val")
    labels = {index.key(row).partition("-")[2]: int(index.label[row]) for row in range(index.num_samples)}
    assert labels == {name: sorted(SYNSETS).index(wnid) for name, wnid in VAL.items()}


def test_a_class_file_needs_only_the_folders_and_images_of_its_classes(imagenet, tmp_path):
    images = imagenet / "ILSVRC/Data/CLS-LOC"
    for path in (images / "train" / "n10").iterdir():
        path.unlink()
    (images / "train" / "n10").rmdir()
    (images / "val" / "ILSVRC2012_val_00000001.JPEG").unlink()
    (tmp_path / "two.txt").write_text("n02\nn01\n")
    options = SourceOptions(classes=ClassFile.read(tmp_path / "two.txt"))
    train, val = listed(imagenet, "train", options), listed(imagenet, "val", options)
    assert train.classes == val.classes == ["n01", "n02"]
    assert train.class_names == val.class_names == ["tench, Tinca tinca", "dog, Canis"]
    assert sorted(val.labels.tolist()) == [0, 1]
    assert "no folder for the class n10 (1 of 3 are missing)" in not_listed(imagenet)


def damage(root, kind):
    images = root / "ILSVRC/Data/CLS-LOC"
    if kind.startswith("no "):
        (root / kind.removeprefix("no ")).unlink()
    elif kind == "unlabelled":
        (images / "val" / "ILSVRC2012_val_00000009.JPEG").write_bytes(jpeg(0))
    elif kind == "incomplete":
        (images / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    elif kind == "other header":
        (root / "LOC_val_solution.csv").write_text("id,label\na,n01\n")
    elif kind == "unknown label":
        text = (root / "LOC_val_solution.csv").read_text()
        (root / "LOC_val_solution.csv").write_text(text.replace(",n01", ",n77"))
    elif kind == "empty mapping":
        (root / "LOC_synset_mapping.txt").write_text("\n")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no LOC_synset_mapping.txt", "LOC_synset_mapping.txt is missing"),
        ("no LOC_val_solution.csv", "LOC_val_solution.csv is missing"),
        ("unlabelled", "ILSVRC2012_val_00000009 has no label in"),
        ("incomplete", "ILSVRC2012_val_00000002 is missing"),
        ("other header", "no columns ImageId and PredictionString"),
        ("unknown label", "labels ILSVRC2012_val_00000002 as n77"),
        ("empty mapping", "names no class"),
    ],
)
def test_lists_that_are_missing_or_do_not_fit_the_images_are_refused(imagenet, kind, expected):
    damage(imagenet, kind)
    text = not_listed(imagenet, "val")
    assert expected in text
    assert str(imagenet) in text


def test_training_folders_that_are_no_class_or_empty_are_refused(imagenet):
    train = imagenet / "ILSVRC/Data/CLS-LOC/train"
    (train / "cats").mkdir()
    assert f"{train / 'cats'}: not one of the 3 classes" in not_listed(imagenet)
    (train / "cats").rmdir()
    for path in (train / "n02").iterdir():
        path.unlink()
    assert f"{train / 'n02'}: no image in this class folder" in not_listed(imagenet)


def test_a_split_whose_folder_was_not_unpacked_is_refused(imagenet):
    (imagenet / "ILSVRC/Data/CLS-LOC/train").rename(imagenet / "elsewhere")
    assert "ILSVRC/Data/CLS-LOC/train: no such folder" in not_listed(imagenet)


def test_it_is_found_from_a_folder_below_it_by_two_dots(imagenet, monkeypatch):
    monkeypatch.chdir(imagenet / "ILSVRC/Data/CLS-LOC/train")
    assert listed("..", "val").format == "ilsvrc"


def test_an_archive_beside_it_is_not_taken_for_the_set(imagenet):
    (imagenet / "imagenet.tar").write_bytes(b"")
    (imagenet / "ILSVRC/Data/CLS-LOC/train/n01.tar").write_bytes(b"")
    assert listed(imagenet).format == listed(imagenet / "ILSVRC/Data/CLS-LOC").format == "ilsvrc"


@pytest.mark.parametrize("list_files_instead", [False, True])
@pytest.mark.parametrize("name", ["LOC_synset_mapping.txt", "LOC_val_solution.csv"])
def test_a_list_that_is_not_utf8_is_refused_in_one_line(imagenet, name, list_files_instead):
    (imagenet / name).write_bytes((imagenet / name).read_bytes() + b"\xff")
    with pytest.raises(UserError, match=name) as caught:
        list_files(str(imagenet), "val") if list_files_instead else listed(imagenet, "val")
    assert len(str(caught.value).splitlines()) == 1


def test_validation_images_that_are_links_that_lead_nowhere_are_refused(imagenet):
    val = imagenet / "ILSVRC/Data/CLS-LOC/val"
    for name in VAL:
        (val / f"{name}.JPEG").unlink()
        (val / f"{name}.JPEG").symlink_to("/gone")
    assert f"{val / next(iter(VAL))}.JPEG: a link that leads nowhere (3 below" in not_listed(imagenet, "val")


def labels_of(listing):
    return {name: listing.classes[label] for name, label in zip(listing.names, listing.labels.tolist(), strict=True)}


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("keeps_solution", [False, True])
def test_files_in_place_are_listed_as_a_conversion_lists_them(imagenet, monkeypatch, is_sorted, keeps_solution):
    val = imagenet / "ILSVRC/Data/CLS-LOC/val"
    if is_sorted:
        for name, wnid in VAL.items():
            (val / wnid).mkdir()
            (val / f"{name}.JPEG").rename(val / wnid / f"{name}.JPEG")
    if not keeps_solution:
        (imagenet / "LOC_val_solution.csv").unlink()
        if not is_sorted:
            with pytest.raises(UserError, match=r"LOC_val_solution\.csv is missing"):
                list_files(str(imagenet), "val")
            return
    monkeypatch.chdir(imagenet / "ILSVRC/Data/CLS-LOC")
    for split in ("train", "val"):
        files, converted = list_files(".", split), listed(imagenet, split)
        assert labels_of(files) == labels_of(converted)
        assert (files.format, files.classes, files.class_names) == ("ilsvrc", converted.classes, converted.class_names)


def test_files_in_place_are_listed_in_the_format_that_is_asked_for(imagenet):
    images = imagenet / "ILSVRC/Data/CLS-LOC"
    (imagenet / "LOC_synset_mapping.txt").write_text("n01 tench\n")
    assert list_files(str(images), "train", format="imagefolder").classes == sorted(SYNSETS)
    with pytest.raises(UserError, match="not one of the 1 classes"):
        list_files(str(images), "train")
    with pytest.raises(UserError, match="holds no ILSVRC/Data/CLS-LOC"):
        list_files(str(images / "train"), "train", format="ilsvrc")
