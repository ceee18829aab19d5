"""Class folders with links and archives among them: nothing gets a wrong class, and nothing is left out in silence."""

import os

import pytest

from data_prep.sources import detect_format
from data_prep.sources.files import list_files
from tests.sources import by_name, jpeg, listed, not_listed


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with the classes a and b, one image each."""
    for number, name in enumerate(["train/a", "train/b", "val/a", "val/b"]):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / f"{number}.jpg").write_bytes(jpeg(number))
    return tmp_path / "set"


@pytest.mark.parametrize("target", ["..", "../..", "../../.."])
def test_a_link_to_a_folder_above_the_class_gives_no_image_another_class(tree, target):
    (tree / "train" / "a" / "up").symlink_to(target)
    for src in (tree, tree / "train", tree / "val" / ".." / "train"):
        assert by_name(listed(src)) == {"a/0.jpg": ("a", jpeg(0)), "b/1.jpg": ("b", jpeg(1))}


@pytest.mark.parametrize(("link", "target"), [("a/x.jpg", "/gone/x.jpg"), ("a/self", "self"), ("c", "/gone/class")])
def test_links_that_lead_nowhere_are_refused_with_their_number(tree, link, target):
    (tree / "train" / link).symlink_to(target)
    text = not_listed(tree)
    assert f"{tree / 'train' / link}: a link that leads nowhere (1 below {tree / 'train'})" in text
    with pytest.raises(ValueError, match="a link that leads nowhere"):
        list_files(str(tree), "train")
    assert len(listed(tree, "val").names) == 2


def test_a_split_whose_folder_is_a_link_that_leads_nowhere_is_refused(tree):
    (tree / "val").rename(tree.parent / "elsewhere")
    (tree / "val").symlink_to("gone")
    assert f"{tree / 'val'}: a link that leads nowhere" in not_listed(tree, "val")
    assert len(listed(tree).names) == 2


@pytest.mark.parametrize("unreadable", ["", "train", "train/a"])
def test_a_folder_that_may_not_be_read_is_refused_in_one_line(tree, unreadable, monkeypatch):
    scandir = os.scandir

    def refusing(path="."):
        if str(path) == str(tree / unreadable):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the tests may run as root, whom no mode stops
    assert f"{tree / unreadable}: cannot be listed (Permission denied)" in not_listed(tree)


def test_a_folder_below_one_that_may_not_be_entered_is_refused_in_one_line(tree, monkeypatch):
    stat = os.stat

    def refusing(path, **options):
        if str(path).startswith(str(tree / "train")):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)
    assert f"{tree / 'train'}: cannot be read (Permission denied)" in not_listed(tree / "train")


@pytest.mark.parametrize("archive", ["set.tar", "train/all.tar.gz"])
def test_an_archive_that_was_left_beside_the_class_folders_does_not_win(tree, archive):
    (tree / archive).write_bytes(b"")
    assert detect_format(str(tree)) == detect_format(str(tree / "train")) == "imagefolder"
    assert len(listed(tree).names) == 2


def test_tars_beside_a_folder_of_logs_or_previews_are_tars(tmp_path):
    for name in ("logs/log.txt", "previews/0.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True)
        (tmp_path / "train" / name).write_bytes(jpeg(0))
    (tmp_path / "train" / "0.tar").write_bytes(b"")
    assert detect_format(str(tmp_path)) == "wds"


def test_a_folder_for_a_split_that_is_missing_is_asked_for_by_its_names(tree):
    (tree / "val").rename(tree / "held-out")
    text = not_listed(tree, "val")
    assert "no folder for the split val (val, validation, valid, test). Give it one of these names" in text
