"""Goodput: the share of the time that went into steps which were not done again; measured, and by formula.

The formula is Daly's (J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
Future Generation Computer Systems 22, 2006, pp. 303-312), which extends Young's (J. W. Young, "A first order
approximation to the optimum checkpoint interval", Communications of the ACM 17, 1974, pp. 530-531). For failures
that come as a Poisson process with a mean time of M between them, useful time T takes

    wall = M · exp(R / M) · (exp((τ + δ) / M) − 1) · T / τ

with a save after each τ of useful time that costs δ, and R from a failure to the first step. The best τ is, to first
order, Young's √(2·δ·M), and Daly's √(2·δ·M) · (1 + ⅓·√(δ / 2M) + ⅑·δ / 2M) − δ. Saves that go on in the background
are not in the formula: the work between a snapshot and its commit is at risk as well, so the time to commit is added
to R, and δ is all that a save takes from the throughput, the part in the background included.
"""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults_recovery import KILL_RANK
from benchmarks.faults_runs import Job, Tool, Training

_FOREVER = 1_000_000
_RANKS = (8, 256, 4096)
_MTBF_H = (1.0, 24.0)
_DEFAULT_EVERY_S = 120.0
# Nobody has measured this package's recovery on thousands of ranks; a prediction says what ten times as much would do.
_SLOWER = 10.0


def goodput_by_formula(mtbf_s: float, every_s: float, save_s: float, recovery_s: float) -> float:
    """Daly's goodput, 0 … 1: useful time over wall-clock. All in seconds; recovery_s includes the time to commit."""
    exponent = (recovery_s + every_s + save_s) / mtbf_s
    if exponent > 700.0:
        return 0.0
    wall_s = mtbf_s * math.exp(recovery_s / mtbf_s) * math.expm1((every_s + save_s) / mtbf_s)
    return every_s / wall_s


def best_interval_s(mtbf_s: float, save_s: float) -> float:
    """Daly's best useful time between saves, seconds; for saves so long that it has no meaning, the MTBF."""
    if save_s >= 2.0 * mtbf_s:
        return mtbf_s
    half = save_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * save_s * mtbf_s) * (1.0 + math.sqrt(half) / 3.0 + half / 9.0) - save_s


def goodput_of_regular_kills(kill_every_s: float, every_s: float, save_s: float, recovery_s: float) -> float:
    """What kills at a regular interval leave, 0 … 1: each costs the recovery and half a save's interval."""
    lost_s = recovery_s + min(every_s, kill_every_s) / 2.0
    return max(0.0, 1.0 - lost_s / kill_every_s) * every_s / (every_s + save_s)


def measure_goodput(
    tool: Tool,
    quiet_tool: Tool,
    training: Training,
    folder: Path,
    *,
    kill_every_s: float,
    interval_s: float,
    minutes: float,
    quiet_s: float,
) -> dict[str, Any]:
    """Kill a random rank every so often, give or take half of a save's interval, for so many minutes. Returns a row.

    interval_s: between saves.

    quiet_tool: the same training that saves nothing; how fast it trains, before and after, for quiet_s each, is the
    undisturbed step. goodput: steps that remained, times the undisturbed step, over the wall-clock.
    """
    before_ms = _undisturbed_step_ms(quiet_tool, training, folder / "before", quiet_s)
    generator = random.Random(training.seed)
    with Job(tool, training, folder / "run", _FOREVER) as job:
        job.wait_for(lambda: any(job.run_dir.glob(tool.saved)), "a checkpoint")
        first_step, began = job.steps_done(), time.monotonic()
        kills = int(60.0 * minutes / kill_every_s)
        for kill in range(1, kills + 1):
            # The last stretch ends like the others, without a kill. Saves come at regular times, too: kills that did
            # would all meet the same moment between two of them.
            shift_s = generator.uniform(-0.5, 0.5) * min(interval_s, kill_every_s / 4)
            _watch_until(job, began + kill * kill_every_s + (shift_s if kill < kills else 0.0))
            if kill < kills:
                job.wait_for(lambda: len(job.workers()) == training.processes, "all workers")
                KILL_RANK.strike(job, generator)
        # A job that is just starting again has lost what it will repeat.
        job.wait_for(lambda: job.has_recovered, "a first step")
        wall_s = time.monotonic() - began
        steps = job.steps_done() - first_step
        repeated = sum(row["steps_repeated"] for row in job.starts())
    after_ms = _undisturbed_step_ms(quiet_tool, training, folder / "after", quiet_s)
    step_ms = (before_ms + after_ms) / 2.0
    return {
        "tool": tool.name,
        "saves": tool.saves,
        "source": "measured",
        "kill_every_s": kill_every_s,
        "minutes": wall_s / 60.0,
        "kills": kills - 1,
        "goodput": steps * step_ms / 1000.0 / wall_s,
        "steps": steps,
        "steps_lost": repeated,
        "step_before_ms": before_ms,
        "step_after_ms": after_ms,
        "seed": training.seed,
    }


