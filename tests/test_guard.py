"""Claims about signals, the grace and orphans, with real processes and real signals."""

import os
import signal
import time
from pathlib import Path

import pytest

from ast_dist.fault.guard import Guard
from tests.launching import PATIENCE_S, finish, start

# Blocks in C until killed: unlike a sleep, a mutex is not interrupted by signals.
STUCK = """
import ctypes, os, sys
from ast_dist.fault.guard import Guard
guard = Guard(grace_s=0.3)
mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("stuck", flush=True)
libc.pthread_mutex_lock(mutex)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_wish_to_stop_and_nothing_else(number: signal.Signals) -> None:
    guard = Guard(grace_s=60)
    assert not guard.wants_stop
    os.kill(os.getpid(), number)
    assert guard.wants_stop
    assert guard.reason == number.name
    guard.close()


def test_closing_gives_the_signals_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    Guard(grace_s=60).close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_the_deadline_is_a_wish_to_stop() -> None:
    guard = Guard(grace_s=60, deadline=time.monotonic() - 1)
    assert guard.wants_stop
    assert guard.reason == "deadline"
    guard.close()
    later = Guard(grace_s=60, deadline=time.monotonic() + 3600)
    assert not later.wants_stop
    later.close()


def test_a_process_stuck_in_c_ends_after_the_grace() -> None:
    process = start("-c", STUCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    assert "not saved within the grace of 0.3 s" in finish(process, expected=1)


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
