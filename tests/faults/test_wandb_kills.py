"""Claims about W&B and a training that is killed: all sessions together hold each row once, and make one run."""

import subprocess
import sys
from pathlib import Path

from ast_dist.track.history import read as read_rows
from ast_dist.track.wandb_fragments import own_step
from tests.faults.harness import Run, words
from tests.faults.wandb_server import wandb_server
from tests.launching import environment
from tests.track.wandb_log import history, records

# Killed at a step of its own choice: at the first, once W&B's log has what was logged so far (it is flushed every 2 s)
# and the last checkpoint is committed; at the second, as soon as the step's checkpoint is, with all or nearly all rows
# of the session unwritten.
STRIKES = """
import os, signal
from pathlib import Path
run_dir = Path({run_dir!r})

def on_step(row):
    step, session = row["global_step"], row["progress/session"]
    if (step, session) == (44, 1):
        while not any({written!r} in log.read_bytes() for log in run_dir.glob("wandb/*/*.wandb")):
            pass
        while not (run_dir / "checkpoints" / "step-00000042").exists():
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    if (step, session) == (78, 2):
        while not (run_dir / "checkpoints" / "step-00000077").exists():
            pass
        os.kill(os.getpid(), signal.SIGKILL)
"""
# A row of step 43 as protobuf has it: key, tag and length of the value, value.
WRITTEN = b"global_step\x82\x01\x0243"
# What a repeated step measures anew.
MEASURED = ("perf/", "time/", "progress/session", "progress/eta_h", "cost/session_", "cost/samples_read", "_")


def same(row: dict) -> dict:
    """What of a row a repeated step must give again."""
    return {key: value for key, value in row.items() if not key.startswith(MEASURED)}


def test_two_kills_and_three_sessions_leave_one_wandb_run_with_every_row_once(shards: Path, tmp_path: Path) -> None:
    run_dir, hooks = tmp_path / "run", tmp_path / "hooks.py"
    hooks.write_text(STRIKES.format(run_dir=str(run_dir), written=WRITTEN))
    argv = words(shards, run_dir, "--track.wandb", "offline", "--track.callbacks", str(hooks))
    home = {"HOME": str(tmp_path / "home")}
    for code in (-9, -9, 0):
        with Run(argv, environment=home) as run:
            run.finish(code)
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [start["resumed_from_step"] for start in run.starts()] == [0, 42, 77]

    sessions = [history(session) for session in records(run_dir)]
    assert max(row["global_step"] for row in sessions[0]) > 42, "the first session left rows that were repeated"
    assert min(row["global_step"] for row in sessions[-1]) < 78, "the second one lost rows that were not"
    logged = [row for session in sessions for row in session]
    assert [row["_step"] for row in logged] == [own_step(row) for row in rows], "each once, in order"
    assert [same(row) for row in logged] == [same(row) for row in rows]

    with wandb_server() as server:
        folders = sorted(map(str, run_dir.glob("wandb/offline-run-*")))
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes", *folders],
            env=environment() | server.environment | home,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            timeout=100,
        )
        assert [row["_step"] for row in server.rows] == [own_step(row) for row in rows], "none is moved to another step"
    wandb_id = (run_dir / "wandb_id").read_text().strip()
    assert all(folder.endswith(f"-{wandb_id}") for folder in folders)
