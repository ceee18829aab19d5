"""What W&B wrote of a run, read back by W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records(run_dir: Path) -> list[list[dict[str, Any]]]:
    """The records of each session in RUN/wandb, the oldest first, as `wandb leet inspect --json` prints them."""
    found = []
    for path in sorted(run_dir.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([json.loads(line) for line in printed.splitlines()])
    return found


def history(session: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one session."""
    return [record["history"]["item"] for record in session if record["type"] == "history"]


def summary(session: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary that a session ends with."""
    found: dict[str, Any] = {}
    for record in session:
        if record["type"] == "summary":
            found |= record["summary"]["update"]
    return found
