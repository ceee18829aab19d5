"""When to stop: signals, the session's deadline, and a parent that died."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ast_dist.fault.deadline import Deadline
from ast_dist.fault.processes import RankProcess, kill_stopped

DEADLINE = "deadline"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SECOND_CTRL_C_S = 1.0
_LOOK_S = 0.2
_BEREAVED_GRACE_S = 3.0


class Guard:
    """Turns signals and the deadline into a wish to stop that the loop reads at step boundaries.

    grace_s: seconds from the first signal until the process ends by itself, saved or not. deadline: of the session,
    or None. peers: the other ranks' processes on this machine. When one of them is gone, a signal's grace is 3 s at
    most: ranks cannot agree on a save any more, and torchrun, which sent the signal because of that, waits.

    A Python signal handler does not run while the main thread waits in C++ (a collective whose peer is gone), so the
    grace is kept by a thread that the wake-up descriptor reaches. Only the main thread may take signals: created in
    another one, it leaves them as they are and knows of the deadline alone.

    Attributes: reason ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT", "deadline", or None while there is none).
    """

    def __init__(self, grace_s: float, deadline: Deadline | None = None, peers: Sequence[RankProcess] = ()) -> None:
        self.reason: str | None = None
        self._grace_s = grace_s
        self._deadline = deadline
        self._peers = peers
        self._first_signal_at: float | None = None
        self._is_closed = threading.Event()
        self._old_handlers: dict[int, Any] = {}
        self._heeds_signals = threading.current_thread() is threading.main_thread()
        if self._heeds_signals:
            self._take_signals()

    def _take_signals(self) -> None:
        self._read_end, self._write_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._on_signal) for number in heeded_signals()}
        self._thread = threading.Thread(target=self._keep_grace, name="grace", daemon=True)
        self._thread.start()

    @property
    def left_s(self) -> float:
        """Seconds of the grace that are left; infinite where no signal came."""
        if self._first_signal_at is None:
            return float("inf")
        return self._grace_s - (time.monotonic() - self._first_signal_at)

    @property
    def wants_stop(self) -> bool:
        """Whether this rank has a reason to stop; the ranks agree on it in the step's all-reduce."""
        if self.reason is None and self._deadline is not None and self._deadline.is_reached:
            self.reason = DEADLINE
        return self.reason is not None

    def close(self) -> None:
        """Give the signals back."""
        self._is_closed.set()
        if not self._heeds_signals:
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._write_end.close()
        self._thread.join()
        self._read_end.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal_at is None:
            self._first_signal_at = now
            self.reason = signal.Signals(number).name
            # Its save must not be cut short by an agent that leaves at a second signal; from here on the grace ends it.
            outlive_parent()
        elif number == signal.SIGINT and now - self._first_signal_at > _SECOND_CTRL_C_S:
            # torchrun passes a terminal's Ctrl-C on, so the same key press may come twice within a moment.
            raise KeyboardInterrupt

    def _keep_grace(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._read_end.recv(16):
                if any(number in self._old_handlers for number in data):
                    break
            else:
                return
        now = time.monotonic()
        ends_at, lost = now + self._grace_s, ""
        while not self._is_closed.wait(min(_LOOK_S, max(0.0, ends_at - now))):
            now = time.monotonic()
            if not lost and (gone := [peer for peer in self._peers if peer.is_gone]):
                ends_at = min(ends_at, now + _BEREAVED_GRACE_S)
                lost = f": {gone[0]} is gone"
            if now >= ends_at:
                self._end(lost)

    def _end(self, lost: str) -> None:
        stopped = "".join(f"; {peer} was stopped by a signal, and is killed" for peer in kill_stopped(self._peers))
        within = f"within the grace of {self._grace_s:g} s"
        print(f"not saved {within}{lost}{stopped}; ending without", file=sys.stderr, flush=True)
        os._exit(1)


def why_stopped(reasons: Sequence[str | None], is_saved: bool) -> str:
    """Why a run ends with more to do, in one line. reasons: every rank's; a signal to one of them stops all."""
    signals = [reason for reason in reasons if reason not in (None, DEADLINE)]
    if signals:
        return f"{signals[0]}: preempted, {'nothing lost' if is_saved else 'NOT saved, see the warnings'}"
    kept = "saved, nothing lost" if is_saved else "NOT saved, see the warnings"
    return f"session deadline: {kept}; run the same command again"


def heeded_signals() -> list[signal.Signals]:
    """The signals that ask to save and end; but a SIGHUP that is ignored (nohup) stays ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (is_ignored and number == signal.SIGHUP)]


def signal_comes(within_s: float) -> bool:
    """Wait for a signal that asks to stop, and return whether one came in time. In the main thread, without a Guard."""
    came = threading.Event()
    for number in heeded_signals():
        signal.signal(number, lambda *_: came.set())
    deadline = time.monotonic() + within_s
    # Short waits: a handler runs between two of them, not during one.
    while not came.wait(0.05) and time.monotonic() < deadline:
        pass
    return came.is_set()


def die_with_parent(ancestor: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to kill this process when its parent dies: a killed agent would leave orphans that train on.

    ancestor: the process number of the agent, where it is known: it may have died before the kernel was asked.
    number: the signal that the kernel sends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if ancestor is not None and ancestor != os.getppid() and not _is_alive(ancestor):
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Undo die_with_parent, which is a matter of the thread that called it: the main one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Ask the kernel to make this process the parent of descendants whose own parent dies, so that it can end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
