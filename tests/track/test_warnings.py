"""Warnings are shown, counted and kept: a run that others watch must not look healthier than its console."""

import json
import subprocess
import sys

from ast_dist.config import Config, DataConfig, TrackConfig
from ast_dist.track.history import read
from ast_dist.track.progress import read_progress
from ast_dist.track.tracker import MAX_WARNINGS_KEPT, Tracker


def make_tracker(run_dir, restart=0):
    run_dir.mkdir(exist_ok=True)
    track = TrackConfig(dashboard=False, quiet=True)
    config = Config(run_dir=str(run_dir), data=DataConfig(train="train", val="val"), track=track)
    return Tracker(run_dir, config, world_size=1, restart=restart)


def kept(run_dir):
    return [row for row in read(run_dir / "sessions.jsonl") if row.get("event") == "warning"]


def test_a_warning_is_in_sessions_and_progress_as_soon_as_it_is_shown(tmp_path, capsys):
    tracker = make_tracker(tmp_path / "run")
    tracker.start()
    tracker.progress(step=1)
    assert (read_progress(tmp_path / "run")["warnings"], read_progress(tmp_path / "run")["last_warning"]) == (0, None)
    tracker.warn("first")
    tracker.warn("second")
    told = read_progress(tmp_path / "run")
    assert (told["warnings"], told["last_warning"], told["step"]) == (2, "second", 1)
    assert [(row["session"], row["restart"], row["text"]) for row in kept(tmp_path / "run")] == [
        (1, 0, "first"),
        (1, 0, "second"),
    ]
    assert "T" in kept(tmp_path / "run")[0]["at"]
    assert "warnings    2 in this session, the last: second\n" in (tmp_path / "run" / "STATUS.txt").read_text()
    assert capsys.readouterr().err == "warning: first\nwarning: second\n"
    tracker.close("failed")


def test_a_restart_goes_on_counting_and_the_next_session_begins_at_none(tmp_path):
    counts = []
    for restart in (0, 1, 0):
        tracker = make_tracker(tmp_path / "run", restart)
        tracker.start()
        tracker.progress()
        counts.append(read_progress(tmp_path / "run")["warnings"])
        tracker.warn(f"of restart {restart}")
        tracker.close("failed")
    assert counts == [0, 1, 0]
    assert [(row["session"], row["restart"]) for row in kept(tmp_path / "run")] == [(1, 0), (1, 1), (2, 0)]


def test_a_session_keeps_100_and_counts_them_all(tmp_path, capsys):
    tracker = make_tracker(tmp_path / "run")
    tracker.start()
    for number in range(MAX_WARNINGS_KEPT + 7):
        tracker.warn(f"number {number}")
    tracker.close("failed")
    assert [row["text"] for row in kept(tmp_path / "run")] == [f"number {number}" for number in range(100)]
    told = read_progress(tmp_path / "run")
    assert (told["warnings"], told["last_warning"]) == (107, "number 106")
    assert capsys.readouterr().err.count("warning: number") == 107


def test_a_warning_before_the_start_stands_behind_the_row_of_the_start(tmp_path):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir)
    tracker.start("step-00000010", session={"history_bytes": 9999})
    tracker.close("failed")
    start, warning = read(run_dir / "sessions.jsonl")
    assert "event" not in start and "the checkpoint was saved at 9,999" in warning["text"]


def test_a_full_disk_costs_no_row_count_and_no_exception(tmp_path):
    program = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_warnings import make_tracker
from pathlib import Path
tracker = make_tracker(Path(sys.argv[1]))
tracker.start()
resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
tracker.warn("first")
tracker.warn("second")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tracker.step({"global_step": 1})
tracker.close("finished")
"""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", program, str(run_dir), str(__file__).rpartition("/")[0]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    said = ended.stderr.splitlines()
    assert [line.split(" (")[0] for line in said] == [
        "warning: first",
        f"warning: {run_dir}/progress.json cannot be written",
        "warning: second",
    ]
    assert json.loads((run_dir / "progress.json").read_text())["warnings"] == 3
