"""Claims about going on: same world size bit for bit, another one with every sample exactly once."""

import json
import os
import signal
from pathlib import Path

import pytest

from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from tests import training
from tests.launching import finish, start, steps_done, wait_for
from tests.training import write_shards

EPOCHS = 5
GLOBAL_BATCH_SIZE = 12
NUM_SAMPLES = 240
STEPS_A_FULL_EPOCH = NUM_SAMPLES // GLOBAL_BATCH_SIZE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), NUM_SAMPLES, 31)


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    """A small training whose middle epochs are gated, with BatchNorm and momentum to restore."""
    return [
        *("-m", "ast_dist.train", *training.words(shards, run_dir), "--optim.warmup-epochs", "1"),
        *("--loop.epochs", str(EPOCHS), "--loop.global-batch-size", str(GLOBAL_BATCH_SIZE)),
        *("--gate.target-rate", "0.5", "--gate.anneal-share", "0.2", "--checkpoint.every-steps", "7"),
        *more,
    ]


def starts(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "sessions.jsonl") if "event" not in row]


def kill(run_dir: Path) -> None:
    """SIGKILL rank 0, the one that writes."""
    os.kill(json.loads((run_dir / ".lease").read_bytes()[16:])["pid"], signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_killed_in_mid_epoch_and_restarted_equals_never_stopped(shards: Path, tmp_path: Path, world_size: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(*words(shards, whole), world_size=world_size))
    job = start(*words(shards, killed), world_size=world_size, max_restarts=1)
    # In a gated epoch, two steps past a checkpoint: the plan itself has to come back, too.
    wait_for(lambda: steps_done(killed) >= STEPS_A_FULL_EPOCH + 10, "step 30", job)
    kill(killed)
    finish(job)
    first, second = starts(killed)
    assert 0 < second["resumed_from_step"] <= second["last_step_before"]
    assert second["resumed_from_step"] % STEPS_A_FULL_EPOCH != 0, "the resume should be in mid-epoch"
    assert first["restart"] == 0
    assert second["restart"] == 1
    assert training.state_hash(killed) == training.state_hash(whole)
    # The rows that the kill undid are not told twice.
    steps = [row["global_step"] for row in read_rows(killed / "metrics.jsonl") if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.faults
def test_stopped_by_sigterm_and_resumed_in_another_world_trains_each_sample_once(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    full = ("--gate.policy", "sundew", "--gate.warmup-epochs", str(EPOCHS))
    job = start(*words(shards, run_dir, *full, "--checkpoint.every-steps", "0"), world_size=2)
    wait_for(lambda: steps_done(run_dir) >= STEPS_A_FULL_EPOCH + 5, "step 25", job)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=60)
    job.stdout.close()
    progress = json.loads((run_dir / "progress.json").read_text())
    assert progress["state"] == "paused"
    assert progress["step"] == steps_done(run_dir), "a clean stop repeats nothing"
    assert progress["step"] % STEPS_A_FULL_EPOCH != 0
    output = finish(start(*words(shards, run_dir, *full), world_size=3))
    assert "finished" in output
    assert starts(run_dir)[1]["resumed_from_step"] == progress["step"]
    assert starts(run_dir)[1]["steps_repeated"] == 0
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    assert state["gate"]["memory"]["visits"].tolist() == [EPOCHS] * NUM_SAMPLES
    assert state["counts"]["backwarded"] == EPOCHS * NUM_SAMPLES


@pytest.mark.faults
def test_killed_while_saving_the_previous_checkpoint_is_resumed(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(*words(shards, run_dir, "--checkpoint.every-steps", "1", "--model.width", "64"))
    folder = run_dir / "checkpoints"
    wait_for(lambda: len(committed(folder)) >= 2 and list(folder.glob("stage-*")), "a save", job)
    job.send_signal(signal.SIGKILL)
    job.wait(timeout=60)
    job.stdout.close()
    before = committed(folder)[-1]
    read(before)  # raises where it does not verify
    changed = ("--checkpoint.every-steps", "0", "--model.width", "64")
    finish(start(*words(shards, run_dir, *changed, "--resume", "must")))
    assert starts(run_dir)[1]["checkpoint"] == before.name
    assert not list(folder.glob("stage-*"))
