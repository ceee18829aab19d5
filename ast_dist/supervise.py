"""Keep a training going: start its agent, and start it again when it dies.

    launch/supervise launch/torchrun.sh -m ast_dist.train --run-dir RUN …
    ast-dist supervise -- python -m ast_dist.train --run-dir RUN …

torchrun restarts workers, and nothing restarts torchrun: when it is killed, or loses the host of its rendezvous, the
job ends. This starts it again, waiting longer each time that nothing was gained, until the run is finished, or paused
because somebody or its deadline asked for it, or refused as a mistake of the user's, or until restarts gain no step.

SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGQUIT are passed on as SIGTERM: save and end. Exit code: 0 finished, or paused
with more to do; 2 the user can mend it; 1 given up. Needs neither torch nor a GPU.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ast_dist import outcome_file
from ast_dist.errors import UserError, require, run_command
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.fault.guard import adopt_orphans, die_with_parent, heeded_signals
from ast_dist.fault.lease import steps_done
from ast_dist.track.command import typed_command
from ast_dist.track.progress import PROGRESS_NAME, read_progress

_POLL_S = 0.05
_SECOND_CTRL_C_S = 1.0
# A healthy agent gives its workers 30 s after a signal, or what it was told to.
_AGENT_GRACE_S = 180.0
_HISTORY_LINES = 5


class Workers:
    """What the workers told, and what their run directory shows: were steps gained, and how did it end.

    Attributes: stalled (restarts since a step was gained), steps (done, as far as the heartbeat says), last (the last
    event of the present agent), refused (a mistake of the user's, None without one), is_off (a disk or a server that
    does not answer refused a run which has gained steps here: that may pass), has_gained (steps since the last start),
    pids (of the workers that have started).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0
        self._run_dir: Path | None = None
        self._progress_before: bytes | None = None
        self._beat = (0, 0)
        self._agent_restarts = 0
        self._ever_gained = False
        self.stalled = 0
        self.last: dict[str, Any] = {}
        self.failure = ""
        self.refused: str | None = None
        self.is_off = False
        self.has_gained = False
        self.pids: set[int] = set()

    @property
    def steps(self) -> int:
        """Steps of the run, by its heartbeat."""
        return self._beat[0]

    def agent_started(self) -> None:
        """Forget what the agent before did."""
        self.last, self.failure, self._agent_restarts, self.is_off = {}, "", 0, False

    def observe(self) -> None:
        """Take in what is new."""
        try:
            events = outcome_file.read(self._path)
        except OSError as error:
            raise RuntimeError(f"{self._path}: the workers' reports are gone ({error})") from error
        for event in events[self._seen :]:
            self._take(event)
        self._seen = len(events)
        if self._run_dir:
            beat = steps_done(self._run_dir)
            if beat[1] != self._beat[1]:
                self._beat = (0, beat[1])  # moved aside: another run begins at step 0
            if beat[0] > self._beat[0]:
                self._beat = beat
                self.stalled, self.has_gained, self._ever_gained = 0, True, True

    def ended_elsewhere(self) -> bool:
        """Whether the run is over by what another host wrote since: finished, or at its deadline."""
        if not self._run_dir or self._progress_bytes() == self._progress_before:
            return False
        try:
            progress = read_progress(self._run_dir)
        except UserError:
            return False
        why = str(progress.get("message")).partition(":")[0]
        return progress.get("state") == "finished" or (progress.get("state") == "paused" and why.endswith("deadline"))

    def _progress_bytes(self) -> bytes | None:
        try:
            return (self._run_dir / PROGRESS_NAME).read_bytes() if self._run_dir else None
        except OSError:
            return None

    def _take(self, event: dict[str, Any]) -> None:
        self.pids.add(event["pid"])
        if event["event"] == "refused" and event.get("may_pass") and self._ever_gained:
            self.is_off, self.failure = True, event["message"]
        elif event["event"] == "refused":
            self.refused = event["message"]
        elif event["event"] == "failed":
            self.failure = event["message"]
        if event["event"] == "started":
            if event["local_rank"] != 0:
                return
            self.has_gained = False
            # Restarts because hosts came or went do not count as such: they are no failures.
            self.stalled += max(0, event["restart"] - self._agent_restarts)
            self._agent_restarts = event["restart"]
            if self._run_dir is None:
                self._run_dir = Path(event["run_dir"])
                self._beat = steps_done(self._run_dir)
                # What the session before wrote stands there until this one has begun.
                self._progress_before = self._progress_bytes()
        self.last = event


