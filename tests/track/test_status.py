"""`ast_dist.status` tells where a run stands, at once and from its files alone."""

import fcntl
import json
import subprocess
import sys

import pytest

KEYS = ["state", "epoch", "step", "best_acc1", "last_acc1", "sessions", "restarts", "total_s", "eta_s", "checkpoint"]


def status(*arguments):
    command = [sys.executable, "-m", "ast_dist.status", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_json_is_one_object_with_the_promised_keys(make_run):
    run_dir = make_run(epochs=30, epochs_done=14, restarts=[(1, 1, 60), (2, 0, 90)])
    ended = status(run_dir, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    told = json.loads(ended.stdout)
    assert list(told)[: len(KEYS)] == KEYS
    assert {key: told[key] for key in KEYS} == {
        "state": "finished",
        "epoch": 14,
        "step": 139,
        "best_acc1": pytest.approx(97.0 - 50 / 14),
        "last_acc1": pytest.approx(97.0 - 50 / 14),
        "sessions": 2,
        "restarts": 1,
        "total_s": pytest.approx(139 * 0.08),
        "eta_s": 120.0,
        "checkpoint": "step-00000100",
    }
    assert told["checkpoint_age_s"] > 0


def test_keys_that_a_run_has_not_written_are_there_as_null(tmp_path):
    (tmp_path / "progress.json").write_text('{"state": "failed"}')
    told = json.loads(status(tmp_path, "--json").stdout)
    assert told == {**dict.fromkeys(KEYS), "state": "failed", "checkpoint_age_s": None}


def test_a_killed_run_is_stopped_and_the_text_says_how_to_go_on(make_run):
    run_dir = make_run(state="running")
    assert json.loads(status(run_dir, "--json").stdout)["state"] == "stopped"
    text = status(run_dir).stdout
    assert "state       stopped (policy sundew)\n" in text
    assert "The same command again goes on from step-00000100." in text
    assert "\x1b" not in text


def test_a_held_run_is_running(make_run):
    run_dir = make_run(state="running")
    with (run_dir / ".lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        assert json.loads(status(run_dir, "--json").stdout)["state"] == "running"


@pytest.mark.parametrize("name", ["absent", "empty", "damaged"])
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "progress.json").write_text('{"state": "runn')
    ended = status(tmp_path / name)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: ") and name in ended.stderr
    assert not (tmp_path / "absent").exists() and not list((tmp_path / "empty").iterdir())


def test_watching_tells_each_change_and_ends_with_the_run(make_run):
    run_dir = make_run(epochs_done=1, state="running")
    with (run_dir / ".lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "ast_dist.status", str(run_dir), "--json", "--watch"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
            assert json.loads(watcher.stdout.readline())["epoch"] == 1
            make_run(epochs_done=2, state="finished")
            told = json.loads(watcher.stdout.readline())
            assert (told["epoch"], told["state"]) == (2, "finished")
            assert watcher.stdout.read() == ""
            assert watcher.wait() == 0


def test_status_loads_nothing_heavy(make_run):
    program = """
import sys
from ast_dist.status import main
main([sys.argv[1], "--json"])
heavy = {"torch", "numpy", "matplotlib", "wandb", "rich", "tyro", "yaml"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    command = [sys.executable, "-c", program, str(make_run())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_package_itself_and_its_tracking_load_no_torch():
    program = """
import sys
import ast_dist
assert len([name for name in sys.modules if name.startswith("ast_dist")]) == 1, "import ast_dist must stay light"
import ast_dist.track.tracker, ast_dist.track.dashboard
sys.exit("torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
