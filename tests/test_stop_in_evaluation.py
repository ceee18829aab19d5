"""Claims about a stop that comes in an evaluation: the epoch's weights are saved, and the evaluation is done later."""

import json
import signal
from pathlib import Path

import pytest

from ast_dist.errors import run_command
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests import training
from tests.launching import finish, start
from tests.training import NUM_SAMPLES, progress, state_hash, write_shards

GLOBAL_BATCH_SIZE = 16
STEPS_AN_EPOCH = NUM_SAMPLES // GLOBAL_BATCH_SIZE
EPOCHS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Evaluations of 8 batches.
    return write_shards(tmp_path_factory.mktemp("shards"), num_val=128)


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    gated = ("--gate.warmup-epochs", "1", "--gate.target-rate", "0.9")
    return [*training.words(shards, run_dir), *gated, *more]


def epochs_told(run_dir: Path) -> list[int]:
    return [row["epoch"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]


def val_acc1s(run_dir: Path) -> list[float]:
    return [row["val/acc1"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start("-m", "ast_dist.train", *words(shards, run_dir), world_size=2))
    return run_dir


@pytest.mark.faults
@pytest.mark.parametrize("epoch", [1, EPOCHS], ids=["the_first", "the_last"])
def test_a_signal_to_one_rank_in_an_evaluation_saves_the_epoch_that_is_then_evaluated_on_resume(
    shards: Path, tmp_path: Path, whole: Path, epoch: int
) -> None:
    run_dir = tmp_path / "run"
    steps = [row["global_step"] for row in read_rows(whole / "metrics.jsonl") if row["kind"] == "epoch"]
    step = steps[epoch - 1]
    told = ("1", "2", str(step), "SIGUSR1")
    finish(start("tests/evaluation_program.py", *told, *words(shards, run_dir), world_size=2))
    paused = progress(run_dir)
    assert (paused["state"], paused["message"]) == ("paused", "SIGUSR1: preempted, nothing lost")
    assert (paused["step"], paused["epoch"]) == (step, epoch)
    assert epochs_told(run_dir) == list(range(1, epoch))
    assert committed(run_dir / "checkpoints")[-1].name == f"step-{step:08d}"

    finish(start("-m", "ast_dist.train", *words(shards, run_dir), world_size=2))
    assert progress(run_dir)["state"] == "finished"
    assert epochs_told(run_dir) == [1, 2, 3]
    assert val_acc1s(run_dir) == val_acc1s(whole)
    assert progress(run_dir)["best_acc1"] == progress(whole)["best_acc1"]
    assert state_hash(run_dir) == state_hash(whole)
    # The evaluated state of that step is a checkpoint, with its accuracy, and follows the other.
    manifest = json.loads((run_dir / f"checkpoints/step-{step:08d}-evaluated/manifest.json").read_text())
    assert manifest["val_acc1"] == val_acc1s(whole)[epoch - 1]
    # The run is finished for whoever starts it again.
    output = finish(start("-m", "ast_dist.train", *words(shards, run_dir), world_size=2))
    assert "finished" in output
    assert state_hash(run_dir) == state_hash(whole)


@pytest.mark.faults
def test_a_second_signal_in_the_late_evaluation_puts_it_off_again(shards: Path, tmp_path: Path, whole: Path) -> None:
    run_dir = tmp_path / "run"
    step = STEPS_AN_EPOCH
    for _ in range(2):
        finish(start("tests/evaluation_program.py", "0", "3", str(step), "SIGTERM", *words(shards, run_dir)))
        assert progress(run_dir)["message"] == "SIGTERM: preempted, nothing lost"
        assert progress(run_dir)["step"] == step
    finish(start("-m", "ast_dist.train", *words(shards, run_dir), world_size=2))
    assert epochs_told(run_dir) == [1, 2, 3]


def test_sessions_that_are_always_too_short_still_get_on(shards: Path, tmp_path: Path) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    one_step = ("--loop.global-batch-size", str(NUM_SAMPLES), "--loop.epochs", "3")
    assert run_command(main, words(shards, whole, *one_step)) == 0
    for session in range(1, 10):
        assert run_command(main, words(shards, run_dir, *one_step, "--session.hours", "1e-9")) == 0
        if progress(run_dir)["state"] == "finished":
            break
        assert progress(run_dir)["message"] == "session deadline: saved, nothing lost; run the same command again"
        assert session < 9
    assert epochs_told(run_dir) == [1, 2, 3]
    assert state_hash(run_dir) == state_hash(whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
