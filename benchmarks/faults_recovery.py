"""Strike a training again and again at random moments: what is repeated, and how long until it steps again."""

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from benchmarks.faults_record import END_NAME, hash_tensors
from benchmarks.faults_runs import Job, Tool, Training, is_alive

_FOREVER = 1_000_000
# A little above 1: now and then a save comes in between.
_BETWEEN = (0.1, 1.3)
_PARTS = ("detect_s", "restart_s", "load_s", "first_step_s")


@dataclass(frozen=True)
class Fault:
    """A way to strike a job. name: as the tables say it. strike: called with the job and a generator of its own."""

    name: str
    strike: Callable[[Job, random.Random], None]


def _kill_rank(job: Job, generator: random.Random) -> None:
    workers = job.workers()
    os.kill(workers[generator.choice(sorted(workers))], signal.SIGKILL)


def _stop_rank(job: Job, generator: random.Random) -> None:
    workers = job.workers()
    os.kill(workers[generator.choice(sorted(workers))], signal.SIGSTOP)


def _kill_agent(job: Job, _: random.Random) -> None:
    os.kill(job.agent(), signal.SIGKILL)


def _terminate(job: Job, _: random.Random) -> None:
    os.kill(job.process.pid, signal.SIGTERM)


KILL_RANK = Fault("SIGKILL of a rank", _kill_rank)
KILL_AGENT = Fault("SIGKILL of the agent", _kill_agent)
TERMINATE = Fault("SIGTERM to the agent", _terminate)
STOP_RANK = Fault("SIGSTOP of a rank", _stop_rank)


def recover(tool: Tool, fault: Fault, training: Training, run_dir: Path, *, tries: int) -> dict[str, Any]:
    """Strike one job `tries` times. Returns a row.

    The first strike waits for a checkpoint, and how long that took from the first step is the tool's interval, in
    seconds. Between a first step and the next strike lies a random part of it (_BETWEEN), drawn from the training's
    seed, the same part for all tools: a tool that saves once an epoch is struck anywhere in one.

    steps_lost: steps done before the strike that had to be done again. recovery_s: from the strike to the end of the
    first step after it. Its parts: detect_s until the old workers are gone, restart_s until rank 0 of the new ones has
    imported all it needs, load_s until it has met the others, built the model, and found, verified and loaded the
    checkpoint, first_step_s from there. unloadable: checkpoints that were found damaged on the way.
    """
    generator = random.Random(training.seed)
    found: list[dict[str, float]] = []
    with Job(tool, training, run_dir, _FOREVER) as job:
        job.wait_for(lambda: job.steps_done() >= 1, "a step")
        began = time.monotonic()
        job.wait_for(lambda: any(run_dir.glob(tool.saved)), "a checkpoint")
        interval_s = time.monotonic() - began
        for _ in range(tries):
            job.let_run(generator.uniform(*_BETWEEN) * interval_s)
            found.append(_strike(job, fault, generator))
    row: dict[str, Any] = {
        "tool": tool.name,
        "fault": fault.name,
        "saves": tool.saves,
        "interval_s": interval_s,
        "tries": tries,
        "unloadable": len(list(run_dir.glob("checkpoints/.corrupt-*"))),
        "steps_lost_median": statistics.median(one["steps_lost"] for one in found),
        "steps_lost_max": max(one["steps_lost"] for one in found),
        "recovery_s_median": statistics.median(one["recovery_s"] for one in found),
        "recovery_s_max": max(one["recovery_s"] for one in found),
    }
    for part in _PARTS:
        row[f"{part}_median"] = statistics.median(one[part] for one in found)
        row[f"{part}_max"] = max(one[part] for one in found)
    return {**row, "by_hand": tool.by_hand, "seed": training.seed}


def _strike(job: Job, fault: Fault, generator: random.Random) -> dict[str, float]:
    """Strike once and wait for the first step after it."""
    starts, first_steps, old = len(job.starts()), len(job.first_steps()), list(job.workers().values())
    struck_at = time.time()
    fault.strike(job, generator)
    job.wait_for(lambda: not any(map(is_alive, old)), "the end of the old workers")
    gone_at = time.time()
    job.wait_for(lambda: len(job.first_steps()) > first_steps, "a first step")
    start, first_step = job.starts()[-1], job.first_steps()[-1]
    if len(job.starts()) != starts + 1:
        raise RuntimeError(f"{len(job.starts()) - starts} starts after one strike: {job.last_lines()}")
    began_at, started = start["started"]["began_at"], start["started"]
    first_step_at = began_at + first_step["first_step_s"]
    return {
        "steps_lost": start["steps_repeated"],
        "recovery_s": first_step_at - struck_at,
        "detect_s": gone_at - struck_at,
        "restart_s": began_at + started["imported_s"] - gone_at,
        "load_s": started["loaded_s"] - started["imported_s"],
        "first_step_s": first_step["first_step_s"] - started["loaded_s"],
    }


def compare_ends(tool: Tool, training: Training, folder: Path, *, epochs: int, kill_at_step: int) -> dict[str, Any]:
    """Train to the end twice, once with a rank killed in mid-epoch. Returns a row; `identical` is the finding.

    kill_at_step: steps done when the rank is killed; a tool that saves in mid-epoch should have saved before.
    """
    whole, killed = folder / "whole", folder / "killed"
    with Job(tool, training, whole, epochs) as job:
        job.wait_for(lambda: job.process.poll() == 0 and _end(whole), "the end", 0.1)
    generator = random.Random(training.seed)
    with Job(tool, training, killed, epochs) as job:
        job.wait_for(lambda: job.steps_done() >= kill_at_step, f"step {kill_at_step}")
        _kill_rank(job, generator)
        job.wait_for(lambda: job.process.poll() == 0 and _end(killed), "the end", 0.1)
        resumed_from = job.starts()[-1]["resumed_from_step"]
        steps_lost = job.starts()[-1]["steps_repeated"]
    (steps, digest), (steps_killed, digest_killed) = _end(whole) or (0, ""), _end(killed) or (0, "")
    return {
        "tool": tool.name,
        "saves": tool.saves,
        "steps": steps,
        "steps_killed": steps_killed,
        "steps_an_epoch": steps / epochs,
        "killed_at_step": kill_at_step,
        "resumed_from_step": resumed_from,
        "steps_lost": steps_lost,
        "identical": digest == digest_killed,
        "sha256": digest,
        "sha256_killed": digest_killed,
        "seed": training.seed,
    }


def _end(run_dir: Path) -> tuple[int, str] | None:
    """Steps and the SHA-256 of the final weights and batch statistics; None while there are none."""
    if (run_dir / END_NAME).is_file():
        content = json.loads((run_dir / END_NAME).read_text(encoding="utf-8"))
        return content["steps"], content["sha256"]
    progress = run_dir / "progress.json"
    if not progress.is_file() or json.loads(progress.read_text(encoding="utf-8"))["state"] != "finished":
        return None
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    return state["global_step"], hash_tensors(dict(_flat(state["model"])))


def _flat(state: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Tensors of nested dicts under their joined names."""
    found: list[tuple[str, Any]] = []
    for key, value in state.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