class Supervisor:
    """Runs one command until there is nothing to gain by starting it again.

    max_stalled: restarts in a row that may gain no step. backoff_s, backoff_max_s: the first pause before a restart,
    doubled at each that gained nothing, and its limit. wait_s: for how long agents that start no worker are forgiven,
    once workers have run here, and disks and servers that do not answer: they may take a while to come back.
    """

    def __init__(
        self, command: Sequence[str], *, max_stalled: int, backoff_s: float, backoff_max_s: float, wait_s: float
    ) -> None:
        self._command = list(command)
        self._max_stalled = max_stalled
        self._backoff_s, self._backoff_max_s, self._wait_s = backoff_s, backoff_max_s, wait_s
        self._told_at: float | None = None
        self._wants_kill = False
        self._workers_at = -float("inf")
        self._idle = 0
        self._history: list[str] = []

    def run(self) -> int:
        """Supervise to the end, and return the exit code. Raises UserError for what the user can mend."""
        adopt_orphans()
        for number in heeded_signals():
            signal.signal(number, self._on_signal)
        with tempfile.TemporaryDirectory(prefix="ast_dist-supervise-") as folder:
            outcomes = Path(folder) / "outcomes.jsonl"
            outcomes.touch()
            environment = {**os.environ, outcome_file.FILE_VARIABLE: str(outcomes)}
            # Restarted agents share one deadline, and are one launch to --resume.
            environment.setdefault(BEGAN_VARIABLE, f"{time.time():.3f}")
            launch = f"supervised {socket.gethostname()} {os.getpid()} {time.time():.3f}"
            environment.setdefault(outcome_file.LAUNCH_VARIABLE, launch)
            if command := typed_command():
                environment[outcome_file.COMMAND_VARIABLE] = command
            workers = Workers(outcomes)
            while True:
                code = self._run_agent(workers, environment)
                if code is not None:
                    return code
                in_vain = min(max(workers.stalled, self._idle), 30)
                pause_s = min(self._backoff_s * 2.0 ** max(0, in_vain - 1), self._backoff_max_s)
                _say(f"{self._history[-1]}; starting it again in {pause_s:g} s")
                resume_at = time.monotonic() + pause_s
                while time.monotonic() < resume_at:
                    time.sleep(_POLL_S)
                    if self._told_at is not None:
                        _say("stopped between two agents: the same command goes on from the last checkpoint")
                        return 0

    def _run_agent(self, workers: Workers, environment: dict[str, str]) -> int | None:
        """Run the command once. Returns the exit code to end with, or None where it should be started again."""
        began = time.monotonic()
        workers.agent_started()
        own_pid = os.getpid()
        try:
            # A session of its own: a terminal's Ctrl-C reaches it through this process, once.
            agent = subprocess.Popen(
                self._command, env=environment, start_new_session=True, preexec_fn=lambda: die_with_parent(own_pid)
            )
        except OSError as error:
            raise UserError(f"{self._command[0]}: cannot be started ({error.strerror}). Check the command.") from None
        asked_at: float | None = None
        while agent.poll() is None:
            workers.observe()
            is_hopeless = workers.refused is not None or workers.is_off or workers.stalled > self._max_stalled
            if asked_at is None and (is_hopeless or self._told_at is not None):
                agent.terminate()
                asked_at = time.monotonic()
            if self._wants_kill or (asked_at is not None and time.monotonic() - asked_at > _AGENT_GRACE_S):
                agent.kill()
            time.sleep(_POLL_S)
        if self._told_at is not None and not self._wants_kill:
            # Who signals every process of a job makes the agent leave early: its workers still save.
            deadline = time.monotonic() + _AGENT_GRACE_S
            while workers.pids & set(_children()) and time.monotonic() < deadline and not self._wants_kill:
                time.sleep(_POLL_S)
        _kill_leftovers()
        workers.observe()
        self._note(agent.returncode, time.monotonic() - began, workers)
        return self._verdict(agent.returncode, workers)

    def _verdict(self, returncode: int, workers: Workers) -> int | None:
        last = workers.last
        if workers.refused is not None:
            raise UserError(workers.refused)
        if returncode in (2, 126, 127):
            raise UserError(f"exit code {returncode} of `{shlex.join(self._command)}`: no restart mends this.")
        is_paused = last.get("event") == "paused"
        if last.get("event") == "finished" or (is_paused and last["is_deadline"]):
            return 0
        if self._told_at is not None:
            if is_paused and last["is_saved"]:
                return 0
            if not workers.has_gained:
                _say("stopped before a step was done: nothing lost")
                return 0
            _say("stopped, and not all was saved: the same command goes on from the last checkpoint")
            return 1
        if returncode == 0 or workers.ended_elsewhere():
            return 0
        now = time.monotonic()
        if last and not workers.is_off:
            self._workers_at, self._idle = now, 0
        elif now - self._workers_at < self._wait_s:
            self._idle += 1
            return None  # it found no rendezvous to join, or no answer
        if workers.stalled >= self._max_stalled:
            count = min(workers.stalled, self._max_stalled)
            _say(f"given up: no step beyond step {workers.steps:,} was gained in {count} restarts. What happened:")
            for line in self._history[-_HISTORY_LINES:]:
                print(f"  {line}", file=sys.stderr, flush=True)
            return 1
        workers.stalled += 1
        return None

    def _note(self, returncode: int, seconds: float, workers: Workers) -> None:
        ended = f"ended with exit code {returncode}"
        if returncode < 0:
            ended = f"was killed by {signal.Signals(-returncode).name}"
        why = f" ({workers.failure})" if workers.failure else ""
        agent = Path(self._command[0]).name
        self._history.append(f"{agent} {ended} after {seconds:.1f} s at step {workers.steps:,}{why}")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        elif number == signal.SIGINT and now - self._told_at > _SECOND_CTRL_C_S:
            self._wants_kill = True


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def _kill_leftovers() -> None:
    """End what a dead agent left running: its workers are sessions of their own, adopted by this process."""
    while orphans := _children(with_ended=True):
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children(*, with_ended: bool = False) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid() and (state != "Z" or with_ended):
                found.append(int(path.parent.name))
    return found


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; raises UserError for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="ast-dist supervise", description="Start a training's agent, and start it again when it dies."
    )
    parser.add_argument("--max-stalled", type=int, default=3, help="restarts in a row that may gain no step (3)")
    parser.add_argument("--backoff-s", type=float, default=1.0, help="seconds before the first restart, doubled (1)")
    parser.add_argument("--backoff-max-s", type=float, default=60.0, help="the longest such pause (60)")
    parser.add_argument("--wait-s", type=float, default=1800.0, help="how long to try to meet a lost rendezvous (1800)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run: launch/torchrun.sh …")
    arguments = parser.parse_args(argv)
    command = arguments.command[arguments.command[:1] == ["--"] :]
    require(bool(command), "supervise: no command. Example: ast-dist supervise -- torchrun -m ast_dist.train …")
    require(arguments.max_stalled >= 0, f"--max-stalled is {arguments.max_stalled}, but must be at least 0.")
    for name in ("backoff_s", "backoff_max_s", "wait_s"):
        value = getattr(arguments, name)
        require(value >= 0, f"--{name.replace('_', '-')} is {value:g}, but must be at least 0.")
    return Supervisor(
        command,
        max_stalled=arguments.max_stalled,
        backoff_s=arguments.backoff_s,
        backoff_max_s=arguments.backoff_max_s,
        wait_s=arguments.wait_s,
    ).run()


if __name__ == "__main__":
    sys.exit(run_command(main))
