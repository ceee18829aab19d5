"""Where a run stands, from its files alone: needs no GPU and no torch, and never touches the run.

Usage: `python -m ast_dist.status RUN [RUN…] [--json] [--watch]`. Several runs are a table, a line each.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ast_dist.errors import UserError, run_command
from ast_dist.track.progress import (
    as_it_is_now,
    checkpoint_age_s,
    duration,
    read_progress,
    status_text,
    time_left_text,
)

WATCH_INTERVAL_S = 2.0
UNREADABLE = "unreadable"
_AGES = {"checkpoint_age_s"}  # they change while nothing happens
KEYS = "state epoch step best_acc1 last_acc1 sessions restarts total_s eta_s checkpoint".split()


def status(run_dir: Path | str) -> dict[str, Any]:
    """The run's progress as it is now.

    Always has the keys state, epoch (completed), step, best_acc1, last_acc1 (percent), sessions, restarts, total_s,
    eta_s (seconds), checkpoint; None is unknown or not there yet. state is running, finished, paused, failed, or
    stopped when progress.json says running but no process holds the run. checkpoint_age_s and what else progress.json
    holds (`track/progress.py`) come with them. Raises UserError when RUN is not a run.
    """
    progress = as_it_is_now(run_dir, read_progress(run_dir))
    progress["checkpoint_age_s"] = checkpoint_age_s(progress, datetime.now(UTC))
    return {**dict.fromkeys(KEYS), **progress}


def main(argv: list[str]) -> int:
    """Print the runs' status; with --watch, again whenever it changes, until all are finished, paused or failed.

    Of several runs, one that cannot be read hides no other: its state is "unreadable", and the exit code is 2.
    """
    parser = argparse.ArgumentParser(prog="python -m ast_dist.status", description="Tell where a run stands.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, as --run-dir named it")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    parser.add_argument("--watch", action="store_true", help=f"look every {WATCH_INTERVAL_S:g} s until it is over")
    arguments = parser.parse_args(argv)
    has_screen = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    in_place = arguments.watch and not arguments.json and has_screen
    shown: dict[str, dict[str, Any]] = {}
    last_state: dict[str, Any] = {}
    while True:
        now = {run: _look(run) for run in arguments.runs}
        unreadable = [found["message"] for found in now.values() if found["state"] == UNREADABLE]
        if unreadable and len(now) == 1 and not shown:
            raise UserError(unreadable[0])
        settled = {run: {key: value for key, value in found.items() if key not in _AGES} for run, found in now.items()}
        if settled != shown or in_place:
            changed = [found for run, found in now.items() if settled[run] != shown.get(run)]
            show(changed if arguments.json else list(now.values()), as_json=arguments.json, in_place=in_place)
            shown = settled
        # "stopped" is watched on: between a killed worker and its restart nobody holds the run. So is a run that cannot
        # be read any more: it may be on its way to another place, to begin anew.
        last_state |= {run: found["state"] for run, found in now.items() if found["state"] != UNREADABLE}
        if not arguments.watch or not any(state in ("running", "stopped") for state in last_state.values()):
            for message in unreadable:
                print(f"error: {message}", file=sys.stderr)
            return 2 if unreadable else 0
        time.sleep(WATCH_INTERVAL_S)


def _look(run: str) -> dict[str, Any]:
    """As `status`; of what cannot be read, its state is "unreadable" and its message says why."""
    try:
        return status(run)
    except (UserError, OSError) as error:
        return {**dict.fromkeys(KEYS), "state": UNREADABLE, "message": str(error), "run_dir": run}


def show(runs: list[dict[str, Any]], as_json: bool, in_place: bool) -> None:
    """Print the status once; in place of what stands on the terminal where asked."""
    if as_json:
        text = "".join(json.dumps(progress, ensure_ascii=False) + "\n" for progress in runs)
    elif len(runs) == 1:
        text = status_text(runs[0], datetime.now(UTC))
    else:
        text = table(runs)
    if in_place:
        # Each line is cleared behind its text, and the rest below: a screen that was cleared first would flicker.
        text = "\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J"
    print(text, end="", flush=True)


def table(runs: list[dict[str, Any]]) -> str:
    """One line a run, in columns, below their names."""
    rows = [("run", "state", "epoch", "step", "best top-1", "spent", "left", "sessions", "warnings")]
    for run in runs:
        best = "-" if run["best_acc1"] is None else f"{run['best_acc1']:.2f} %"
        done, epochs = ("-" if value is None else str(value) for value in (run["epoch"], run.get("epochs")))
        count = "-" if run["epoch"] is None else f"{done}/{epochs}"
        step = "-" if run["step"] is None else f"{run['step']:,}"
        left = time_left_text(run).replace(" left", "") or "-"
        told = (run["sessions"], run.get("warnings"))
        sessions, warned = ("-" if value is None else str(value) for value in told)
        where = str(run.get("run_dir", "-"))
        rows.append((where, str(run["state"]), count, step, best, duration(run["total_s"]), left, sessions, warned))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
