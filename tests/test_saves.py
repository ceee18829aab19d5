"""Claims about the saves of a whole training: what is told of them, and what becomes of one that is refused."""

from pathlib import Path
from typing import Any

import pytest

from ast_dist.errors import run_command
from ast_dist.fault.commit import committed
from ast_dist.step import TrainStep
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.training import progress, refused, snapshot, state_hash, words, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert run_command(main, words(shards, run_dir, "--checkpoint.every-steps", "4")) == 0
    return run_dir


def test_the_metrics_tell_how_long_saves_held_up_and_how_long_they_took(finished: Path) -> None:
    rows = read_rows(finished / "metrics.jsonl")
    stalls_ms = [row["perf/ckpt_stall_ms"] for row in rows if "perf/ckpt_stall_ms" in row]
    saves_s = [row["perf/ckpt_save_s"] for row in rows if "perf/ckpt_save_s" in row]
    assert stalls_ms and min(stalls_ms) > 0
    assert saves_s and min(saves_s) > 0


def test_a_run_does_not_end_before_its_last_save(finished: Path) -> None:
    newest = committed(finished / "checkpoints")[-1].name
    assert progress(finished)["checkpoint"] == newest == f"step-{progress(finished)['step']:08d}"
    assert not list((finished / "checkpoints").glob("stage-*"))


def test_a_state_that_is_not_finite_is_not_saved_and_the_run_goes_back_to_one_that_is(
    shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = TrainStep.__call__, 0

    def poisoned(step: TrainStep, *arguments: Any, **votes: Any) -> Any:
        """A mock of a flipped bit in batch statistics, which training itself never reads."""
        nonlocal calls
        calls += 1
        result = plain(step, *arguments, **votes)
        if calls == 8:
            next(buffer for name, buffer in step.module.named_buffers() if "running_var" in name).fill_(float("inf"))
        return result

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--checkpoint.every-steps", "4")) == 0
    assert len([row for row in read_rows(run_dir / "sessions.jsonl") if row.get("event") == "rollback"]) == 1
    assert state_hash(run_dir) == state_hash(finished)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    argv = words(shards, run_dir, "--loop.epochs", "1", "--gate.policy", "full")
    assert run_command(main, argv) == 0
    for checkpoint in committed(run_dir / "checkpoints"):
        (checkpoint / ".metadata").write_bytes(b"")
    before = snapshot(run_dir / "checkpoints")
    assert "checkpoints is sound" in (line := refused(argv, capsys))
    assert "--resume never" in line
    assert snapshot(run_dir / "checkpoints") == before
    assert run_command(main, [*argv, "--resume", "never"]) == 0


def test_saves_by_the_clock_become_rarer_where_they_hold_up_too_much(shards: Path, tmp_path: Path) -> None:
    counts = []
    for name, share in (("often", "1.0"), ("rarely", "1e-9")):
        run_dir = tmp_path / name
        clock = ("--checkpoint.every-s", "1e-9", "--checkpoint.stall-share", share, "--checkpoint.keep-last", "99")
        # Many steps, of which several pass during a save.
        assert run_command(main, words(shards, run_dir, *clock, "--loop.global-batch-size", "4")) == 0
        counts.append(len(committed(run_dir / "checkpoints")))
    often, rarely = counts
    # Three ends of epochs, and what was voted before the first stall was known.
    assert rarely <= 5 < often
