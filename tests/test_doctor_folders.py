"""The doctor looks at data as training does, and at the disk below a run."""

import json
from pathlib import Path

import pytest

from ast_dist import doctor, doctor_folders
from ast_dist.data.index import MANIFEST_NAME, Index
from ast_dist.doctor_folders import check_run_dir, splits_at
from ast_dist.errors import run_command
from ast_dist.train import main
from tests.shards import overwrite, restate, squares, write_split
from tests.training import words, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def probe(location: Path) -> list[doctor.Check]:
    return list(doctor_folders.probe_data(str(location)))


def test_a_sound_split_is_ok_with_its_counts_and_a_decoded_sample(shards: Path) -> None:
    (found,) = probe(shards / "train")
    assert found.status == "ok"
    assert found.detail == (f"{shards / 'train'}: 96 samples of 10 classes in 3 shards, the first decodes (8 × 8)")


def test_a_folder_of_splits_stands_for_all_of_them(shards: Path) -> None:
    assert splits_at(str(shards)) == [str(shards / "train"), str(shards / "val")]
    assert [found.status for found in probe(shards)] == ["ok", "ok"]
    assert splits_at("s3://bucket/set") == ["s3://bucket/set"]


def break_manifest(split: Path) -> None:
    manifest = json.loads((split / MANIFEST_NAME).read_text())
    (split / MANIFEST_NAME).write_text(json.dumps(manifest | {"num_samples": 97}))


BREAKS = {
    "97 samples, but its shards hold 96": break_manifest,
    "is missing": lambda split: next(split.glob("*.tar")).unlink(),
    "bytes, but the manifest states": lambda split: next(split.glob("*.tar")).write_bytes(b"short"),
    "labels go from 0 to 12": lambda split: restate(Index.open(split), "label", 5, 12),
    "no manifest.json": lambda split: (split / MANIFEST_NAME).unlink(),
    "sample 0000000-x": lambda split: overwrite(Index.open(split), 0, b"no image"),
}


@pytest.mark.parametrize("said", BREAKS)
def test_a_broken_split_fails_with_what_is_wrong(said: str, tmp_path: Path) -> None:
    split = tmp_path / "train"
    write_split(split, squares(96, side=8))
    BREAKS[said](split)
    (found,) = probe(split)
    assert found.status == "FAIL"
    assert said in found.detail and str(tmp_path) in found.detail


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of a keep_last of 2."""
    run_dir = tmp_path_factory.mktemp("runs") / "saved"
    options = ("--loop.epochs", "1", "--checkpoint.keep-last", "2", "--quiet")
    assert run_command(main, words(shards, run_dir, *options)) == 0
    return run_dir


@pytest.mark.parametrize(("room", "status"), [(10.0, "ok"), (3.01, "ok"), (2.9, "warn"), (1.01, "warn"), (0.9, "FAIL")])
def test_a_run_needs_room_for_keep_last_the_best_and_the_one_being_written(
    saved: Path, monkeypatch: pytest.MonkeyPatch, room: float, status: str
) -> None:
    size = sum(path.stat().st_size for path in (saved / "checkpoints").rglob("*") if path.is_file())

    def disk_usage(_path: Path) -> object:
        return type("Usage", (), {"free": room * size})()  # a mock: a disk of this size cannot be had without root

    monkeypatch.setattr(doctor_folders.shutil, "disk_usage", disk_usage)
    found = check_run_dir(saved)
    assert (found.name, found.status) == ("run dir", status), found
    assert bool(found.remedy) == (status != "ok")


def test_a_run_dir_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert check_run_dir(tmp_path / "file").status == "FAIL"
    assert check_run_dir(tmp_path / "file" / "below").status == "FAIL"
    assert check_run_dir(tmp_path / "new" / "run").status == "ok"
