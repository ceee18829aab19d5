"""What a training process tells the supervisor that started its agent: one line of JSON an event, in one file.

An agent such as torchrun returns 1 for a signal, for a mistake of the user's and for a crash alike, and a mistake found
before the run directory was taken may not be written there. So the workers say themselves how it went.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

FILE_VARIABLE = "AST_DIST_OUTCOME_FILE"
AGENT_VARIABLE = "AST_DIST_AGENT_PID"
LAUNCH_VARIABLE = "AST_DIST_LAUNCH"
# What a person typed who started the agent, quoted for a shell: the run's last words repeat it.
COMMAND_VARIABLE = "AST_DIST_COMMAND"


def tell(event: str, **facts: Any) -> None:
    """Append an event; without a supervisor nobody is told. Workers append at once, so each line is one write.

    A line begins with a line's end, too: a full disk may have torn the one before.

    event: started, finished, paused, refused (the user can mend it) or failed. facts: plain values.
    """
    path = os.environ.get(FILE_VARIABLE)
    if not path:
        return
    about = {"event": event, "local_rank": int(os.environ.get("LOCAL_RANK", "0")), "pid": os.getpid()}
    line = f"\n{json.dumps({**about, **facts})}\n"
    try:
        # Not created: where the supervisor is gone, nobody reads it.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"warning: the supervisor cannot be told that this process has {event} ({error})", file=sys.stderr)


def read(path: Path) -> list[dict[str, Any]]:
    """All events so far, oldest first; torn lines are passed over. Raises OSError where the file is gone."""
    events = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return events


def agent_pid() -> int | None:
    """The agent's process number, which launch/torchrun.sh passes on; None where something else started the agent."""
    value = os.environ.get(AGENT_VARIABLE, "")
    return int(value) if value.isdigit() else None


def stop_agent_at_exit() -> None:
    """Have the agent end once this process has printed its last line: it would try a user's mistake again and again.

    Only where launch/torchrun.sh started it: a person's own torchrun restarts as often as the person said. And not
    where a supervisor reads of the mistake and ends the agent itself.
    """
    if agent_pid() == os.getppid() and not os.environ.get(FILE_VARIABLE):
        atexit.register(os.kill, os.getppid(), signal.SIGTERM)
