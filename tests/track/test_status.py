"""`ast_dist.status` tells where a run stands, at once and from its files alone."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import termios

import pyte
import pytest

from ast_dist.status import main
from ast_dist.track.progress import NUMBER_KEYS

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


LEFT = {"eta_s": 31.0, "eta_low_s": 28.0, "eta_high_s": 40.0, "sessions_left_low": 1, "sessions_left_high": 2}


def change(run_dir, /, **fields):
    path = run_dir / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_text_has_the_time_and_the_sessions_left_as_intervals_and_the_last_warning(make_run):
    run_dir = make_run(state="paused")
    change(run_dir, **LEFT, session_hours=8.5, warnings=2, last_warning="a sample was left out")
    text = status(run_dir).stdout
    assert "0:31 left (0:28 to 0:40)\n" in text
    assert "sessions    1, 1 to 2 more of 8.5 h\n" in text
    assert "warnings    2 in this session, the last: a sample was left out\n" in text


def test_of_a_killed_run_nothing_is_said_of_what_is_left(make_run):
    run_dir = make_run(state="running")
    change(run_dir, **LEFT, session_hours=8.5)
    told = json.loads(status(run_dir, "--json").stdout)
    assert told["state"] == "stopped" and {told[key] for key in LEFT} == {None}
    assert "left" not in status(run_dir).stdout and "more" not in status(run_dir).stdout


def test_several_runs_are_a_table_with_a_line_each(make_run, tmp_path):
    first = make_run(state="finished").rename(tmp_path / "first")
    second = make_run(epochs_done=3, state="paused")
    change(second, **LEFT, warnings=2)
    head, *lines = status(first, second).stdout.splitlines()
    assert head.split() == "run state epoch step best top-1 spent left sessions warnings".split()
    assert len(lines) == 2 and {line.index("  " + line.split()[1]) for line in lines} != {-1}
    assert lines[0].split()[1:4] == ["finished", "14/30", "139"]
    assert "0:31 (0:28 to 0:40)" in lines[1] and lines[1].split()[-2:] == ["1", "2"]
    told = [json.loads(line) for line in status(first, second, "--json").stdout.splitlines()]
    assert [run["state"] for run in told] == ["finished", "paused"]


def test_a_run_that_cannot_be_read_hides_no_other_and_the_exit_code_tells(make_run, tmp_path):
    run_dir, absent = make_run(state="finished"), tmp_path / "absent"
    (tmp_path / "odd" / "progress.json").mkdir(parents=True)
    ended = status(absent, run_dir, tmp_path / "odd")
    assert ended.returncode == 2
    assert [line.split()[1] for line in ended.stdout.splitlines()[1:]] == ["unreadable", "finished", "unreadable"]
    first, second = ended.stderr.splitlines()
    assert first.startswith(f"error: {absent}: no such folder") and "odd/progress.json: cannot be read" in second
    assert [json.loads(line)["state"] for line in status(absent, run_dir, "--json").stdout.splitlines()] == [
        *("unreadable", "finished")
    ]


def test_watching_goes_on_while_a_run_is_moved_aside_and_begun_anew(make_run, tmp_path):
    run_dir = make_run(epochs_done=2, state="running")
    command = [sys.executable, "-m", "ast_dist.status", str(run_dir), "--json", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert json.loads(watcher.stdout.readline())["state"] == "stopped"
        run_dir.rename(tmp_path / "aside")
        told = json.loads(watcher.stdout.readline())
        assert told["state"] == "unreadable" and "no such folder" in told["message"]
        make_run(epochs_done=1, state="finished")
        while told["state"] == "unreadable":  # a look in the middle of the writing finds a folder that is no run yet
            told = json.loads(watcher.stdout.readline())
        assert (told["state"], told["epoch"]) == ("finished", 1)
        assert watcher.wait() == 0


ODD = ("abc", "1", float("inf"), float("nan"), True, [1], {}, 10**400)


@pytest.mark.parametrize("odd", ODD, ids=lambda value: str(value)[:5])
def test_odd_values_in_progress_json_are_shown_as_unknown(make_run, capsys, odd):
    run_dir = make_run(state="paused")
    change(run_dir, **dict.fromkeys(NUMBER_KEYS, odd))
    assert main([str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "epoch       - of -, step -\n" in text and "best -, last -\n" in text and "time        - spent\n" in text
    assert main([str(run_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {told[key] for key in NUMBER_KEYS} == {None}
    assert main([str(run_dir), str(run_dir.parent)]) == 2
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["paused", *"- - - - - - -".split()]


def test_watching_on_a_terminal_shows_one_screen_that_changes_in_place(make_run):
    run_dir = make_run(epochs_done=1, state="running")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    screen = pyte.Screen(100, 24)
    stream = pyte.ByteStream(screen)
    with (run_dir / ".lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "ast_dist.status", str(run_dir), "--watch"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, env={**os.environ, "TERM": "xterm"}) as watcher:
            os.close(theirs)
            while not any("epoch       1 of 30" in line for line in screen.display):
                stream.feed(os.read(ours, 4096))
            make_run(epochs_done=2, state="finished")
            while watcher.poll() is None:
                with contextlib.suppress(OSError):  # Linux says EIO when the last holder of the other end is gone
                    stream.feed(os.read(ours, 4096))
    os.close(ours)
    shown = [line.rstrip() for line in screen.display if line.strip()]
    assert "epoch       2 of 30" in "\n".join(shown)
    assert [line.split()[0] for line in shown].count("epoch") == 1
    assert shown[0].startswith("run ") and shown[1].startswith("state       finished")


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
