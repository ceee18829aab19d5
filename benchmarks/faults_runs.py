"""Real trainings that are started, watched, struck and started again, whichever tool trains.

Every tool leaves the same two files in its run directory: `.lease`, whose first 16 bytes say how many steps are done,
and sessions.jsonl, a row a start and one for each first step after a fault. The peers' programs write them, too.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ast_dist.fault.lease import LEASE_NAME
from benchmarks.faults_record import SESSIONS_NAME, read_beat
from benchmarks.result import ROOT

POLL_S = 0.005
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Training:
    """What every tool trains.

    train, val: shards. images: the same training images, decoded, for tools that read no shards. model, width,
    image_px: as in the configuration. batch_size: global. processes: on this host. seed: of order and pixels.
    patience_s: how long to wait for anything.
    """

    train: Path
    val: Path
    images: Path
    model: str
    width: int
    image_px: int
    num_classes: int
    batch_size: int
    processes: int
    seed: int
    patience_s: float


@dataclass(frozen=True)
class Tool:
    """A way to train: how it is started in a run directory, and by whom again.

    name: as the tables say it. command: (training, run directory, epochs) → the words behind `python`. by_hand: nobody
    but a person starts it again once it has ended. saves: when, in words. saved: a file or folder in the run directory
    that stands once something can be resumed. variables: of its environment, beside the machine's.
    """

    name: str
    command: Callable[[Training, Path, int], Sequence[str]]
    by_hand: bool
    saves: str
    saved: str
    variables: Mapping[str, str] = field(default_factory=dict)


class Job:
    """A tool's training, running. It does not outlive the block, nor do its workers."""

    def __init__(self, tool: Tool, training: Training, run_dir: Path, epochs: int) -> None:
        self.run_dir = run_dir
        self.tool = tool
        self.patience_s = training.patience_s
        self._command = [sys.executable, *tool.command(training, run_dir, epochs)]
        self.process = self._start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        # A supervisor or an agent that was killed leaves what it started, which may start more.
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)

    def start_again(self) -> None:
        """The same command, once its process has ended."""
        self.process = self._start()

    def workers(self) -> dict[int, int]:
        """Process numbers of the workers that live, by rank. They are found by what they run, orphans included."""
        found = {}
        for pid in self._pids():
            with contextlib.suppress(OSError):
                for value in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if value.startswith(b"RANK="):
                        found[int(value[5:])] = pid
        return found

    def agent(self) -> int:
        """Process number of the workers' parent."""
        worker = next(iter(self.workers().values()))
        return int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])

    def steps_done(self) -> int:
        """Steps that the run's heartbeat states; 0 before the first."""
        return read_beat(self.run_dir / LEASE_NAME)

    def starts(self) -> list[dict[str, Any]]:
        """One row a start of the workers."""
        return [row for row in self._sessions() if "event" not in row]

    def first_steps(self) -> list[dict[str, Any]]:
        """One row for each first step after a fault."""
        return [row for row in self._sessions() if row.get("event") == "first_step"]

    @property
    def has_recovered(self) -> bool:
        """Whether the newest start has done its first step, or there was but one."""
        rows = [row for row in self._sessions() if row.get("event") != "save"]
        return len(self.starts()) == 1 or (bool(rows) and "event" in rows[-1])

    def wait_for(self, condition: Callable[[], _Found], what: str, poll_s: float = POLL_S) -> _Found:
        """Watch until the condition gives something true, and return it; start a tool again that a person must start.

        Raises RuntimeError when it does not come true within the patience, or the job ends before.
        """
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            code = self.process.poll()
            if code is not None:
                found = condition()
                if found:
                    return found
                if not self.tool.by_hand:
                    raise RuntimeError(f"exit code {code} before {what}: {self.last_lines()}")
                self.start_again()
            time.sleep(poll_s)
        raise RuntimeError(f"{what} did not happen within {self.patience_s:g} s: {self.last_lines()}")

    def let_run(self, seconds: float) -> None:
        """Let it train for so long. Raises RuntimeError when it ends meanwhile."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                code = self.process.wait(left_s)
            except subprocess.TimeoutExpired:
                return
            raise RuntimeError(f"exit code {code} while it should train: {self.last_lines()}")

    def finish(self) -> None:
        """Wait for its end. Raises RuntimeError when it ends badly or too late."""
        try:
            code = self.process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end within {self.patience_s:g} s: {self.last_lines()}") from None
        if code:
            raise RuntimeError(f"exit code {code}: {self.last_lines()}")

    def last_lines(self) -> str:
        """The end of what it printed."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return " / ".join(text.strip().splitlines()[-8:])[-1500:]

    @property
    def _log(self) -> Path:
        return self.run_dir.with_suffix(".log")

    def _start(self) -> "subprocess.Popen[bytes]":
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_")) and k != "RANK"}
        env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **self.tool.variables}
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _pids(self) -> list[int]:
        """All processes whose command names the run directory, but for those that only wait to be reaped."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if str(self.run_dir).encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def _sessions(self) -> list[dict[str, Any]]:
        try:
            lines = (self.run_dir / SESSIONS_NAME).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def is_alive(pid: int) -> bool:
    """Whether a process still runs or is stopped; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def torchrun(processes: int, max_restarts: int) -> list[str]:
    """torchrun on this host, as words behind `python`."""
    options = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={max_restarts}"]
    return ["-m", "torch.distributed.run", *options, "--monitor-interval=0.1"]


def train_words(training: Training, run_dir: Path, epochs: int) -> list[str]:
    """The arguments of ast_dist.train, but for when to save."""
    return [
        *("-m", "ast_dist.train", "--run-dir", str(run_dir), "--seed", str(training.seed)),
        *("--data.train", str(training.train), "--data.val", str(training.val)),
        *("--data.image-size", str(training.image_px), "--data.crop", "padded", "--data.crop-pad-px", "4"),
        *("--model.name", training.model, "--model.width", str(training.width), "--optim.lr", "0.05"),
        *("--loop.epochs", str(epochs), "--loop.global-batch-size", str(training.batch_size)),
        *("--loop.precision", "bf16", "--loop.eval-every-epochs", "1000000", "--gate.policy", "full"),
        *("--track.no-dashboard", "--track.quiet"),
    ]


def our_tool(name: str, launcher: Callable[[int], Sequence[str]], every_s: float, *more: str, by_hand: bool) -> Tool:
    """ast_dist.train under a launcher, saving every so many seconds. launcher: processes → words behind `python`."""

    def command(training: Training, run_dir: Path, epochs: int) -> list[str]:
        words = [*launcher(training.processes), *train_words(training, run_dir, epochs)]
        return [*words, "--checkpoint.every-s", str(every_s), *more]

    return Tool(name, command, by_hand, f"every {every_s:g} s", "checkpoints/step-*")
