"""Claims about SIGKILL: an interval and the save under way are repeated at most, and in the end nobody could tell."""

import contextlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from tests.faults.harness import MOST_REPEATED, RECOVERY_S, Faults, Reference, Run, random_steps, words
from tests.training import state_hash


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_killed_rank_costs_one_interval_and_ten_seconds_at_most_and_no_bit(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random, world_size: int
) -> None:
    reference = unfaulted(world_size)
    with Run(words(shards, tmp_path / "run"), world_size, max_restarts=5) as run:
        faults = Faults(run)
        for step in random_steps(rng, reference.steps):
            faults.fail_at(rng.randrange(world_size), step)
        strikes = faults.strike()
        run.finish()
    first, *restarts = run.starts()
    assert first["restart"] == 0
    assert [row["restart"] for row in restarts] == [1, 2, 3, 4, 5]
    for strike, row, recovery_s in zip(strikes, restarts, run.recoveries_s(), strict=True):
        assert row["last_step_before"] >= strike.seen
        assert row["steps_repeated"] <= strike.most_repeated, strike
        assert strike.recovery_s <= RECOVERY_S
        assert recovery_s <= RECOVERY_S, "by the run's own record, from its last step to the next"
    assert state_hash(run.run_dir) == reference.sha256
    # The rows that the kills undid are not told twice.
    steps = [row["global_step"] for row in read_rows(run.run_dir / "metrics.jsonl") if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_process_killed_at_any_moment_of_its_life_also_while_it_starts_costs_no_bit(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(1)
    for _ in range(5):
        with Run(words(shards, tmp_path / "run")) as run, contextlib.suppress(subprocess.TimeoutExpired):
            run.job.wait(rng.uniform(1.0, 8.0))
    with Run(words(shards, tmp_path / "run")) as run:
        run.finish()
    assert all(row["steps_repeated"] <= MOST_REPEATED for row in run.starts())
    assert state_hash(run.run_dir) == reference.sha256


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before_and_leaves_no_half_made_one(
    shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run/checkpoints"
    with Run(words(shards, tmp_path / "run", "--checkpoint.every-steps", "1", "--model.width", "64")) as run:
        run.wait_until(lambda: len(committed(folder)) >= 2 and list(folder.glob("stage-*")), "a save")
    before = committed(folder)[-1]
    read(before)  # raises where it does not verify
    more = ("--checkpoint.every-steps", "0", "--model.width", "64", "--resume", "must")
    with Run(words(shards, tmp_path / "run", *more)) as run:
        run.finish()
    assert run.starts()[1]["checkpoint"] == before.name
    assert not list(folder.glob("stage-*"))
