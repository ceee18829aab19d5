"""Claims about a run whose number of processes changes in mid-epoch: every sample once an epoch, all the same."""

import random
import signal
from pathlib import Path

import pytest

from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from tests.faults.harness import EPOCHS, MOST_REPEATED, NUM_SAMPLES, SAVE_STEPS, STEPS_A_FULL_EPOCH, Run, words

# Every epoch trains everything, so that each sample's visits are the number of epochs.
FULL = ("--gate.warmup-epochs", str(EPOCHS))


def steps_inside_epochs(rng: random.Random, first_epoch: int, count: int) -> list[int]:
    """Steps in the middle of `count` epochs, one an epoch."""
    return [
        (first_epoch + number) * STEPS_A_FULL_EPOCH + rng.randrange(3, STEPS_A_FULL_EPOCH - 3)
        for number in range(count)
    ]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_2_to_3_to_1_processes_in_mid_epoch_train_each_sample_exactly_once_an_epoch(
    shards: Path, tmp_path: Path, rng: random.Random, by: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    every = ("--checkpoint.every-steps", str(SAVE_STEPS if by == signal.SIGKILL else 0))
    for world_size, step in zip([2, 3, 1, 3, 2], steps_inside_epochs(rng, 1, 5), strict=True):
        with Run(words(shards, run_dir, *FULL, *every), world_size=world_size) as run:
            run.wait_for_step(step)
            if by == signal.SIGKILL:
                run.kill()
            else:
                run.job.send_signal(by)
                run.end()
                assert run.progress()["message"] == "SIGTERM: preempted, nothing lost"
        start = run.starts()[-1]
        assert start["world_size"] == world_size
        if by == signal.SIGTERM:
            assert start["steps_repeated"] == 0
        else:
            assert start["steps_repeated"] <= MOST_REPEATED
    with Run(words(shards, run_dir, *FULL, *every), world_size=1) as run:
        run.finish()
    resumed_from = [row["resumed_from_step"] for row in run.starts()[1:]]
    assert any(step % STEPS_A_FULL_EPOCH for step in resumed_from), "some of them go on in mid-epoch"
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    assert state["gate"]["memory"]["visits"].tolist() == [EPOCHS] * NUM_SAMPLES
    assert state["counts"]["backwarded"] == EPOCHS * NUM_SAMPLES
    assert state["global_step"] == EPOCHS * STEPS_A_FULL_EPOCH
