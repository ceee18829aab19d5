"""Where a run stands, from its files alone: needs no GPU and no torch, and never touches the run.

Usage: `python -m ast_dist.status RUN [--json] [--watch]`
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ast_dist.errors import run_command
from ast_dist.track.progress import as_it_is_now, checkpoint_age_s, read_progress, status_text

WATCH_INTERVAL_S = 2.0
KEYS = "state epoch step best_acc1 last_acc1 sessions restarts total_s eta_s checkpoint".split()


def status(run_dir: Path | str) -> dict[str, Any]:
    """The run's progress as it is now.

    Always has the keys state, epoch (completed), step, best_acc1, last_acc1 (percent), sessions, restarts, total_s,
    eta_s (seconds), checkpoint; None is unknown or not there yet. state is running, finished, paused, failed, or
    stopped when progress.json says running but no process holds the run. checkpoint_age_s and what else
    progress.json holds come with them. Raises UserError when RUN is not a run.
    """
    progress = as_it_is_now(run_dir, read_progress(run_dir))
    progress["checkpoint_age_s"] = checkpoint_age_s(progress, datetime.now(UTC))
    return {**dict.fromkeys(KEYS), **progress}


def main(argv: list[str]) -> int:
    """Print a run's status; with --watch, again whenever it changes, until the run is finished, paused or failed."""
    parser = argparse.ArgumentParser(prog="python -m ast_dist.status", description="Tell where a run stands.")
    parser.add_argument("run", help="the run's folder, as --run-dir named it")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    parser.add_argument("--watch", action="store_true", help=f"look every {WATCH_INTERVAL_S:g} s until it is over")
    arguments = parser.parse_args(argv)
    in_place = arguments.watch and not arguments.json and sys.stdout.isatty()
    shown: dict[str, Any] = {}
    while True:
        now = status(arguments.run)
        settled = {key: value for key, value in now.items() if key != "checkpoint_age_s"}
        if settled != shown or in_place:
            show(now, as_json=arguments.json, in_place=in_place)
            shown = settled
        # "stopped" is watched on: between a killed worker and its restart nobody holds the run.
        if not arguments.watch or now["state"] not in ("running", "stopped"):
            return 0
        time.sleep(WATCH_INTERVAL_S)


def show(progress: dict[str, Any], as_json: bool, in_place: bool) -> None:
    """Print the status once; in place of what stands on the terminal where asked."""
    text = json.dumps(progress, ensure_ascii=False) + "\n" if as_json else status_text(progress, datetime.now(UTC))
    if in_place:
        text = "\x1b[H\x1b[2J" + text
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
