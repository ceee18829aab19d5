"""W&B's helper process, wandb-core, which this process starts and waits for when it ends."""

import contextlib
import os
import signal
from pathlib import Path

_NAME = "wandb-core"


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
