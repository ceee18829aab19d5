"""Claims about hung processes: real ones, stuck in C, in a collective or in a sleep."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ast_dist.fault.processes import RankProcess, kill_stopped, peers_of
from ast_dist.fault.watchdog import Watchdog
from tests.launching import PATIENCE_S, finish, start, wait_for

PREAMBLE = """
import ctypes, sys, time
from ast_dist.fault.watchdog import Watchdog
"""

# Holds the interpreter's lock while it waits: no Python thread runs any more.
STUCK_WITH_LOCK = """
watchdog = Watchdog(0.3, rank=5, has_backstop=True)
watchdog.beat(17)
print("stuck", flush=True)
ctypes.PyDLL(None).pause()
"""

STUCK_WITHOUT_LOCK = """
watchdog = Watchdog(0.3, rank=5)
watchdog.beat(17)
def the_hung_function():
    ctypes.CDLL(None).pause()
print("stuck", flush=True)
the_hung_function()
"""

SLOW_STEPS = """
import threading
watchdog = Watchdog(0.2, has_backstop=True)
def wait(seconds):
    threading.Event().wait(seconds)
watchdog.beat(1)
wait(0.1)
watchdog.beat(2)
print(watchdog.limit_s, flush=True)
wait(0.6)  # three times the floor, but not 10 times the slowest step
watchdog.beat(3)
watchdog.close()
print("went on", flush=True)
"""

PAUSED = """
import threading
watchdog = Watchdog(0.2, has_backstop=True)
watchdog.beat(1)
with watchdog.paused():
    with watchdog.paused():
        threading.Event().wait(1.0)
    threading.Event().wait(4.0)  # the backstop of 3.2 s would have struck, too
watchdog.beat(2)
assert watchdog.limit_s == 0.2, "the pause is no part of a step"
watchdog.close()
print("went on", flush=True)
with watchdog.paused():
    pass
"""

STUCK_AFTER_PAUSE = """
import threading
watchdog = Watchdog(0.2)
watchdog.beat(1)
with watchdog.paused():
    pass
threading.Event().wait(100)
"""

IN_COLLECTIVE = """
import contextlib, os, signal
from ast_dist.distributed import World
from ast_dist.fault.guard import die_with_parent
from ast_dist.fault.processes import local_peers
from ast_dist.fault.watchdog import Watchdog
die_with_parent()
world = World.start()
watchdog = Watchdog(0.5, world.rank, local_peers(world.rank, world.gather))
for step in range(1, 21):
    world.barrier()
    watchdog.beat(step)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
with watchdog.paused() if PAUSED else contextlib.nullcontext():
    world.barrier()
"""


@pytest.mark.parametrize("program", [STUCK_WITH_LOCK, STUCK_WITHOUT_LOCK], ids=["with_lock", "without_lock"])
def test_a_process_stuck_in_c_prints_its_stacks_and_ends(program: str) -> None:
    output = finish(start("-c", PREAMBLE + program), expected=1)
    assert output.startswith("stuck\n")
    assert 'File "<string>", line' in output
    if program == STUCK_WITHOUT_LOCK:
        assert "rank 5 (process" in output
        assert "after step 17" in output
        assert "fault.watchdog_s 0.3 s" in output
        assert "in the_hung_function" in output


def test_the_limit_grows_with_slow_steps() -> None:
    limit, last = finish(start("-c", PREAMBLE + SLOW_STEPS)).splitlines()
    assert float(limit) >= 1.0
    assert last == "went on"


def test_a_paused_watchdog_does_not_strike() -> None:
    assert finish(start("-c", PREAMBLE + PAUSED)) == "went on\n"


def test_a_pause_ends() -> None:
    assert "after step 1 " in finish(start("-c", PREAMBLE + STUCK_AFTER_PAUSE), expected=1)


@pytest.mark.faults
@pytest.mark.parametrize("paused", [False, True], ids=["in_a_step", "in_a_pause"])
def test_ranks_that_wait_for_a_stopped_one_kill_it_and_end(tmp_path: Path, paused: bool) -> None:
    program = tmp_path / "program.py"
    program.write_text(IN_COLLECTIVE.replace("PAUSED", str(paused)))
    output = finish(start(str(program), world_size=2), expected=1)
    assert "watchdog: rank 0" in output
    assert "after step 20" in output
    assert "rank 1 (process" in output
    assert "was stopped by a signal, and is killed" in output
    assert "in barrier" in output, "the stack shows the collective"
    assert "forcefully exiting" not in output, "torchrun kills, too, but 30 s after its SIGTERM"


def test_before_the_first_step_nothing_is_watched() -> None:
    program = "watchdog = Watchdog(0.1, has_backstop=True)\nimport threading\nthreading.Event().wait(1.0)"
    assert finish(start("-c", PREAMBLE + program)) == ""


def test_a_process_that_was_stopped_and_continued_goes_on() -> None:
    program = (
        "watchdog = Watchdog(1.0)\nwatchdog.beat(1)\nprint('watched', flush=True)\n"
        "sys.stdin.readline()\nwatchdog.beat(2)\nassert watchdog.limit_s == 1.0\nprint('went on')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: time.monotonic() - began > 2.0, "twice the limit", process)
    os.kill(process.pid, signal.SIGCONT)
    output, _ = process.communicate("go\n", timeout=PATIENCE_S)
    assert process.returncode == 0
    assert output == "went on\n"


def test_a_beat_costs_microseconds() -> None:
    watchdog = Watchdog(60.0, has_backstop=True)
    count = 20_000
    began = time.perf_counter()
    for step in range(count):
        watchdog.beat(step)
    cost_s = (time.perf_counter() - began) / count
    watchdog.close()
    assert cost_s < 100e-6, f"{1e6 * cost_s:.1f} µs a beat"


def test_no_floor_watches_nothing() -> None:
    watchdog = Watchdog(0.0, has_backstop=True)
    watchdog.beat(1)
    with watchdog.paused():
        pass
    watchdog.close()


def test_only_stopped_processes_of_this_machine_are_killed() -> None:
    own = RankProcess.own(0)
    assert own is not None
    children = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    try:
        stat = [Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split() for child in children]
        known = [RankProcess(1 + i, own.machine, child.pid, stat[i][19]) for i, child in enumerate(children)]
        os.kill(children[0].pid, signal.SIGSTOP)
        wait_for(lambda: known[0].is_stopped, "a stopped process", children[0])
        reused = RankProcess(3, own.machine, children[0].pid, "1")
        elsewhere = RankProcess(4, "another", children[0].pid, known[0].started)
        assert peers_of(own, [own, *known, elsewhere, None]) == known
        assert kill_stopped([reused, known[1]]) == []
        assert kill_stopped(known) == known[:1]
        assert children[0].wait(timeout=PATIENCE_S) == -signal.SIGKILL
        assert known[0].is_gone
        assert not known[1].is_gone
        assert reused.is_gone
    finally:
        for child in children:
            child.kill()
            child.wait()
