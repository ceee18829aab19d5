"""Real training commands as child processes: started, watched, stopped cleanly, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ast_dist.errors import UserError
from ast_dist.track.progress import PROGRESS_NAME, as_it_is_now, duration, read_progress

_LOOK_S = 0.2
_SECOND_CTRL_C_S = 1.0
# After its own grace a worker ends by itself; torchrun takes up to 30 s more to bury its workers.
_BURIAL_S = 40.0
_LAST_LINES = 20
# Arguments: this process's id, then a Python command to become once the kernel is told to end it with this process.
# Not a preexec_fn, since forking Python code out of a process with threads may deadlock. The second look at the
# parent is for one that died before the kernel was told.
_TIED = """
import os, sys
from ast_dist.fault.guard import die_with_parent
die_with_parent()
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Run:
    """One training: its folder, its arguments for ast_dist.train, and the seconds its save may take."""

    run_dir: Path
    words: tuple[str, ...]
    grace_s: float

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def log(self) -> Path:
        """Where its output goes: beside the run's folder, which is the training's own."""
        return self.run_dir.with_name(f"{self.name}.log")

    @property
    def state(self) -> str:
        """finished, paused, failed, running, stopped (killed), or "" where it has not begun."""
        try:
            return str(as_it_is_now(self.run_dir, read_progress(self.run_dir)).get("state", ""))
        except UserError:
            return ""


class RunFailed(Exception):
    """A training ended without finishing, and nobody asked it to. The message holds its last lines."""


class RunPaused(Exception):
    """A training saved and ended because somebody else, or its own deadline, asked it to."""


class Jobs:
    """Runs trainings, `jobs` at a time, each in `processes` processes.

    SIGINT and SIGTERM make the trainings save and end; `run` then raises KeyboardInterrupt. A second Ctrl-C does not
    wait for them. The trainings die with this process, however it ends.
    """

    def __init__(self, jobs: int, processes: int) -> None:
        self._jobs = jobs
        self._processes = processes
        self._running: list[_Job] = []
        self._asked_at: float | None = None
        self._width = 0

    def run(self, runs: Sequence[Run], on_finished: Callable[[Run], None]) -> None:
        """Run all, in this order, and call `on_finished` after each.

        Raises RunFailed or RunPaused for the first run that does not finish, KeyboardInterrupt when asked to stop;
        the others have then saved.
        """
        waiting = deque(runs)
        with self._signals():
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < self._jobs and self._asked_at is None:
                        self._running.append(_Job(waiting.popleft(), self._processes))
                    if self._asked_at is not None:
                        raise KeyboardInterrupt
                    self._show()
                    time.sleep(_LOOK_S)
                    for job in [job for job in self._running if job.process.poll() is not None]:
                        self._running.remove(job)
                        self._show("")
                        job.judge()
                        on_finished(job.run)
            finally:
                self._show("")
                self._stop()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif number == signal.SIGINT and now - self._asked_at > _SECOND_CTRL_C_S:
            raise KeyboardInterrupt

    def _stop(self) -> None:
        """Ask what still runs to save and end, and wait for it."""
        for job in self._running:
            job.process.terminate()
        if self._running:
            print(f"stopping {', '.join(job.run.name for job in self._running)}: saving …", flush=True)
        try:
            for job in self._running:
                job.wait()
        finally:
            for job in self._running:
                job.kill()
            self._running = []

    def _show(self, text: str | None = None) -> None:
        """On a terminal, one line that is written over: what runs now, and how far it is."""
        if not sys.stdout.isatty():
            return
        if text is None:
            text = "   ".join(job.progress() for job in self._running)[: os.get_terminal_size().columns - 1]
        print(f"\r{text:<{self._width}}\r{text}", end="", flush=True)
        self._width = len(text)


class _Job:
    """A training that was started."""

    def __init__(self, run: Run, processes: int) -> None:
        self.run = run
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*(launcher if processes > 1 else []), "-m", "ast_dist.train", *run.words]
        self._progress_before = self._progress_bytes()
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            self._log_start = log.tell()
            # In a session of its own, a terminal's Ctrl-C reaches this process alone, which then asks for a save.
            self.process = subprocess.Popen(
                [sys.executable, "-c", _TIED, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def judge(self) -> None:
        """Raise RunFailed or RunPaused unless the run is finished, by its own word.

        torchrun ends with 1 after SIGTERM whatever its workers return, so a word written in this session counts more
        than the exit code; one of an earlier session does not.
        """
        code = self.process.returncode
        has_spoken = code == 0 or self._progress_bytes() != self._progress_before
        state = self.run.state if has_spoken else ""
        if state == "finished":
            return
        if state == "paused":
            message = read_progress(self.run.run_dir).get("message", "")
            raise RunPaused(f"{self.run.name} is paused ({message})")
        with self.run.log.open("rb") as log:
            log.seek(self._log_start)
            last = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        lines = "".join(f"\n  {line}" for line in last)
        raise RunFailed(f"{self.run.name} failed with exit code {code}. All it said: {self.run.log}; the end:{lines}")

    def progress(self) -> str:
        try:
            now = read_progress(self.run.run_dir)
        except UserError:
            return f"{self.run.name}: starting"
        accuracy = "" if now.get("last_acc1") is None else f", {now['last_acc1']:.1f} %"
        left = "" if now.get("eta_s") is None else f", {duration(now['eta_s'])} left"
        return f"{self.run.name}: epoch {now.get('epoch')}/{now.get('epochs')}{accuracy}{left}"

    def wait(self) -> None:
        """Wait as long as a save may take."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.run.grace_s + _BURIAL_S)

    def kill(self) -> None:
        """End the processes that did not end by themselves."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _progress_bytes(self) -> bytes | None:
        try:
            return (self.run.run_dir / PROGRESS_NAME).read_bytes()
        except FileNotFoundError:
            return None
