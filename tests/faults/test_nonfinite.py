"""Claims about a loss that is NaN on one rank alone: all ranks skip, roll back or end together, and agree."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from tests.faults.harness import Reference, Run, random_steps, words
from tests.training import state_hash

ALLOWED = 2


def poisoned(shards: Path, run_dir: Path, rank: int, **plan: Any) -> Run:
    """Start a run of two ranks, one of which gets NaN; plan: when, as poisoned_policy.py says."""
    argv = words(shards, run_dir, "--gate.policy", "tests.faults.poisoned_policy:Poisoned")
    argv += ["--fault.nonfinite-steps", str(ALLOWED)]
    return Run(
        argv, world_size=2, environment={"POISON": json.dumps({"rank": rank, **plan}), "WEIGHTS": str(run_dir.parent)}
    )


def assert_ranks_agree(run: Run) -> None:
    """Before each step, the ranks had the same weights, none of which was NaN."""
    first, second = ((run.run_dir.parent / f"weights-of-rank-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert len(first.splitlines()) > 20
    for checkpoint in committed(run.run_dir / "checkpoints"):
        assert all(value.isfinite().all() for value in read(checkpoint)[0]["model"].values())


def rollbacks(run: Run) -> list[dict]:
    return [row for row in read_rows(run.run_dir / "sessions.jsonl") if row.get("event") == "rollback"]


def test_single_steps_that_are_nan_on_one_rank_are_skipped_by_all_and_told_by_one(
    shards: Path, tmp_path: Path, rng: random.Random
) -> None:
    steps = random_steps(rng, 150)
    with poisoned(shards, tmp_path / "run", rng.randrange(2), steps=steps) as run:
        output = run.finish()
    assert output.count(f"step skipped, 1 in a row, {ALLOWED} allowed") == len(steps)
    assert not rollbacks(run)
    assert_ranks_agree(run)
    last = [row for row in read_rows(run.run_dir / "metrics.jsonl") if row["kind"] == "epoch"][-1]
    assert last["train/steps_nonfinite"] == len(steps)


def test_a_row_of_nan_that_passes_is_rolled_back_and_leaves_no_bit(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(2)
    first = rng.randrange(10, 150)
    row = list(range(first, first + ALLOWED + 1))
    with poisoned(shards, tmp_path / "run", rng.randrange(2), steps=row, once=str(tmp_path / "passed")) as run:
        run.finish()
    assert len(rollbacks(run)) == 1
    assert_ranks_agree(run)
    assert state_hash(run.run_dir) == reference.sha256


def test_nan_that_stays_ends_the_run_after_one_roll_back_with_sound_checkpoints(
    shards: Path, tmp_path: Path, rng: random.Random
) -> None:
    with poisoned(shards, tmp_path / "run", rng.randrange(2), epoch=rng.randrange(3, 10)) as run:
        output = run.finish(expected=1)
    assert output.count("error: ") == 1
    assert "going back to the last checkpoint did not help" in output
    assert run.progress()["state"] == "failed"
    assert run.progress()["needs_person"]
    assert len(rollbacks(run)) == 1
    assert_ranks_agree(run)
