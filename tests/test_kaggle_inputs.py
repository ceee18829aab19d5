"""Claims about what is found in a Kaggle session's inputs, wherever it is mounted, and what is chosen of it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ast_dist.data.index import Index
from ast_dist.kaggle_inputs import DataSet, ImagenetIndex, choose, look, no_data
from tests.kaggle_tree import FORMS, tree, write_run
from tests.shards import squares, write_split
from tests.test_ilsvrc import SYNSETS, VAL, write_imagenet


def write_shards(folder: Path, num_train: int = 6) -> Path:
    write_split(folder / "train", squares(num_train, side=8))
    write_split(folder / "val", squares(3, side=8))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tree(tmp_path / "kaggle")


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_found_wherever_they_are_mounted(root: Path, form: str) -> None:
    folder = write_shards(root / "input" / form.format(slug="my-shards") / "some" / "folder")
    [found] = look(root / "input").data_sets
    assert (found.kind, found.folder, found.num_train) == ("shards", folder, 6)
    assert found.manifests == {split: Index.open(folder / split).hash for split in ("train", "val")}


@pytest.mark.parametrize("form", FORMS)
def test_imagenet_is_found_wherever_it_is_mounted(root: Path, form: str) -> None:
    folder = root / "input" / form.format(slug="imagenet-object-localization-challenge")
    folder.mkdir(parents=True)
    write_imagenet(folder)
    assert look(root / "input").data_sets == [DataSet("imagenet", folder)]


@pytest.mark.parametrize("form", FORMS)
def test_runs_are_found_wherever_they_are_mounted_but_not_those_that_were_moved_aside(root: Path, form: str) -> None:
    output = root / "input" / form.format(slug="my-notebook")
    run = write_run(output / "runs" / "digits", 5)
    write_run(output / "runs" / "digits.archived-20260101T000000", 9)
    write_run(output / "runs" / "empty")
    write_run(output / "runs" / ".copying-digits", 9)
    assert look(root / "input").runs == [run]


def test_nothing_is_found_in_nothing(root: Path) -> None:
    found = look(root / "input")
    assert not (found.data_sets or found.indexes or found.runs or found.unusable)
    assert choose(found.data_sets, ()) == (None, [])
    assert look(root / "no such folder") == found
    (line,) = str(no_data(root / "input", found)).splitlines()
    assert "ILSVRC/Data/CLS-LOC" in line and "manifest.json" in line


def test_imagenets_folders_without_their_lists_are_named_as_the_reason(root: Path) -> None:
    write_imagenet(root / "input" / "imagenet")
    (root / "input" / "imagenet" / "LOC_val_solution.csv").unlink()
    found = look(root / "input")
    assert not found.data_sets
    assert "LOC_val_solution.csv" in str(no_data(root / "input", found))


def test_one_split_without_the_other_is_named_as_the_reason(root: Path) -> None:
    shutil.rmtree(write_shards(root / "input" / "shards") / "val")
    found = look(root / "input")
    assert not found.data_sets
    line = str(no_data(root / "input", found))
    assert f"{root}/input/shards/train (one split of shards, but train/ and val/ must lie in one folder)" in line


def test_shards_in_working_are_named_where_none_is_attached(root: Path) -> None:
    folder = write_shards(root / "working" / "shards")
    line = str(no_data(root / "input", look(root / "input"), look(root / "working").data_sets))
    assert f"data_dir='{folder}'" in line and "Add Input" not in line


def test_shards_whose_tars_were_unpacked_are_no_data_and_say_so(root: Path) -> None:
    folder = write_shards(root / "input" / "shards")
    for shard in (folder / "train").glob("*.tar"):
        shard.unlink()
        shard.mkdir()
    found = look(root / "input")
    assert not found.data_sets
    assert "its tars were unpacked" in str(no_data(root / "input", found))


def test_folders_of_classes_are_not_walked_through(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = root / "input" / "flowers" / "train"
    for number in range(300):
        (classes / f"class-{number}").mkdir(parents=True)
    write_imagenet(root / "input" / "imagenet")
    seen = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(Path(path)) or scan(path))
    look(root / "input")
    assert classes in seen
    assert not [path for path in seen if path.parent == classes or "CLS-LOC" in path.parts]


def test_the_choice_is_the_set_a_run_was_trained_on_then_shards_then_the_larger_then_the_first() -> None:
    sets = [
        DataSet("imagenet", Path("/i/a"), 100, {"train": "im"}),
        DataSet("shards", Path("/i/d"), 50, {"train": "d"}),
        DataSet("shards", Path("/i/c"), 90, {"train": "c"}),
        DataSet("shards", Path("/i/b"), 90, {"train": "b"}),
    ]

    def order(*trained_on: str) -> list[str]:
        chosen, others = choose(sets, trained_on)
        return [candidate.folder.name for candidate in [chosen, *others] if candidate]

    assert order() == ["b", "c", "d", "a"]
    assert order("d") == ["d", "b", "c", "a"]
    assert order("im") == ["a", "b", "c", "d"]


class TestTheIndexOfImagenet:
    @pytest.fixture
    def imagenet(self, root: Path) -> Path:
        write_imagenet(root / "input" / "imagenet")
        return root / "input" / "imagenet"

    def test_reads_the_images_where_they_are_and_copies_none(self, root: Path, imagenet: Path) -> None:
        told: list[str] = []
        folder = ImagenetIndex(imagenet, root / "working", root / "temp").make([], told.append)
        train, val = Index.open(folder / "train"), Index.open(folder / "val")
        assert (train.num_samples, val.num_samples, train.num_classes) == (2 * len(SYNSETS), len(VAL), len(SYNSETS))
        first = Path(train.data_root, train.key(0))
        assert first.resolve().is_relative_to(imagenet)
        names = {path.suffix for path in (root / "working").rglob("*") if path.is_file()}
        assert names == {".npy", ".json"}, "nothing but the index"
        assert [line for line in told if "listing the images" in line]

    def test_stays_the_same_where_the_mount_moves_and_comes_along_from_an_output(
        self, root: Path, imagenet: Path
    ) -> None:
        folder = ImagenetIndex(imagenet, root / "working", root / "temp").make([], lambda _: None)
        before = {split: Index.open(folder / split).hash for split in ("train", "val")}
        # The next session: another mount, and what was in working is attached.
        nested = root / "input" / "competitions" / "imagenet"
        nested.parent.mkdir()
        imagenet.rename(nested)
        shutil.move(root / "working", root / "input" / "output")
        (root / "working").mkdir()
        shutil.rmtree(root / "temp")
        found = look(root / "input")
        assert [data.folder for data in found.data_sets] == [nested], "an index is no data set by itself"
        told: list[str] = []
        again = ImagenetIndex(nested, root / "working", root / "temp").make(found.indexes, told.append)
        assert again == folder and told == [], "nothing was listed again"
        opened = {split: Index.open(again / split) for split in ("train", "val")}
        assert {split: index.hash for split, index in opened.items()} == before
        assert Path(opened["train"].data_root, opened["train"].key(0)).resolve().is_relative_to(nested)

    def test_of_other_images_has_another_name(self, root: Path, imagenet: Path) -> None:
        before = ImagenetIndex(imagenet, root / "working", root / "temp").name
        (imagenet / "ILSVRC/Data/CLS-LOC/train/n10").rename(imagenet / "n10")
        assert ImagenetIndex(imagenet, root / "working", root / "temp").name != before

    def test_is_refused_in_one_line_where_the_lists_do_not_fit(self, root: Path, imagenet: Path) -> None:
        (imagenet / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000002.JPEG").unlink()
        with pytest.raises(ValueError, match=r"ILSVRC2012_val_00000002\.JPEG: missing") as caught:
            ImagenetIndex(imagenet, root / "working", root / "temp").make([], lambda _: None)
        assert len(str(caught.value).splitlines()) == 1
        assert str(caught.value).startswith(str(imagenet)), "the mount, not our link to it"

    def test_of_a_former_format_is_not_taken(self, root: Path, imagenet: Path) -> None:
        index = ImagenetIndex(imagenet, root / "working", root / "temp")
        folder = index.make([], lambda _: None)
        manifest = json.loads((folder / "val" / "manifest.json").read_text())
        (folder / "val" / "manifest.json").write_text(json.dumps({**manifest, "data_root": "/elsewhere"}))
        assert index.find([]) is None
