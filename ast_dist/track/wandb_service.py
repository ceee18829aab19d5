"""W&B's helper process, wandb-core, which this process starts and waits for when it ends."""

import contextlib
import os
import signal
from pathlib import Path

_NAME = "wandb-core"
_TOKEN_NAME = "WANDB_SERVICE"


def leave_inherited_service() -> None:
    """Have W&B start a helper of this process's own, where it would use that of the process that started this one.

    A notebook that uses W&B hands its helper on in the environment. It outlives a training that is killed, holds on to
    the run, and refuses it to the next session.
    """
    token = os.environ.get(_TOKEN_NAME)  # version, process id, kind, address
    if token is not None and token.split("-")[1:2] != [str(os.getpid())]:
        del os.environ[_TOKEN_NAME]


def end_service() -> None:
    """End the helper at once, for when it was waited for long enough.

    W&B waits for it at the interpreter's exit, without a time-out, and where a server took an alert and never answered
    the helper waits for that server (wandb 0.31): the training's process then never ended. What it was given is in its
    log by now. Where there is no /proc, nothing is done.
    """
    was_there = False
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread or a process that has just ended
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().strip() == _NAME:
                    os.kill(int(pid), signal.SIGKILL)
                    was_there = True
    if was_there:
        import wandb

        # Else W&B does it at the exit, shows the traceback of its failure, or exits with the helper's code.
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()
