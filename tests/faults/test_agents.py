"""Claims about agents: what dies with them, and who starts them again, how often, and when not."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import MOST_REPEATED, Reference, Run, is_alive, random_steps, words, workers
from tests.training import snapshot, state_hash

SUPERVISE = ("-m", "ast_dist.supervise", "--backoff-s=0.1")
TORCHRUN = ("launch/torchrun.sh", "--nproc-per-node=2")
EXEC = ("-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])")
ENVIRONMENT = {"PYTHON": sys.executable}
GONE_S = 1.0
GRACE_S = 20.0


def supervised(argv: list[str]) -> Run:
    """A training of two processes whose agent is supervised."""
    return Run([*SUPERVISE, *TORCHRUN, *argv], environment=ENVIRONMENT)


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def agent_with_workers(run: Run) -> tuple[int, list[int]]:
    """The supervised agent and its two workers, once both have been started."""

    def found() -> tuple[int, list[int]] | None:
        for agent in children(run.job.pid):
            if len(ranks := workers(agent)) == 2:
                return agent, list(ranks.values())
        return None

    return run.wait_until(found, "two workers")


def wait_until_gone(pids: list[int], began: float, within_s: float) -> None:
    while any(map(is_alive, pids)):
        assert time.monotonic() - began < within_s, f"{within_s} s after their agent, workers are still alive"
        time.sleep(0.001)


def owner(run: Run) -> int:
    return json.loads((run.run_dir / ".lease").read_bytes()[16:])["pid"]


def test_workers_go_with_a_killed_agent_and_the_supervisor_resumes_to_the_same_bits(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(2)
    # An agent that is started again goes on: only a person begins anew.
    with supervised(words(shards, tmp_path / "run", "--resume", "never")) as run:
        for step in random_steps(rng, reference.steps):
            run.wait_for_step(step)
            agent, pids = agent_with_workers(run)
            before, began = owner(run), time.monotonic()
            os.kill(agent, signal.SIGKILL)
            wait_until_gone(pids, began, GONE_S)
            # The next owner has done a step: what it resumed from is behind it.
            at = run.step
            run.wait_until(lambda before=before, at=at: owner(run) != before and run.step > at, "a step more")
        output = run.finish()
    assert output.count("was killed by SIGKILL") == 5
    assert [row["restart"] for row in run.starts()] == [0, 1, 2, 3, 4, 5]
    assert {row["session"] for row in run.starts()} == {1}, "one start by a person is one session"
    assert max(row["steps_repeated"] for row in run.starts()) <= MOST_REPEATED
    assert state_hash(run.run_dir) == reference.sha256


def test_workers_that_still_import_torch_go_with_their_agent(shards: Path, tmp_path: Path, rng: random.Random) -> None:
    for _ in range(5):
        argv = [
            "-c",
            "import os, sys; os.execv(sys.argv[1], sys.argv[1:])",
            *TORCHRUN,
            *words(shards, tmp_path / "run"),
        ]
        with Run(argv, environment=ENVIRONMENT) as run:
            pids = run.wait_until(lambda run=run: list(workers(run.job.pid).values()), "a worker")
            # Somewhere between the start of its interpreter and the end of its imports.
            cpu_ticks = rng.randrange(0, 100)
            run.wait_until(lambda pid=pids[0], least=cpu_ticks: ticks(pid) >= least, f"{cpu_ticks} ticks of CPU time")
            pids = list(workers(run.job.pid).values())
            run.job.kill()
            wait_until_gone(
                pids, time.monotonic(), 5.0
            )  # an interpreter that has just begun has to get to the question
    assert not (tmp_path / "run").exists()


def ticks(pid: int) -> int:
    """CPU time of a process, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def test_signals_to_the_supervisor_or_to_all_processes_lose_no_step_and_end_with_exit_code_0(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(2)
    argv = words(shards, tmp_path / "run", "--checkpoint.every-steps", "0")
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    for attempt, (number, step) in enumerate(zip(numbers, random_steps(rng, reference.steps), strict=True)):
        with supervised(argv) as run:
            run.wait_for_step(step)
            agent, pids = agent_with_workers(run)
            run.job.send_signal(number)
            if attempt > 2:  # as Slurm and systemd do it: every process of the job gets it
                for pid in [agent, *pids]:
                    os.kill(pid, number)
            run.finish(0)
        assert run.progress()["state"] == "paused"
        assert run.progress()["step"] == run.step
        assert run.starts()[-1]["steps_repeated"] == 0
    with supervised(argv) as run:
        run.finish(0)
    assert run.starts()[-1]["steps_repeated"] == 0
    assert state_hash(run.run_dir) == reference.sha256


@pytest.mark.parametrize(("number", "points"), [(signal.SIGUSR1, 5), (signal.SIGTERM, 1)])
def test_signals_to_an_agent_that_our_launcher_started_lose_no_step(
    shards: Path,
    tmp_path: Path,
    number: signal.Signals,
    points: int,
    unfaulted: Callable[[int], Reference],
    rng: random.Random,
) -> None:
    reference = unfaulted(2)
    argv = [*EXEC, *TORCHRUN, *words(shards, tmp_path / "run"), "--checkpoint.every-steps", "0"]
    for step in random_steps(rng, reference.steps, points):
        with Run(argv, environment=ENVIRONMENT) as run:
            run.wait_for_step(step)
            began = time.monotonic()
            run.job.send_signal(number)
            run.end()
            assert time.monotonic() - began < GRACE_S
        assert run.progress()["state"] == "paused"
        assert run.progress()["message"] == f"{number.name}: preempted, nothing lost"
        assert run.progress()["step"] == run.step
    with Run(argv, environment=ENVIRONMENT) as run:
        run.finish()
    assert state_hash(run.run_dir) == reference.sha256


def test_workers_go_with_a_killed_agent_that_nobody_supervises(
    shards: Path, tmp_path: Path, unfaulted: Callable[[int], Reference], rng: random.Random
) -> None:
    reference = unfaulted(2)
    argv = [*EXEC, *TORCHRUN, *words(shards, tmp_path / "run")]
    for step in random_steps(rng, reference.steps, 5):
        with Run(argv, environment=ENVIRONMENT) as run:
            run.wait_for_step(step)
            pids = list(workers(run.job.pid).values())
            assert len(pids) == 2
            run.job.kill()
            wait_until_gone(pids, time.monotonic(), GONE_S)
    with Run(argv, environment=ENVIRONMENT) as run:
        run.finish()
    assert all(row["steps_repeated"] <= MOST_REPEATED for row in run.starts())
    assert state_hash(run.run_dir) == reference.sha256


def test_nothing_outlives_a_killed_supervisor(shards: Path, tmp_path: Path) -> None:
    with supervised(words(shards, tmp_path / "run")) as run:
        run.wait_for_step(3)
        agent, pids = agent_with_workers(run)
        run.job.kill()
        wait_until_gone([agent, *pids], time.monotonic(), GONE_S)


def test_the_supervisor_starts_an_agent_four_times_when_no_step_is_gained(tmp_path: Path) -> None:
    argv = [*SUPERVISE, "--", sys.executable, "-c", _COUNTED + "sys.exit(1)", str(tmp_path / "starts")]
    with Run([*argv, "--run-dir", str(tmp_path / "run")]) as run:
        output = run.finish(1)
    assert len((tmp_path / "starts").read_text().splitlines()) == 4
    assert "given up: no step beyond step 0 was gained in 3 restarts" in output
    assert len(set((tmp_path / "starts").read_text().splitlines())) == 1, "one session, however many agents"


def test_steps_gained_between_deaths_count_the_restarts_anew(tmp_path: Path) -> None:
    argv = [*SUPERVISE, "--", sys.executable, "-c", _COUNTED + _GAINING, str(tmp_path / "starts")]
    with Run([*argv, "--run-dir", str(tmp_path / "run")]) as run:
        output = run.finish(1)
    assert len((tmp_path / "starts").read_text().splitlines()) == 6 + 3
    assert "no step beyond step 6" in output


def test_workers_that_torchrun_restarts_in_vain_end_the_agent(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(_COUNTED + _DYING_WORKER)
    argv = [*SUPERVISE, "launch/torchrun.sh", "--nproc-per-node=1", str(program), str(tmp_path / "starts")]
    with Run([*argv, "--run-dir", str(tmp_path / "run")], environment=ENVIRONMENT) as run:
        output = run.finish(1)
    assert len((tmp_path / "starts").read_text().splitlines()) in (4, 5), "torchrun may be at its next restart"
    assert "given up" in output


def test_a_users_mistake_ends_it_at_once_with_exit_code_2(shards: Path, tmp_path: Path) -> None:
    argv = words(shards, tmp_path / "run", "--optim.lr", "-1")
    with supervised(argv) as run:
        output = run.finish(2)
    assert output.count("starting it again") == 0
    assert output.splitlines()[-1].startswith("error: ")
    assert "optim.lr" in output.splitlines()[-1]
    assert not snapshot(tmp_path / "run")


def test_a_users_mistake_is_not_tried_a_thousand_times_without_a_supervisor(shards: Path, tmp_path: Path) -> None:
    argv = words(shards, tmp_path / "run", "--optim.lr", "-1")
    with Run([*EXEC, *TORCHRUN, *argv], environment=ENVIRONMENT) as run:
        output = run.finish(1)
    assert output.count("error: ") == 1
    assert not snapshot(tmp_path / "run")


_COUNTED = """
import os, sys
sys.path.insert(0, os.getcwd())
from pathlib import Path
from ast_dist import outcome_file
with open(sys.argv[1], "a") as starts:
    print(os.environ["AST_DIST_SESSION_BEGAN"], file=starts)
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
"""
# Each of the first six starts does one step more than the one before.
_GAINING = """
from ast_dist.fault.lease import Lease
run_dir.mkdir(exist_ok=True)
outcome_file.tell("started", run_dir=str(run_dir), restart=0)
lease = Lease(run_dir, "launch")
lease.beat(min(6, len(Path(sys.argv[1]).read_text().splitlines())))
sys.exit(1)
"""
_DYING_WORKER = """
outcome_file.tell("started", run_dir=str(run_dir), restart=int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
os._exit(1)
"""
