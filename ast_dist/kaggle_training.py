"""The training that a notebook's cell starts and watches: torchrun below a supervisor, in processes of their own.

Training inside a notebook's own process cannot use two GPUs, and a kernel that is restarted would take it down unsaved.
`python -m ast_dist.kaggle_training PARENT_PID -- COMMAND …` is `ast-dist supervise -- COMMAND …` that is told to save
and end when the process PARENT_PID is gone.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ast_dist import supervise
from ast_dist.errors import UserError, run_command
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.fault.guard import die_with_parent
from ast_dist.outcome_file import COMMAND_VARIABLE

_LOOK_S = 0.2
_GRACE_S = 200.0


class View(Protocol):
    """What shows a training."""

    def lines(self, lines: Sequence[str]) -> None:
        """Take new lines of the training's output."""

    def refresh(self, is_last: bool = False) -> None:
        """Show what is new, where it is time; is_last: whatever the time."""


def command(processes: int, words: Sequence[str]) -> list[str]:
    """How to train on this host, as launch/torchrun.sh does it. words: the arguments of ast_dist.train."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise UserError(f"{sys.executable} has no torch. Install it, or run this where it is.")
    known = (Path(torch.origin).parent / "distributed" / "run.py").read_text(encoding="utf-8")
    options = {
        "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        # How long workers may save after a signal; checkpoint.grace_s ends them sooner.
        "--shutdown-timeout": "150",
    }
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *("--max-restarts=1000", "--monitor-interval=0.2"),
        *(f"{name}={value}" for name, value in options.items() if name in known),
        *("-m", "ast_dist.train", *words),
    ]


class Training:
    """A training under way.

    command: as `command` gives it. log: the file that its output is appended to: unlike a pipe it holds up nobody
    when this process is busy, and breaks for nobody when it is gone. began: when the session began, seconds since 1970.
    secrets: environment variables for the training alone.
    """

    def __init__(self, command: Sequence[str], log: Path, began: float, secrets: dict[str, str]) -> None:
        environment = {**os.environ, **secrets, BEGAN_VARIABLE: f"{began:.3f}", "PYTHONUNBUFFERED": "1"}
        # For the run's last words: nobody types what stands below a cell.
        environment[COMMAND_VARIABLE] = "the same cell again"
        environment.setdefault("OMP_NUM_THREADS", "1")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        # Kept open: somebody may tidy up, and the training is to be heard of nevertheless.
        self._log = log.open("rb")
        self._log.seek(0, os.SEEK_END)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ast_dist.kaggle_training", str(os.getpid()), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Stopping the cell signals the kernel's process group; the training is told once, from here.
                start_new_session=True,
            )
        self._rest = b""
        self._has_warned = False

    def attend(self, view: View, tell: Callable[[str], None]) -> int:
        """Show the training until it ends, and return its exit code. A Ctrl-C asks it to save and end, and waits.

        What fails in showing is one warning: the training goes on, and is waited for.
        """
        code: int | None = None
        try:
            while code is None:
                try:
                    code = self._look(view)
                except KeyboardInterrupt:
                    self._process.send_signal(signal.SIGINT)
                    tell(
                        "stopping: the training saves and ends (a second later, stop the cell again to end it at once)"
                    )
        finally:
            if code is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE_S)
            self._log.close()
        return code

    def _look(self, view: View) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LOOK_S)
        code = self._process.poll()
        is_last = code is not None
        try:
            view.lines(self._new_lines(is_last))
            view.refresh(is_last)
        except Exception as error:  # noqa: BLE001 - what fails in showing is no reason to stop what is shown
            if not self._has_warned:
                self._has_warned = True
                with contextlib.suppress(OSError, ValueError):  # that may be what has failed
                    print(f"warning: not shown ({error!r}). The training goes on.", file=sys.stderr, flush=True)
        return code

    def _new_lines(self, is_last: bool) -> list[str]:
        raw = self._rest + self._log.read()
        whole, _, self._rest = raw.rpartition(b"\n")
        if is_last:
            whole, self._rest = raw, b""
        return whole.decode(errors="replace").splitlines()


def main(argv: list[str]) -> int:
    """Supervise a command for the process that is named first."""
    # SIGTERM, not SIGKILL: a notebook whose kernel is restarted has its training save.
    die_with_parent(int(argv[0]), signal.SIGTERM)
    return supervise.main(argv[1:])


def wait_for_end(is_held: Callable[[], bool], patience_s: float) -> bool:
    """Wait until nobody holds the run directory; whether that came in time."""
    deadline = time.monotonic() + patience_s
    while is_held():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


if __name__ == "__main__":
    sys.exit(run_command(main))
