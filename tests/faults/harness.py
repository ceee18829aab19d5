"""Start real runs, strike them where a test says, and read what they left.

    with Run(words(shards, run_dir), world_size=2, max_restarts=2) as run:
        strikes = Faults(run).fail_at(rank=1, step=40).fail_at(rank=0, step=90).strike()
        run.finish()

Everything is done from outside: by the command line, signals to process ids, and the files of the run directory.
"""

import contextlib
import json
import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from tests import launching, training
from tests.launching import PATIENCE_S, heartbeat, steps_done

GLOBAL_BATCH_SIZE = 12
NUM_SAMPLES = 240
EPOCHS = 16
STEPS_A_FULL_EPOCH = NUM_SAMPLES // GLOBAL_BATCH_SIZE
SAVE_STEPS = 7
# An interval, and another where the save at its beginning was still under way beside the training.
MOST_REPEATED = 2 * SAVE_STEPS
_MARK = "AST_DIST_TESTS_RUN"
# What the trainer promises on any machine, importing torch and loading included.
RECOVERY_S = 10.0


class Reference(NamedTuple):
    """SHA-256 of the final state, and the steps it took."""

    sha256: str
    steps: int


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    """A small training whose middle epochs are gated, with BatchNorm and momentum to restore: about 200 steps."""
    return [
        *("-m", "ast_dist.train", *training.words(shards, run_dir), "--optim.warmup-epochs", "1"),
        *("--loop.epochs", str(EPOCHS), "--loop.global-batch-size", str(GLOBAL_BATCH_SIZE)),
        *("--gate.target-rate", "0.5", "--gate.anneal-share", "0.2", "--checkpoint.every-steps", str(SAVE_STEPS)),
        *more,
    ]


