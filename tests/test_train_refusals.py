"""Claims about input that the training command refuses: one line, exit code 2, nothing changed on disk."""

import os
from pathlib import Path

import pytest
import torch

from ast_dist.data.index import Index
from ast_dist.errors import run_command
from ast_dist.fault.lease import Lease
from ast_dist.train import main
from tests.shards import squares, write_split
from tests.training import refused, snapshot, words, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated run that is done."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert run_command(main, words(shards, run_dir, "--data.cache", "none", "--gate.anneal-share", "0")) == 0
    return run_dir


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--gate.target-rat", "0.3"], "--gate.target-rate"),
        (["--loop.epochs", "many"], "--loop.epochs"),
        (["--loop.global-batch-size", "0"], "loop.global_batch_size is 0, must be at least 1"),
        (["--gate.target-rate", "0.1"], "gate.p_min is 0.2, but must lie in 0 … 0.1, the lowest rate"),
        (["--preset", "digit"], "There are: "),
        (["--model.name", "resnet51"], "Perhaps you meant: "),
        (["--model.num-classes", "4"], "has label 9, but the model has 4 classes"),
        (["--resume", "must"], "holds no run"),
        (["--data.train", "nowhere"], "nowhere: no such folder"),
        (["--data.cache", "ram", "--data.cache-mb", "0"], "data.cache_mb"),
        pytest.param(
            ["--loop.precision", "fp16"],
            "which is for GPUs",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine on a GPU"),
        ),
    ],
)
def test_bad_arguments_get_one_line_and_leave_no_trace(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    run_dir = tmp_path / "run"
    assert says in refused(words(shards, run_dir, *more), capsys)
    assert not run_dir.exists()


def test_a_typo_in_a_yaml_file_is_told_with_the_files_name(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gate: {target_rat: 0.3}\n")
    line = refused(words(shards, tmp_path / "run", "--config", str(file)), capsys)
    assert str(file) in line
    assert "Perhaps you meant: --gate.target-rate" in line


def test_a_global_batch_smaller_than_the_world_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "17")
    line = refused(words(shards, tmp_path / "run"), capsys)
    assert "loop.global_batch_size is 16, but there are 17 processes" in line
    assert not (tmp_path / "run").exists()


def test_a_shard_shorter_than_its_manifest_says_is_refused_with_both_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        write_split(tmp_path / split, squares(20, side=8))
    shard = Index.open(tmp_path / "train").shard_paths[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 512)
    line = refused(words(tmp_path, tmp_path / "run"), capsys)
    assert f"{size - 512:,} bytes" in line
    assert f"{size:,}" in line
    assert shard.name in line


def test_another_configuration_is_refused_with_the_difference_and_changes_nothing(
    finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    more = ("--data.cache", "none", "--gate.anneal-share", "0", "--gate.target-rate", "0.3")
    line = refused(words(shards, finished, *more), capsys)
    assert "gate.target_rate: 0.6 → 0.3" in line
    assert "data.cache" not in line
    assert snapshot(finished) == before


def test_other_data_under_the_same_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_split(tmp_path / split, squares(20, side=8))
    assert run_command(main, words(tmp_path, tmp_path / "run", "--loop.epochs", "1")) == 0
    (tmp_path / "train").rename(tmp_path / "old")
    write_split(tmp_path / "train", squares(21, side=8))
    assert "manifest.train: " in refused(words(tmp_path, tmp_path / "run", "--loop.epochs", "1"), capsys)


def test_a_folder_of_other_things_is_not_taken_for_a_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    before = snapshot(tmp_path)
    assert "thesis.tex" in refused(words(shards, tmp_path), capsys)
    assert snapshot(tmp_path) == before


def test_a_run_that_another_process_holds_is_refused_with_its_owner(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lease = Lease(run_dir)
    before = snapshot(run_dir)
    assert f'"pid": {os.getpid()}' in refused(words(shards, run_dir), capsys)
    assert snapshot(run_dir) == before
    lease.release()


def test_an_unwritable_run_dir_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(words(shards, tmp_path / "file/run"), capsys)
