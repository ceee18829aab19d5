"""Claims about measuring a run's weights again: the figures of its training come back, on any number of processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ast_dist.errors import run_command
from ast_dist.evaluate import main
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from ast_dist.train import main as train
from tests import training
from tests.launching import finish, start
from tests.shards import restate, squares, write_split
from tests.training import snapshot, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    more = ("--optim.ema-decay", "0.9", "--loop.epochs", "2", "--track.quiet")
    assert run_command(train, training.words(shards, run_dir, *more)) == 0
    return run_dir


def measured(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run_command(main, [*map(str, argv), "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert run_command(main, [str(word) for word in argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_the_figures_of_the_training_come_back_for_both_weights_and_nothing_is_written(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(run_dir)
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]
    for row, checkpoint in zip(rows, committed(run_dir / "checkpoints"), strict=True):
        for weights, prefix in (("model", "val/"), ("ema", "val/ema_")):
            found = measured(capsys, run_dir, "--checkpoint", checkpoint.name, "--weights", weights)
            assert found["acc1"] == row[f"{prefix}acc1"]
            assert found["loss"] == pytest.approx(row[f"{prefix}loss"], rel=1e-6)
            assert (found["checkpoint"], found["weights"], found["samples"]) == (checkpoint.name, weights, 20)
    assert snapshot(run_dir) == before


def test_two_processes_find_what_one_finds(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = measured(capsys, run_dir)
    output = finish(start("-m", "ast_dist.evaluate", str(run_dir), "--json", world_size=2))
    together = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert together == alone


def test_another_split_is_measured_with_the_runs_own_preprocessing(
    run_dir: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(capsys, run_dir, "--data.val", shards / "train")
    assert found["samples"] == training.NUM_SAMPLES
    capsys.readouterr()
    assert run_command(main, [str(run_dir), "--data.val", str(shards / "train")]) == 0
    assert f"top-1 {found['acc1']:.2f} %, top-5 {found['acc5']:.2f} %, loss" in capsys.readouterr().out


def test_a_split_whose_labels_mean_something_else_is_refused(
    run_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "few", squares(8, side=8), num_classes=4)
    assert "has 4 classes and the run 10" in refused(capsys, run_dir, "--data.val", tmp_path / "few")
    restate(write_split(tmp_path / "wrong", squares(8, side=8)), "label", 3, 77)
    assert "has labels 0 … 77" in refused(capsys, run_dir, "--data.val", tmp_path / "wrong")
    assert "no such folder" in refused(capsys, run_dir, "--data.val", tmp_path / "nowhere")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    lost = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(lost / "checkpoints")
    assert "holds no checkpoint yet" in refused(capsys, lost)
