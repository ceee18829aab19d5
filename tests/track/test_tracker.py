"""The tracker keeps the truth on disk, feeds the views, and lets no failure of theirs out."""

import json
import os
import re
import select
import subprocess
import sys
import time
import tracemalloc

from ast_dist.config import Config, DataConfig, LoopConfig, TrackConfig
from ast_dist.run_dir import rolled_back_epochs
from ast_dist.track.console import Console
from ast_dist.track.history import encode, read
from ast_dist.track.progress import read_progress
from ast_dist.track.tracker import Tracker
from tests.track.wandb_log import records

STEP = {"global_step": 10, "progress/epoch": 0.5, "train/loss": 0.6, "gate/rate": 0.4, "gate/rate_target": 0.4}
EPOCH = {"epoch": 1, "global_step": 20, "progress/epoch": 1.0, "val/acc1": 91.0, "gate/rate": 0.4}


def make_tracker(run_dir, restart=0, **track):
    run_dir.mkdir(exist_ok=True)
    config = Config(
        run_dir=str(run_dir),
        data=DataConfig(train="train", val="val"),
        loop=LoopConfig(epochs=3),
        track=TrackConfig(**{"dashboard": False, **track}),
    )
    return Tracker(run_dir, config, world_size=2, restart=restart)


def test_a_run_leaves_its_rows_its_session_and_its_state(tmp_path, capsys):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir)
    tracker.start(info={"run": str(run_dir)}, versions={"torch": "2"}, num_samples=1437)
    tracker.first_step()
    tracker.step(STEP)
    tracker.epoch(EPOCH)
    tracker.progress(epoch=1, step=20, best_acc1=91.0, last_acc1=91.0, eta_s=5.0, checkpoint="step-00000020")
    tracker.close("finished")

    step, epoch = read(run_dir / "metrics.jsonl")
    assert step == {"kind": "step", **STEP, "progress/session": 1, "time/total_s": step["time/total_s"]}
    assert epoch == {"kind": "epoch", **EPOCH, "progress/session": 1, "time/total_s": epoch["time/total_s"]}
    assert 0 <= step["time/total_s"] <= epoch["time/total_s"]
    (start,) = read(run_dir / "sessions.jsonl")
    del start["started_at"]
    assert start == {
        **{"session": 1, "restart": 0, "world_size": 2, "resumed_from_step": 0, "last_step_before": 0},
        **{"steps_repeated": 0, "checkpoint": None, "versions": {"torch": "2"}},
    }
    progress = read_progress(run_dir)
    expected = {"state": "finished", "epoch": 1, "epochs": 3, "step": 20, "best_acc1": 91.0, "last_acc1": 91.0}
    expected |= {"sessions": 1, "restarts": 0, "eta_s": 0.0, "checkpoint": "step-00000020", "policy": "sundew"}
    expected |= {"num_samples": 1437, "message": "", "run_dir": str(run_dir)}
    assert {key: progress[key] for key in expected} == expected
    assert progress["checkpoint_at"] is not None and progress["total_s"] >= epoch["time/total_s"]
    shown = capsys.readouterr().out
    assert "start  session 1, from the beginning" in shown
    assert re.search(r"^val top-1 +best 91.00 %, last 91.00 %$", shown, re.MULTILINE)
    assert re.search(rf"^look +python -m ast_dist.status {run_dir}$", shown, re.MULTILINE)
    assert re.search(r"^GPU joules +not measured$", shown, re.MULTILINE)