def workers(agent: int) -> dict[int, int]:
    """Process ids of an agent's workers, by rank. Without an agent, the process itself is rank 0."""
    found = {}
    for children in Path(f"/proc/{agent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread or a process that has just ended
            for pid in children.read_text().split():
                environment = dict(
                    pair.split("=", 1) for pair in _text(f"/proc/{pid}/environ").split("\0") if "=" in pair
                )
                if "RANK" in environment and "-m" in _text(f"/proc/{pid}/cmdline").split("\0"):
                    found[int(environment["RANK"])] = int(pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return _text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace")


class Run:
    """A training in processes of its own. Leaving the context kills what still runs.

    words: what follows `python`. world_size: processes under torchrun; 0 starts one process without it. environment:
    variables added to this process's. log: the file of what it prints, by default one beside its directory.
    """

    def __init__(
        self,
        words: list[str],
        world_size: int = 0,
        max_restarts: int = 0,
        environment: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.run_dir = Path(words[words.index("--run-dir") + 1])
        self.world_size = world_size
        logs = self.run_dir.parent
        self._log = log or logs / f"{self.run_dir.name}-{len(list(logs.glob('*.log')))}.log"
        self._mark = uuid.uuid4().hex
        # A pipe that nobody reads would stop a run that restarts often and says so.
        with self._log.open("wb") as log:
            self.job = launching.start(
                *words,
                world_size=world_size,
                max_restarts=max_restarts,
                output=log,
                more={_MARK: self._mark} | (environment or {}),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.kill()
        if kind is not None:
            print(f"--- {self._log.name} ---\n{self.output}")

    @property
    def output(self) -> str:
        """What the run has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        return workers(self.job.pid) if self.world_size else {0: self.job.pid}

    def all_pids(self) -> dict[int, int]:
        """Process ids by rank, once every rank has been started."""
        count = max(1, self.world_size)
        return self.wait_until(lambda: pids if len(pids := self.pids) == count else None, f"{count} ranks")

    @property
    def step(self) -> int:
        """Steps done, by the run's heartbeat."""
        return steps_done(self.run_dir)

    def saved_step(self) -> int:
        """The step of the newest committed checkpoint, 0 where there is none."""
        names = [path.name for path in committed(self.run_dir / "checkpoints")]
        return int(names[-1].removeprefix("step-")) if names else 0

    def progress(self) -> dict[str, Any]:
        """What progress.json says."""
        return training.progress(self.run_dir)

    def starts(self) -> list[dict[str, Any]]:
        """The rows of sessions.jsonl that tell of starts."""
        return [row for row in read_rows(self.run_dir / "sessions.jsonl") if "event" not in row]

    def recoveries_s(self) -> list[float]:
        """Seconds from the last step before each restart to the first one after it, by the run's own record."""
        rows = read_rows(self.run_dir / "sessions.jsonl")
        return [row["recovery_s"] for row in rows if row.get("event") == "first_step"]

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Watch until `condition` gives something true, and return it. Fails when the run ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            has_ended = self.job.poll() is not None  # asked first: what was done before the end counts
            found = condition()
            if found:
                return found
            assert not has_ended, f"the run ended before {what}"
            time.sleep(0.001)  # a pause between looks, not a guess at how long something takes
        raise AssertionError(f"{what} did not happen within {PATIENCE_S:g} s")

    def wait_for_step(self, step: int) -> None:
        """Watch until that many steps are done."""
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def end(self) -> int:
        """Wait until the run has ended by itself; return its exit code."""
        return self.job.wait(PATIENCE_S)

    def finish(self, expected: int = 0) -> str:
        """Wait for the end, which must be with that exit code; return what was printed."""
        code = self.end()
        assert code == expected, f"exit code {code}, expected {expected}"
        return self.output

    def kill(self) -> None:
        """SIGKILL to the agent, every rank and whatever else was started for this run, at once."""
        pids = {self.job.pid} if self.job.poll() is None else set()
        while pids := pids | set(processes_of(self._mark)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.job.wait(PATIENCE_S)
            pids = set()


def processes_of(mark: str) -> list[int]:
    """Processes that inherited a mark: those of a dead agent or supervisor, too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"{_MARK}={mark}".encode() in variables and is_alive(int(folder.name)):
                found.append(int(folder.name))
    return found


@dataclass
class Strike:
    """One fault: asked for at `step` of `rank`.

    It hit when `seen` steps were done, and `recovery_s` seconds later the next process had done a step. is_saved:
    whether the save that was due last was committed by then: a save goes on beside the training.
    """

    rank: int
    step: int
    number: signal.Signals
    seen: int = 0
    is_saved: bool = True
    recovery_s: float = 0.0

    @property
    def most_repeated(self) -> int:
        """Steps that may have to be done again: an interval, and where the last save was still under way another."""
        return SAVE_STEPS if self.is_saved else MOST_REPEATED


class Faults:
    """A plan of faults, each of which strikes one rank of a run once it has done a number of steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.strikes: list[Strike] = []

    def fail_at(self, rank: int, step: int, number: signal.Signals = signal.SIGKILL) -> Self:
        """Add a fault; they strike in order of their steps."""
        self.strikes.append(Strike(rank, step, number))
        return self

    def strike(self) -> list[Strike]:
        """Strike at each planned step, wait after each until the run steps again, and return what happened."""
        for strike in sorted(self.strikes, key=lambda strike: strike.step):
            self.run.wait_for_step(strike.step)
            pids = self.run.all_pids()
            owner, strike.seen, began = self._owner(), self.run.step, time.time()
            strike.is_saved = self.run.saved_step() >= strike.seen // SAVE_STEPS * SAVE_STEPS
            os.kill(pids[strike.rank], strike.number)
            strike.recovery_s = self._first_beat(owner, began) - began
            print(strike)
        return self.strikes

    def _first_beat(self, owner: int, after: float) -> float:
        """When a process other than `owner` did its first step (seconds since 1970)."""

        def beats() -> bool:
            return self._owner() != owner and heartbeat(self.run.run_dir)[1] > after

        self.run.wait_until(beats, "a step after the strike")
        return heartbeat(self.run.run_dir)[1]

    def _owner(self) -> int:
        return json.loads((self.run.run_dir / ".lease").read_bytes()[16:] or b"{}").get("pid", 0)


def random_steps(rng: random.Random, steps: int, count: int = 5) -> list[int]:
    """Steps at which to strike, one in each of `count` equal parts of a run, so that it gets on between them."""
    part = steps // (count + 1)
    return [number * part + rng.randrange(1, part) for number in range(count)]
