"""Claims about a W&B server that is not there: no step waits, the run ends well, and all rows can be sent later."""

import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ast_dist.track.history import read as read_rows
from ast_dist.track.wandb_fragments import own_step
from tests.faults.harness import Run, words
from tests.faults.wandb_server import WandbServer, wandb_server
from tests.launching import environment, heartbeat

# W&B's own time-outs begin at 15 s; a step here takes some hundredths of one, also on a machine that is busy.
LONGEST_STEP_S = 5.0
MEDIAN_STEP_S = 0.25
# What a finished run grants its views, and what the interpreter takes to end.
LONGEST_END_S = 60.0


def start(shards: Path, run_dir: Path, server: WandbServer, epochs: int = 30) -> Run:
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    argv = words(
        shards, run_dir, "--track.wandb", "online", "--loop.epochs", str(epochs), "--checkpoint.every-steps", "0"
    )
    return Run(argv, environment={**server.environment, "HOME": str(home)})


def assert_unharmed(run: Run) -> list[dict]:
    """The run ended by itself, with no step that waited; returns the rows of its metrics."""
    assert run.finish().count("W&B: ") >= 1, "it was told"
    assert time.time() - heartbeat(run.run_dir)[1] < LONGEST_END_S
    assert run.progress()["state"] == "finished"
    rows = read_rows(run.run_dir / "metrics.jsonl")
    steps = [row["perf/step_ms"] for row in rows if row["kind"] == "step"]
    assert len(steps) == run.step
    assert max(steps) / 1000 < LONGEST_STEP_S
    assert statistics.median(steps) / 1000 < MEDIAN_STEP_S
    return rows


def sync(run: Run) -> list[dict]:
    """Send what the run left to a server that answers, as a person would the day after; returns what arrived."""
    folders = [str(path) for path in sorted((run.run_dir / "wandb").glob("*run-*"))]
    with wandb_server() as server:
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *folders],
            env=environment() | server.environment | {"HOME": str(run.run_dir.parent / "home")},
            cwd=run.run_dir.parent,
            check=True,
            capture_output=True,
            timeout=100,
        )
        return server.rows


def assert_all_arrive(run: Run, rows: list[dict]) -> None:
    """Every row of the metrics is among those that were sent later."""
    sent = {row["_step"]: row for row in sync(run)}
    assert sorted(sent) == [own_step(row) for row in rows]
    for row in rows:
        assert sent[own_step(row)]["global_step"] == row["global_step"]
        assert sent[own_step(row)]["kind"] == row["kind"]


def test_a_server_that_is_out_of_reach_from_the_start_slows_no_step_and_the_run_can_be_sent_later(
    shards: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        runs = []
        for name, how in (("refused", "refuses"), ("silent", "is silent")):
            server = stack.enter_context(wandb_server())
            server.fail(how)
            runs.append(stack.enter_context(start(shards, tmp_path / name, server)))
        for run in runs:
            assert_all_arrive(run, assert_unharmed(run))


def test_a_server_that_goes_away_midway_slows_no_step_and_the_run_can_be_sent_later(
    shards: Path, tmp_path: Path, rng: random.Random
) -> None:
    with ExitStack() as stack:
        runs = []
        for number in range(5):
            server = stack.enter_context(wandb_server())
            # Long enough that W&B has begun and sent a row well before the end.
            run = start(shards, tmp_path / f"run-{number}", server, epochs=100)
            runs.append((stack.enter_context(run), server))
        for number, (run, server) in enumerate(runs):
            run.wait_until(lambda server=server: server.rows, "a row at the server")
            run.wait_for_step(run.step + rng.randrange(1, 50))
            server.fail("refuses" if number % 2 else "is silent")
        for run, server in runs:
            rows = assert_unharmed(run)
            assert 0 < len(server.rows) < len(rows), "it went away in the midst"
            assert f"wandb sync --include-online {run.run_dir}/wandb/run-" in run.output, "it says how to send the rest"
            assert_all_arrive(run, rows)
