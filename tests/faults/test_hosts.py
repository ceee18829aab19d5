"""Claims about hosts: one of three is lost, or leaves, and comes back; and so does the one where they meet.

The hosts are network namespaces. How long a run lasts is up to the test, which ends it once it has seen what it wants
to see: each sample must then have been trained once in each epoch, and once or not at all in the one that was begun.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from tests import hosts, training
from tests.faults.harness import MOST_REPEATED
from tests.hosts import Hosts
from tests.launching import PATIENCE_S, steps_done

GLOBAL_BATCH_SIZE = 12
MANY_EPOCHS = "100000"
PEERS_END_WITHIN_S = 60.0


class Job:
    """One training on three hosts."""

    def __init__(self, cluster: Hosts, shards: Path, run_dir: Path) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self._words = [
            *("-m", "ast_dist.train", *training.words(shards, run_dir), "--optim.warmup-epochs", "1"),
            *("--gate.policy", "sundew", "--gate.warmup-epochs", MANY_EPOCHS, "--loop.epochs", MANY_EPOCHS),
            *("--loop.global-batch-size", str(GLOBAL_BATCH_SIZE), "--checkpoint.every-steps", "7"),
        ]
        self.supervisors = [cluster.start(number, *self._words) for number in range(cluster.count)]

    def start(self, number: int) -> None:
        self.supervisors[number] = self.cluster.start(number, *self._words)

    @property
    def step(self) -> int:
        return steps_done(self.run_dir)

    def starts(self) -> list[dict[str, Any]]:
        path = self.run_dir / "sessions.jsonl"
        return [row for row in read_rows(path) if "event" not in row] if path.exists() else []

    def wait_until(self, condition: Callable[[], Any], what: str, within_s: float = 2 * PATIENCE_S) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen within {within_s:g} s"
            time.sleep(0.005)  # a pause between looks, not a guess at how long something takes

    def wait_for_steps(self, world_size: int, number_of_start: int, more: int) -> None:
        """Wait until the start of that number or a later one trains with that many ranks, `more` steps of it."""

        def trains() -> bool:
            starts = self.starts()
            if len(starts) <= number_of_start or starts[-1]["world_size"] != world_size:
                return False
            return self.step >= starts[-1]["resumed_from_step"] + more

        self.wait_until(trains, f"{more} steps with {world_size} hosts")

    def stop(self) -> None:
        """The whole job is preempted: every host is told so at its own time."""
        for supervisor in self.supervisors:
            supervisor.send_signal(signal.SIGTERM)
        assert [supervisor.wait(PATIENCE_S) for supervisor in self.supervisors] == [0, 0, 0]

    def assert_each_sample_once_an_epoch(self) -> None:
        progress = training.progress(self.run_dir)
        assert progress["state"] == "paused"
        assert progress["step"] == self.step, "nothing is lost"
        state, _ = read(committed(self.run_dir / "checkpoints")[-1])
        visits = state["gate"]["memory"]["visits"]
        assert visits.sum().item() == state["counts"]["backwarded"] == self.step * GLOBAL_BATCH_SIZE
        assert set(visits.tolist()) <= {state["epoch"], state["epoch"] + 1}


@pytest.fixture
def make_job(shards: Path, tmp_path: Path) -> Iterator[Callable[[int], Job]]:
    """Starts a training on three hosts that meet at the given one. Leaves no process and no namespace behind."""
    if reason := hosts.missing():
        pytest.skip(reason)
    made: list[Hosts] = []

    def make(rendezvous: int) -> Job:
        made.append(Hosts(3, tmp_path, rendezvous))
        return Job(made[-1], shards, tmp_path / "run")

    try:
        yield make
    finally:
        for cluster in made:
            cluster.close()
            for log in cluster.logs:
                print(f"--- {log.name} ---\n{log.read_text(errors='replace')}")


def test_two_hosts_go_on_without_a_lost_third_and_take_it_in_again(
    make_job: Callable[[int], Job], rng: random.Random
) -> None:
    rendezvous = rng.randrange(3)
    job = make_job(rendezvous)
    for _ in range(3):
        began = len(job.starts())
        job.wait_for_steps(3, max(0, began - 1), rng.randrange(5, 60))
        victim = rng.choice([number for number in range(3) if number != rendezvous])
        job.cluster.lose(victim)
        job.wait_for_steps(2, len(job.starts()), rng.randrange(1, 30))
        job.start(victim)
        job.wait_for_steps(3, len(job.starts()), 1)
    job.stop()
    assert [row["world_size"] for row in job.starts()] == [3, 2, 3, 2, 3, 2, 3]
    # A lost host costs what was not yet saved; one that comes back costs nothing.
    assert all(row["steps_repeated"] <= MOST_REPEATED for row in job.starts()[1::2])
    assert all(row["steps_repeated"] == 0 for row in job.starts()[2::2])
    job.assert_each_sample_once_an_epoch()


def test_a_preempted_host_leaves_with_nothing_lost_and_the_others_go_on(
    make_job: Callable[[int], Job], rng: random.Random
) -> None:
    rendezvous = rng.randrange(3)
    job = make_job(rendezvous)
    job.wait_for_steps(3, 0, rng.randrange(5, 60))
    preempted = rng.choice([number for number in range(3) if number != rendezvous])
    job.supervisors[preempted].send_signal(signal.SIGTERM)
    assert job.supervisors[preempted].wait(PATIENCE_S) == 0
    job.wait_for_steps(2, 1, rng.randrange(1, 30))
    job.start(preempted)
    job.wait_for_steps(3, 2, 1)
    job.stop()
    assert [row["world_size"] for row in job.starts()] == [3, 2, 3]
    assert [row["steps_repeated"] for row in job.starts()] == [0, 0, 0]
    job.assert_each_sample_once_an_epoch()


def test_the_agents_end_with_the_rendezvous_and_supervisors_resume_once_it_is_back(
    make_job: Callable[[int], Job], rng: random.Random
) -> None:
    rendezvous = rng.randrange(3)
    job = make_job(rendezvous)
    job.wait_for_steps(3, 0, rng.randrange(5, 60))
    job.cluster.lose(rendezvous)
    others = [number for number in range(3) if number != rendezvous]

    def have_ended() -> bool:
        return all(b"torchrun.sh ended" in job.cluster.logs[number].read_bytes() for number in others)

    job.wait_until(have_ended, "the end of the agents that lost their rendezvous", PEERS_END_WITHIN_S)
    assert all(job.supervisors[number].poll() is None for number in others)
    job.start(rendezvous)
    job.wait_for_steps(3, 1, 1)
    job.stop()
    assert [row["world_size"] for row in job.starts()] == [3, 3]
    job.assert_each_sample_once_an_epoch()