def test_a_restart_cuts_rows_past_the_checkpoint_and_counts_what_was_repeated(tmp_path):
    run_dir = tmp_path / "run"
    before = make_tracker(run_dir, quiet=True)
    before.start()
    before.step(STEP)
    session = {"history_bytes": before.history_bytes, "total_s": before.total_s}
    before.progress(step=10, checkpoint="step-00000010")
    before.step({**STEP, "global_step": 20})
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"global_step": 22, "time/total_s": 100.0}\n')

    after = make_tracker(run_dir, restart=1, quiet=True)
    beat = (23, time.time() - 4.0)
    started = {"began_at": 1.5, "imported_s": 2.5}
    after.start("step-00000010", resumed_from_step=10, previous_beat=beat, session=session, started=started)
    after.first_step()
    after.step({**STEP, "global_step": 20})
    after.close("paused", "asked to")

    rows = read(run_dir / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == [10, 20]
    assert rows[1]["time/total_s"] >= 100.0, "time spent on undone work was spent"
    _, start, first_step = read(run_dir / "sessions.jsonl")
    told = {key: start[key] for key in ("session", "restart", "last_step_before", "steps_repeated", "checkpoint")}
    assert told == {
        **{"session": 1, "restart": 1, "last_step_before": 23, "steps_repeated": 13, "checkpoint": "step-00000010"}
    }
    assert start["started"] == {"began_at": 1.5, "imported_s": 2.5}
    recovery_s, first_step_s = first_step.pop("recovery_s"), first_step.pop("first_step_s")
    assert 0.0 < first_step_s < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert first_step == {"session": 1, "restart": 1, "event": "first_step"} and recovery_s >= 4.0
    progress = read_progress(run_dir)
    assert (progress["sessions"], progress["restarts"], progress["state"]) == (1, 1, "paused")
    assert progress["message"] == "asked to" and progress["checkpoint_at"] is not None


def test_sessions_are_counted_by_persons_starts_and_restarts_by_torchrun(tmp_path):
    run_dir = tmp_path / "run"
    counted = []
    for restart in (0, 1, 2, 0, 1):
        tracker = make_tracker(run_dir, restart=restart, quiet=True)
        tracker.start()
        tracker.close("failed")
        progress = read_progress(run_dir)
        counted.append((progress["sessions"], progress["restarts"]))
    assert counted == [(1, 0), (1, 1), (1, 2), (2, 2), (2, 3)]
    assert [(row["session"], row["restart"]) for row in read(run_dir / "sessions.jsonl")] == [
        *((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
    ]


def test_a_start_from_nothing_keeps_no_rows_of_the_attempt_before(tmp_path):
    run_dir = tmp_path / "run"
    before = make_tracker(run_dir, quiet=True)
    before.start()
    before.step(STEP)
    after = make_tracker(run_dir, restart=1, quiet=True)
    after.start(previous_beat=(12, time.time()))
    assert read(run_dir / "metrics.jsonl") == []
    assert read(run_dir / "sessions.jsonl")[-1]["steps_repeated"] == 12
    for tracker in (before, after):
        tracker.close("failed")


def test_what_was_spent_so_far_is_of_the_rows_that_the_checkpoint_keeps(tmp_path, capsys):
    run_dir = tmp_path / "run"
    before = make_tracker(run_dir, quiet=True)
    before.start()
    before.epoch({**EPOCH, "cost/samples_skipped": 5, "cost/flops_saved": 0.25})
    before.step({**STEP, "cost/samples_skipped": 7})
    session = {"history_bytes": before.history_bytes, "total_s": before.total_s}
    before.step({**STEP, "cost/samples_skipped": 99})
    capsys.readouterr()
    after = make_tracker(run_dir, restart=1)
    after.start("step-00000010", resumed_from_step=10, session=session)
    after.close("failed")
    shown = capsys.readouterr().out
    assert re.search(r"^samples skipped +7$", shown, re.MULTILINE)
    assert re.search(r"^FLOPs saved +25.0 %$", shown, re.MULTILINE)
    before.close("failed")


def test_a_start_holds_no_history_in_memory(tmp_path):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir, quiet=True)
    row = {**EPOCH, "kind": "epoch", "perf/epoch_s": 5.0, "perf/s_per_sample": 0.1}
    row |= {f"cost/{number}": 1.0 for number in range(40)}
    path = run_dir / "metrics.jsonl"
    path.write_bytes(encode(row) * 10_000)
    num_bytes = path.stat().st_size
    tracemalloc.start()
    try:
        again = make_tracker(run_dir, quiet=True)
        again.start("step-00000010", session={"history_bytes": num_bytes, "total_s": 1.0})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < num_bytes / 2, (peak_bytes, num_bytes)
    assert len(again.stretches) == 20 and path.stat().st_size == num_bytes
    for each in (tracker, again):
        each.close("failed")


def test_rows_that_others_wrote_into_a_runs_files_do_not_stop_a_start(tmp_path):
    run_dir = tmp_path / "run"
    before = make_tracker(run_dir, quiet=True)
    before.start()
    before.close("paused")
    foreign = [{}, {"session": None}, {"session": "3", "restart": "1"}, {"session": 1, "restart": None}]
    foreign += [{"session": 2, "event": "warning"}, {"event": "rollback"}, {"event": "rollback", "epoch": "x"}]
    with (run_dir / "sessions.jsonl").open("ab") as sessions:
        sessions.write(b"".join(map(encode, foreign)))
    odd = {"kind": "epoch", "time/total_s": "long", "perf/epoch_s": "5", "perf/s_per_sample": [1]}
    (run_dir / "metrics.jsonl").write_bytes(encode(odd))
    (run_dir / "progress.json").write_text('{"total_s": "long"}')
    after = make_tracker(run_dir, quiet=True)
    after.start("step-00000010", session={"history_bytes": len(encode(odd)), "total_s": 2.0})
    after.close("paused")
    progress = read_progress(run_dir)
    assert (progress["sessions"], progress["restarts"]) == (2, 0) and progress["total_s"] >= 2.0
    assert rolled_back_epochs(run_dir) == set()


def test_rows_of_another_run_are_set_aside_unchanged_with_a_warning(tmp_path, capsys):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir, quiet=True)
    tracker.step(STEP)
    whole = (run_dir / "metrics.jsonl").read_bytes()
    tracker.start("step-00000010", resumed_from_step=10, session={"history_bytes": 9999, "total_s": 1.0})
    assert "but the checkpoint was saved at 9,999" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl.damaged-1").read_bytes() == whole
    assert (run_dir / "metrics.jsonl").read_bytes() == b""
    tracker.step(STEP)
    assert len(read(run_dir / "metrics.jsonl")) == 1
    tracker.close("failed")


def test_a_closed_pipe_turns_the_console_off_and_every_row_is_kept(tmp_path):
    program = """
import sys
sys.path.insert(0, sys.argv[2])
from test_tracker import STEP, make_tracker
from pathlib import Path
tracker = make_tracker(Path(sys.argv[1]))
tracker.start()
sys.stdin.readline()
for number in range(5):
    tracker.step({**STEP, "global_step": number})
tracker.close("finished")
import os
os._exit(0)  # Python itself complains about the closed pipe when it flushes stdout at its end
"""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", program, str(run_dir), str(__file__).rpartition("/")[0]]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as training:
        assert training.stdout.readline().startswith("start ")
        training.stdout.close()
        training.stdin.write("go\n")
        training.stdin.close()
        complaints = training.stderr.read()
        assert training.wait() == 0
    assert complaints.count("\n") == 1 and "the console is off from here on (BrokenPipeError" in complaints
    assert [row["global_step"] for row in read(run_dir / "metrics.jsonl")] == list(range(5))


def test_a_view_that_failed_is_not_called_again(tmp_path, capsys):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    tracker = make_tracker(tmp_path / "run")
    tracker.start()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with fifo.open("w") as stream:
        tracker.console = Console(epochs=3, stream=stream)
        os.close(reader)
        tracker.step({**STEP, "global_step": 111})
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # from here on, writing would work again
        tracker.step({**STEP, "global_step": 222})
        tracker.close("finished")
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert "222" not in shown and "finished" not in shown
    assert capsys.readouterr().err.count("the console is off from here on") == 1


def test_a_full_disk_is_said_loudly_once_and_its_end_too_and_training_goes_on(tmp_path):
    program = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_tracker import STEP, make_tracker
from pathlib import Path
tracker = make_tracker(Path(sys.argv[1]), quiet=True)
tracker.start()
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
for number in range(10):
    tracker.step({**STEP, "global_step": number})
    tracker.progress(step=number, message="x" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tracker.step({**STEP, "global_step": 10})
tracker.close("finished")
"""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", program, str(run_dir), str(__file__).rpartition("/")[0]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    said = ended.stderr.splitlines()
    kept = [row["global_step"] for row in read(run_dir / "metrics.jsonl")]
    assert kept[-1] == 10 and kept[:-1] == list(range(len(kept) - 1)) and 1 < len(kept) < 10
    lost = 11 - len(kept)
    assert [line for line in said if "ROWS ARE LOST" in line and "File too large" in line] == [said[1]]
    assert "progress.json cannot be written" in said[0]
    assert said[2:] == [f"warning: {run_dir}/metrics.jsonl is written again; rows lost before: {lost}."]
    assert read_progress(run_dir)["state"] == "finished"


def test_a_dashboard_that_fails_is_one_warning(tmp_path, capsys):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir, dashboard=True, quiet=True)
    (run_dir / "dashboard.png").mkdir()
    tracker.start()
    tracker.epoch(EPOCH)
    tracker.progress(epoch=1)
    tracker.close("finished")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "dashboard.png is not up to date: IsADirectoryError" in said[0]


def test_the_last_picture_is_drawn_before_close_returns(tmp_path):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir, dashboard=True, quiet=True)
    tracker.start()
    tracker.step(STEP)
    tracker.close("paused", "asked to")
    assert (run_dir / "dashboard.png").stat().st_mtime_ns >= (run_dir / "progress.json").stat().st_mtime_ns


def test_a_failed_run_does_not_wait_for_its_picture_but_gets_it(tmp_path):
    run_dir = tmp_path / "run"
    program = """
import sys
sys.path.insert(0, sys.argv[2])
from test_tracker import make_tracker
from pathlib import Path
tracker = make_tracker(Path(sys.argv[1]), dashboard=True, quiet=True)
tracker.start()
tracker.close("failed", "RuntimeError: something")
print(tracker._dashboard._child.pid, (tracker.run_dir / "dashboard.png").exists())
"""
    command = [sys.executable, "-c", program, str(run_dir), str(__file__).rpartition("/")[0]]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    pid, was_there = ended.stdout.split()
    assert was_there == "False"
    wait_for_the_end_of(int(pid))
    assert (run_dir / "dashboard.png").is_file()


def wait_for_the_end_of(pid):
    """Wait until a process that is not our child has gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([descriptor], [], [], 60)
    os.close(descriptor)


def test_every_row_reaches_wandb_under_its_own_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir, wandb="offline", quiet=True)
    tracker.start()
    for number in range(3):
        tracker.step({**STEP, "global_step": number})
    tracker.epoch(EPOCH)
    tracker.close("finished")
    (log,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    items = [json.loads(line).get("history", {}).get("item") for line in printed.splitlines()]
    logged = [{key: value for key, value in item.items() if not key.startswith("_")} for item in items if item]
    assert logged == read(run_dir / "metrics.jsonl")
    assert [item["_step"] for item in items if item] == [0, 2, 4, 41]


def test_a_restart_after_a_hang_and_a_roll_back_are_alerts(tmp_path):
    run_dir = tmp_path / "run"
    tracker = make_tracker(run_dir, restart=1, quiet=True, wandb="offline")
    tracker.start(previous_beat=(12, time.time() - 131.0))
    tracker.first_step()
    tracker.rolled_back(epoch=3, step=1240)
    tracker.close("failed", "no room")
    (session,) = records(run_dir)
    alerts = [record["alert"] for record in session if record["type"] == "alert"]
    assert [(alert["title"], alert["text"]) for alert in alerts] == [
        ("stall", "no step for 131 s; the run was restarted and goes on from step 0."),
        ("back to the last checkpoint", "step 1,240, epoch 3: NaN or infinity again and again."),
        ("the run has ended", "failed: no room"),
    ]
