"""What W&B's logs on this disk hold already: one fragment RUN/wandb/*run-DATE-ID for each session.

A fragment is W&B's own log of a session, which `wandb sync` sends. Synced one after the other, fragments make one run
only where no row is in two of them: `wandb sync` gives a row whose step was sent before the next free step, and the run
then has it twice (seen with wandb 0.31). A kill costs a fragment its last seconds. So a session that cannot ask the
server reads the fragments first, and logs what none of them has.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_INSPECT_TIMEOUT_S = 120.0
# What a log begins with, before its first record.
_HEADER_BYTES = 7


def own_step(row: dict[str, Any]) -> int:
    """W&B's step of a row, from the row itself: a step's row gets an even number, its epoch's the odd one above.

    So a row has the same step whenever it is logged, however often rows are written, and whatever became of
    metrics.jsonl meanwhile.
    """
    return 2 * int(row["global_step"]) + (row["kind"] == "epoch")


def fragments(run_dir: Path, run_id: str) -> list[Path]:
    """The logs of a run's sessions on this disk, the oldest first, those that began online and those that did not."""
    found = run_dir.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=lambda log: log.parent.name.removeprefix("offline-"))


def pass_over_empty(logs: list[Path]) -> list[Path]:
    """The fragments that hold something. `wandb sync` is told to pass over the others: at one of them it sends none.

    A session that is killed within its first two seconds leaves an empty one.
    """
    for log in logs:
        if log.stat().st_size <= _HEADER_BYTES:
            mark_sent(log)
    return [log for log in logs if log.stat().st_size > _HEADER_BYTES]


def steps_held(log: Path) -> set[int]:
    """Steps of the rows in a fragment, as far as a kill left it whole.

    Raises RuntimeError where W&B's own reader cannot read it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    held: set[int] = set()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_INSPECT_TIMEOUT_S)
        for line in ended.stdout.splitlines():
            if '"history"' in line:
                record = json.loads(line)
                if record["type"] == "history":
                    held.add(int(record["history"]["step"]["num"]))
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{log} cannot be read ({type(error).__name__})") from error
    return held


def mark_sent(log: Path) -> None:
    """Have `wandb sync` pass over a fragment whose rows were sent otherwise; it leaves this file itself."""
    log.with_name(f"{log.name}.synced").touch()
