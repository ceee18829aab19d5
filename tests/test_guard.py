"""Claims about signals, the grace and orphans, with real processes and real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ast_dist.fault.deadline import Deadline
from ast_dist.fault.guard import STOP_SIGNALS, Guard
from tests.launching import PATIENCE_S, environment, finish, start

# Blocks in C until killed: unlike a sleep, a mutex is not interrupted by signals.
STUCK = """
import ctypes, os, sys
from ast_dist.fault.deadline import Deadline
from ast_dist.fault.guard import Guard
guard = Guard(grace_s=0.3)
mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("stuck", flush=True)
libc.pthread_mutex_lock(mutex)
"""

OWN_LIKE = """
import dataclasses
from pathlib import Path
from ast_dist.fault.processes import RankProcess
def own_like(pid):
    started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return dataclasses.replace(RankProcess.own(7), pid=pid, started=started)
"""

FAMILY = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "from ast_dist.fault.guard import die_with_parent; import signal; die_with_parent(); print('ready', flush=True); "
    "signal.pause()"], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_wish_to_stop_and_nothing_else(number: signal.Signals) -> None:
    guard = Guard(grace_s=60)
    assert not guard.wants_stop
    os.kill(os.getpid(), number)
    assert guard.wants_stop
    assert guard.reason == number.name
    guard.close()


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    guard = Guard(grace_s=60)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not guard.wants_stop
    guard.close()
    signal.signal(signal.SIGHUP, before)


def test_closing_gives_the_signals_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    Guard(grace_s=60).close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_the_deadline_is_a_wish_to_stop() -> None:
    guard = Guard(grace_s=60, deadline=Deadline(session_s=3600, age_s=3600))
    assert guard.wants_stop
    assert guard.reason == "deadline"
    guard.close()
    later = Guard(grace_s=60, deadline=Deadline(session_s=3600))
    assert not later.wants_stop
    later.close()


def test_a_process_stuck_in_c_ends_after_the_grace() -> None:
    process = start("-c", STUCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    assert "not saved within the grace of 0.3 s" in finish(process, expected=1)


@pytest.mark.parametrize("fate", ["ended", "stopped"])
def test_a_process_stuck_in_c_waits_no_grace_for_a_peer_that_is_gone_and_kills_a_stopped_one(fate: str) -> None:
    peer = subprocess.Popen(["sleep", "1000"])
    program = STUCK.replace(
        "Guard(grace_s=0.3)", f"Guard(grace_s={600 if fate == 'ended' else 0.5}, peers=[peer])"
    ).replace("guard = ", "peer = own_like(int(sys.argv[1]))\nguard = ")
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_LIKE + program, str(peer.pid)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        if fate == "ended":
            peer.kill()
            peer.wait()
        else:
            peer.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        output = finish(process, expected=1)
        if fate == "ended":
            assert f"rank 7 (process {peer.pid}) is gone" in output
        else:
            assert f"rank 7 (process {peer.pid}) was stopped by a signal, and is killed" in output
            assert peer.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    finally:
        process.kill()
        peer.kill()
        peer.wait()


def test_a_worker_dies_with_its_parent() -> None:
    parent = start("-c", FAMILY)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    deadline = time.monotonic() + PATIENCE_S
    while not is_gone():
        assert time.monotonic() < deadline, f"process {child} lives on without its parent"


def test_in_another_thread_signals_stay_as_they_are_and_the_deadline_counts() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen: list[object] = []

    def guard_there() -> None:
        guard = Guard(grace_s=60, deadline=Deadline(session_s=1.0, age_s=2.0))
        seen.extend([[signal.getsignal(number) for number in STOP_SIGNALS], guard.wants_stop, guard.reason])
        guard.close()

    thread = threading.Thread(target=guard_there)
    thread.start()
    thread.join()
    assert seen == [before, True, "deadline"]
