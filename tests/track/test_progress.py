"""progress.json and STATUS.txt are whole at every moment, and say what is so now."""

import fcntl
import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from ast_dist.errors import UserError
from ast_dist.track.progress import as_it_is_now, duration, lease_is_held, read_progress, status_text, write_progress


def test_a_reader_never_sees_a_half_written_progress(tmp_path):
    program = """
import sys
from ast_dist.track.progress import write_progress
for number in range(400):
    write_progress(sys.argv[1], {"state": "running", "step": number, "message": "x" * (number % 7) * 3000})
"""
    write_progress(tmp_path, {"state": "running", "step": -1, "message": ""})
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    steps = []
    while writer.poll() is None:
        progress = json.loads((tmp_path / "progress.json").read_bytes())
        steps.append(progress["step"])
        assert (tmp_path / "STATUS.txt").read_text().startswith("run ")
    assert writer.returncode == 0
    assert steps == sorted(steps) and len(set(steps)) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"progress.json", "STATUS.txt"}


def test_what_was_written_is_read_with_nan_as_unknown_and_the_time_of_writing(tmp_path):
    write_progress(tmp_path, {"state": "paused", "best_acc1": float("nan"), "step": 7})
    progress = read_progress(tmp_path)
    written_at = datetime.fromisoformat(progress.pop("updated_at"))
    assert progress == {"state": "paused", "best_acc1": None, "step": 7}
    assert abs((datetime.now(UTC) - written_at).total_seconds()) < 3600


def test_a_write_that_fails_leaves_the_old_one_and_no_draft(tmp_path):
    write_progress(tmp_path, {"state": "running"})
    with pytest.raises(TypeError, match="state: a row cannot hold a object"):
        write_progress(tmp_path, {"state": object()})
    assert read_progress(tmp_path)["state"] == "running"
    blocked = tmp_path / "blocked"
    (blocked / "progress.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"progress\.json"):
        write_progress(blocked, {"state": "running"})
    assert [path.name for path in blocked.iterdir()] == ["progress.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no progress.json in this folder"), (b"", "not valid JSON"), (b'{"a', "not valid JSON"), (b"[]", "list")],
)
def test_what_is_not_a_run_is_refused_in_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "progress.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as refusal:
        read_progress(tmp_path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="no such folder"):
        read_progress(tmp_path / "absent")


def test_a_run_is_running_only_while_a_process_holds_it(make_run):
    run_dir = make_run(state="running")
    stopped = as_it_is_now(run_dir, read_progress(run_dir))
    assert (stopped["state"], stopped["eta_s"]) == ("stopped", None)
    assert "The same command again goes on from step-00000100." in stopped["message"]
    assert not (run_dir / ".lease").exists(), "looking must not touch the run"
    with (run_dir / ".lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        assert lease_is_held(run_dir)
        assert as_it_is_now(run_dir, read_progress(run_dir))["state"] == "running"
    assert not lease_is_held(run_dir)
    assert as_it_is_now(run_dir, read_progress(run_dir))["state"] == "stopped"


@pytest.mark.parametrize("state", ["finished", "paused", "failed"])
def test_a_state_that_the_run_wrote_last_stands_without_a_lease(make_run, state):
    run_dir = make_run(state=state)
    assert as_it_is_now(run_dir, read_progress(run_dir))["state"] == state


def test_the_lease_is_the_one_that_training_takes(make_run):
    from ast_dist.fault.lease import Lease

    run_dir = make_run(state="running")
    lease = Lease(run_dir)
    assert lease_is_held(run_dir)
    lease.release()
    assert not lease_is_held(run_dir)


def test_the_text_says_unknown_as_a_dash_and_needs_no_field():
    assert "best -, last -" in status_text({})
    text = status_text(
        {"epoch": 3, "epochs": 30, "step": 1234, "best_acc1": 91.234, "total_s": 3723, "eta_s": 31, "state": "running"}
    )
    assert "epoch       3 of 30, step 1,234\n" in text
    assert "best 91.23 %, last -" in text
    assert "1:02:03 spent, 0:31 left (estimate)" in text


def test_durations_are_read_at_a_glance():
    shown = [duration(seconds) for seconds in (None, 0, 31.4, 59.6, 3723, 90061)]
    assert shown == ["-", "0:00", "0:31", "1:00", "1:02:03", "1 d 1:01:01"]
