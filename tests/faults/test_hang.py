"""Claims about a rank that hangs: the others say so, and the run goes on from its checkpoint, bit for bit."""

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ast_dist.track.history import read as read_rows
from tests import training
from tests.faults.harness import MOST_REPEATED
from tests.launching import finish, start, steps_done, wait_for
from tests.training import state_hash, write_shards

STOPS = 5
EPOCHS = 8
STEPS_AN_EPOCH = 20
WATCHDOG_S = 3.0
# What the restart may take beside the time-out, by the run's own promise.
RESTART_S = 10.0


def words(shards: Path, run_dir: Path) -> list[str]:
    return [
        *("-m", "ast_dist.train", *training.words(shards, run_dir), "--loop.epochs", str(EPOCHS)),
        *("--loop.global-batch-size", "12", "--gate.policy", "full", "--checkpoint.every-steps", "7"),
        *("--fault.watchdog-s", str(WATCHDOG_S)),
    ]


def workers(agent_pid: int) -> dict[int, int]:
    """Live processes by rank that an agent has started."""
    return dict(_workers(agent_pid))


def _workers(agent_pid: int) -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == agent_pid and state != "Z":
            yield from ((int(v[5:]), int(folder.name)) for v in variables if v.startswith(b"RANK="))


@pytest.mark.faults
def test_a_stopped_rank_is_named_killed_and_restarted_within_the_time_out_and_10_s(
    tmp_path: Path, rng: random.Random
) -> None:
    shards = write_shards(tmp_path / "shards", 12 * STEPS_AN_EPOCH)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(*words(shards, whole), world_size=2))

    share = EPOCHS * STEPS_AN_EPOCH // (STOPS + 1)
    points = [(share * i + rng.randrange(1, share), rng.randrange(2)) for i in range(STOPS)]
    print(f"SIGSTOP at (step, rank) {points}")
    job = start(*words(shards, stopped), world_size=2, max_restarts=STOPS)
    held: list[int] = []
    kills_s: list[float] = []
    for number, (step, rank) in enumerate(points):
        wait_for(
            lambda number=number, step=step: len(first_steps(stopped)) == number and steps_done(stopped) >= step,
            f"step {step} after {number} restarts",
            job,
        )
        held.append(workers(job.pid)[rank])
        os.kill(held[-1], signal.SIGSTOP)
        began = time.monotonic()
        wait_for(lambda rank=rank: workers(job.pid).get(rank) != held[-1], "the kill", job)
        kills_s.append(time.monotonic() - began)
    output = finish(job)

    assert state_hash(stopped) == state_hash(whole)
    recoveries_s = first_steps(stopped)
    limits_s = [float(text) for text in re.findall(r"the limit is ([\d.]+) s", output)]
    print(f"limits {limits_s} s, killed after {[round(s, 1) for s in kills_s]} s, recoveries {recoveries_s} s")
    assert len(recoveries_s) == len(limits_s) == STOPS
    for pid, (_, rank) in zip(held, points, strict=True):
        assert f"rank {rank} (process {pid}) was stopped by a signal, and is killed" in output
    assert output.count("Current thread") == STOPS
    assert "forcefully exiting" not in output, "torchrun kills, too, but 30 s after its SIGTERM"
    assert "all_reduce" in output, "the stacks show what was waited for"
    assert all(s <= limit_s + RESTART_S for s, limit_s in zip(recoveries_s, limits_s, strict=True))
    assert all(row.get("steps_repeated", 0) <= MOST_REPEATED for row in read_rows(stopped / "sessions.jsonl"))


def first_steps(run_dir: Path) -> list[float]:
    """Seconds from the last sign of life to the first step, of every start but the first."""
    rows = read_rows(run_dir / "sessions.jsonl")
    return [row["recovery_s"] for row in rows if row.get("event") == "first_step" and row.get("recovery_s") is not None]