def predictions(save_s: float, commit_s: float, recovery_s: float) -> Iterator[dict[str, Any]]:
    """Rows of what the formula says of long runs, from the parts measured on this machine.

    save_s: what a save takes from the throughput. commit_s: from the snapshot to the commit. recovery_s: from a kill to
    the first step. All three are taken as they were measured here, whatever the number of ranks: replicated state is
    written once however many ranks there are, but the start of thousands of processes may take longer, so each row also
    says what a recovery ten times as long would leave.
    mtbf_of: whose mean time between failures it is, the whole job's, where the number of ranks changes nothing, or one
    rank's, where the job's is that over the ranks.
    """
    for mtbf_h in _MTBF_H:
        yield _prediction("the job", mtbf_h, 0, 3600.0 * mtbf_h, save_s, commit_s, recovery_s)
        for ranks in _RANKS:
            yield _prediction("one rank", mtbf_h, ranks, 3600.0 * mtbf_h / ranks, save_s, commit_s, recovery_s)


def _prediction(
    mtbf_of: str, mtbf_h: float, ranks: int, job_mtbf_s: float, save_s: float, commit_s: float, recovery_s: float
) -> dict[str, Any]:
    best_s = best_interval_s(job_mtbf_s, save_s)

    def goodput(every_s: float, slower: float = 1.0) -> float:
        return goodput_by_formula(job_mtbf_s, every_s, save_s, slower * recovery_s + commit_s)

    return {
        "mtbf_of": mtbf_of,
        "mtbf_h": mtbf_h,
        "ranks": f"{ranks:,}" if ranks else " / ".join(f"{count:,}" for count in _RANKS),
        "job_mtbf_s": job_mtbf_s,
        "goodput_default": goodput(_DEFAULT_EVERY_S),
        "best_every_s": best_s,
        "goodput_best": goodput(best_s),
        "goodput_best_slow": goodput(best_s, _SLOWER),
        "save_ms": 1000.0 * save_s,
        "commit_s": commit_s,
        "recovery_s": recovery_s,
    }


def _watch_until(job: Job, moment: float) -> None:
    """Let it train until a moment, a tool that a person must start again being started again at once."""
    job.wait_for(lambda: time.monotonic() >= moment, "the next kill", 0.05)


def _undisturbed_step_ms(tool: Tool, training: Training, run_dir: Path, seconds: float) -> float:
    with Job(tool, training, run_dir, _FOREVER) as job:
        job.wait_for(lambda: job.steps_done() >= 3, "step 3")
        first_step, began = job.steps_done(), time.monotonic()
        job.let_run(seconds)
        # From one step's end to another's: a beat is younger than the step that it counts.
        last_step = job.steps_done()
        job.wait_for(lambda: job.steps_done() > last_step, "another step", 0.001)
        return 1000.0 * (time.monotonic() - began) / (job.steps_done() - first_step)
