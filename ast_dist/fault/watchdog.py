"""Ends a process whose training does not move on: what hangs holds up all ranks, and burns their time.

Two watchers. A thread in Python tells what is known and ends the process; should it not come to run, because what
hangs holds the interpreter's lock, a thread in C (faulthandler) prints the stacks and ends the process a little later.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from ast_dist.fault.processes import RankProcess, kill_stopped

SLOW_FACTOR = 10.0
_RECENT_STEPS = 50
_MAX_TICK_S = 1.0
# Arming faulthandler starts a thread of the system: 0.1–0.4 ms, so not at every step.
_REARM_S = 1.0
_BACKSTOP_DELAY_S = 2.0


class Watchdog:
    """Watches one rank's steps. The main thread says `beat` after each; no step is watched before the first.

    floor_s: the least time that a step may take; the limit is that or 10 × the slowest of the last 50 steps, whichever
    is more. 0 watches nothing. rank: for the message. peers: the other ranks' processes on this machine; one that
    SIGSTOP has held for longer than the limit is named and killed, whatever this rank is doing. has_backstop: whether
    faulthandler watches, too. It cannot tell a hung process from one that was stopped and continued (Ctrl-Z, fg), so
    it does where torchrun restarts the process, unless told otherwise.

    When the limit is passed, one line and the stacks of all threads go to stderr, and the process ends with exit code
    1 at once: nothing is saved, since ranks that hang can agree on nothing.
    """

    def __init__(
        self, floor_s: float, rank: int = 0, peers: Sequence[RankProcess] = (), *, has_backstop: bool | None = None
    ) -> None:
        self._floor_s = floor_s
        self._rank = rank
        self._peers = peers
        self._has_backstop = "TORCHELASTIC_RUN_ID" in os.environ if has_backstop is None else has_backstop
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step = 0
        self._beats = 0
        self._last_beat: float | None = None
        self._pauses = 0
        self._is_watching = False
        self._backstop_at = 0.0
        self._backstop_limit_s = 0.0
        self._stderr = sys.__stderr__.fileno() if sys.__stderr__ else 2
        self._is_closed = threading.Event()
        self._tick_s = min(_MAX_TICK_S, floor_s / 10)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if floor_s > 0:
            self._thread.start()

    @property
    def limit_s(self) -> float:
        """How long the next step may take."""
        return max(self._floor_s, SLOW_FACTOR * max(self._recent_s, default=0.0))

    @property
    def slowest_s(self) -> float | None:
        """The slowest of the recent steps; None before the first whole one."""
        return max(self._recent_s, default=None)

    def beat(self, step: int) -> None:
        """Note that `step` steps of the run are done. Costs microseconds."""
        now = time.monotonic()
        # A step that passed its limit and ends all the same was stopped with its process, and says nothing of steps.
        if self._last_beat is not None and (self._floor_s == 0 or now - self._last_beat <= self.limit_s):
            self._recent_s.append(now - self._last_beat)
        self._step = step
        self._begin_step()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing within: an evaluation or a save may take its time. The next step is watched from its end on."""
        self._pauses += 1
        self._beats += 1
        self._is_watching = False
        self._disarm_backstop()
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and self._last_beat is not None:
                self._begin_step()

    def rest(self) -> None:
        """Watch steps no more, since there are none; stopped peers are still found."""
        self._pauses += 1
        self._beats += 1
        self._is_watching = False
        self._disarm_backstop()

    def close(self) -> None:
        """Watch no more."""
        self._is_watching = False
        self._is_closed.set()
        self._disarm_backstop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _begin_step(self) -> None:
        self._last_beat = time.monotonic()
        self._beats += 1
        if self._floor_s > 0 and not self._pauses and not self._is_closed.is_set():
            self._is_watching = True
            self._arm_backstop(self._last_beat)

    def _watch(self) -> None:
        """Look at every tick whether the steps move on.

        The time counted is that in which this thread ran: had the whole process been stopped, or the machine been
        suspended, the step would not be to blame.
        """
        watched_s, seen, before = 0.0, 0, time.monotonic()
        stopped_s: dict[RankProcess, float] = {}
        while not self._is_closed.wait(self._tick_s):
            now = time.monotonic()
            ran_s, before = min(now - before, 2 * self._tick_s), now
            # Also in a pause: no evaluation and no save ends that waits for such a peer.
            stopped_s = {p: stopped_s[p] + ran_s if p in stopped_s else 0.0 for p in self._peers if p.is_stopped}
            if (longest_s := max(stopped_s.values(), default=0.0)) >= self.limit_s:
                self._end(f"has waited for a stopped peer for {longest_s:.1f} s, after step {self._step}")
            if not self._is_watching or seen != self._beats:
                watched_s, seen = 0.0, self._beats
                continue
            watched_s += ran_s
            if watched_s >= self.limit_s and seen == self._beats:
                waited_s = now - (self._last_beat or now)
                self._end(f"is not done with the step after step {self._step} for {waited_s:.1f} s")

    def _end(self, why: str) -> None:
        limit_s, slowest_s = self.limit_s, self.slowest_s or 0.0
        killed = kill_stopped(self._peers)
        stopped = "".join(f" {peer} was stopped by a signal, and is killed." for peer in killed)
        text = (
            f"watchdog: rank {self._rank} (process {os.getpid()}) {why}; the limit is {limit_s:.1f} s, the greater of "
            f"fault.watchdog_s {self._floor_s:g} s "
            f"and {SLOW_FACTOR:g} × the slowest recent step, {slowest_s:.2f} s.{stopped} "
            "The process ends; the stacks of its threads:\n"
        )
        with contextlib.suppress(OSError):
            # Past sys.stderr, whose lock a hung thread may hold; in one piece, since ranks share the terminal.
            os.write(self._stderr, text.encode(errors="replace"))
            faulthandler.dump_traceback(self._stderr, all_threads=True)
        os._exit(1)

    def _arm_backstop(self, now: float) -> None:
        if not self._has_backstop:
            return
        limit_s = self.limit_s
        if now - self._backstop_at < _REARM_S and limit_s <= self._backstop_limit_s:
            return
        self._backstop_at, self._backstop_limit_s = now, limit_s
        # Beats of the next second do not arm it anew, so it waits for a second more than the last of them may take.
        timeout_s = limit_s + _REARM_S + _BACKSTOP_DELAY_S
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._stderr)

    def _disarm_backstop(self) -> None:
        if self._backstop_at:
            faulthandler.cancel_dump_traceback_later()
            self._backstop_at = self._backstop_limit_s = 0.0
