"""Claims about being asked to stop: it ends within the grace, loses no step, says so, and goes on as if never asked."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.harness import Reference, Run, random_steps, words
from tests.training import state_hash

GRACE_S = 20.0


def assert_nothing_lost(run: Run, reason: str) -> None:
    """The run ended in mid-training with all its steps in a checkpoint, and says why."""
    progress = run.progress()
    assert progress["state"] == "paused"
    assert progress["message"] == reason
    assert progress["step"] == run.step, "the heartbeat knows of no step that the checkpoint lacks"
    assert progress["checkpoint"] == f"step-{run.step:08d}"


def test_sigterm_to_the_agent_and_sigusr1_to_a_rank_lose_no_step_at_any_point(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(2)
    # Saved when asked to and at no other time: whatever was not saved then would have to be repeated.
    argv = words(shards, tmp_path / "run", "--checkpoint.every-steps", "0", "--checkpoint.grace-s", str(GRACE_S))
    stopped_at = [0]
    for number, step in enumerate(random_steps(rng, reference.steps, count=10)):
        with Run(argv, world_size=2) as run:
            run.wait_for_step(step)
            ranks, began = run.pids, time.monotonic()
            if number % 2 == 0:
                run.job.send_signal(signal.SIGTERM)
            else:
                os.kill(ranks[rng.randrange(2)], signal.SIGUSR1)
            code = run.end()
            assert time.monotonic() - began < GRACE_S
        assert "ending without" not in run.output, "no rank ran into its grace"
        # 1 is torchrun's own word for a signal; progress.json tells what the workers made of it.
        assert code == (1 if number % 2 == 0 else 0)
        assert_nothing_lost(run, f"{'SIGTERM' if number % 2 == 0 else 'SIGUSR1'}: preempted, nothing lost")
        start = run.starts()[-1]
        assert (start["steps_repeated"], start["resumed_from_step"]) == (0, stopped_at[-1])
        stopped_at.append(run.step)
    with Run(argv, world_size=2) as run:
        run.finish()
    assert run.starts()[-1]["resumed_from_step"] == stopped_at[-1] > 0
    assert state_hash(run.run_dir) == reference.sha256


def test_the_sessions_deadline_ends_it_with_exit_code_0_and_no_step_lost(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(2)
    # Drawn in what starting takes on this machine: a session that is over when it begins trains a step or two.
    start_s, deadlines, number, stopped_at = 0.0, 0, 0, 0
    while deadlines < 6:
        argv = words(shards, tmp_path / f"run-{number}", "--checkpoint.every-steps", "0")
        began = time.monotonic()
        hours = max(1e-4, rng.uniform(1.05, 1.3) * start_s / 3600)
        with Run([*argv, "--session.hours", str(hours)], world_size=2) as run:
            run.wait_for_step(stopped_at + 1)
            start_s = start_s or time.monotonic() - began
            run.finish()
        start = run.starts()[-1]
        assert (start["steps_repeated"], start["resumed_from_step"]) == (0, stopped_at)
        if run.progress()["state"] == "finished":  # a machine that has become faster; the next run then
            assert number < 3, "no deadline is kept"
            assert state_hash(run.run_dir) == reference.sha256
            number, stopped_at = number + 1, 0
            continue
        assert_nothing_lost(run, "session deadline: saved, nothing lost; run the same command again")
        deadlines, stopped_at = deadlines + 1, run.step
    with Run(argv, world_size=2) as run:
        run.finish()
    assert state_hash(run.run_dir) == reference.sha256
