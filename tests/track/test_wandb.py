"""W&B gets every row under one id, and cannot stop or hold the training. All runs here are offline or refused."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

import ast_dist
from ast_dist.track.code_version import code_version
from ast_dist.track.wandb_fragments import own_step
from tests.faults.wandb_server import wandb_server
from tests.track.wandb_log import history, records, summary

LOG = """
import json, os, signal, sys
from ast_dist.track.alerts import Alerts
from ast_dist.track.wandb import WandbRun
run_dir, mode, first, last, options = sys.argv[1:]
options = json.loads(options)
close, watched, restored = options.pop("close", {}), options.pop("watched", None), options.pop("restored", 0)

def row_of(number):
    kind = "epoch" if number % 5 == 4 else "step"
    scores = {"val/acc1": 50.0 - number, "val/loss": 1.0 + number} if kind == "epoch" else {}
    row = {"kind": kind, "global_step": 10 * number, "gate/rate": 0.4, "train/loss": 1.0 / (number + 1), **scores}
    return row | {"train/steps_nonfinite": number // 6}

say = lambda kind: lambda text: print(json.dumps([kind, text]), flush=True)
config = {"gate": {"target_rate": 0.4}}
options |= {"warn": say("warn"), "inform": say("inform"), "restored": [row_of(number) for number in range(restored)]}
run = WandbRun(run_dir, mode, "tests", config, **options)
for number in range(int(first), int(last)):
    run.log(row_of(number))
if watched is not None:  # killed once that much of its log is on disk
    from pathlib import Path
    while sum(log.stat().st_size for log in Path(run_dir).glob("wandb/*run-*/*.wandb")) < watched:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
run.close(**close)
say("id")(run.run_id)
say("torch")("torch" in sys.modules)
"""
FAKE_KEY = "0123456789" * 4


def log_rows(run_dir, mode, first, last, environment=None, **options):
    """Log rows first … last - 1 in a process of its own, with no key and no home. Returns (kind, text) pairs."""
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    command = [sys.executable, "-c", LOG, str(run_dir), mode, str(first), str(last), json.dumps(options)]
    env |= {"HOME": str(home), **(environment or {})}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=100)
    assert ended.returncode == (-signal.SIGKILL if "watched" in options else 0)
    assert ended.stderr == ""
    return [tuple(json.loads(line)) for line in ended.stdout.splitlines()]


def steps(numbers):
    """W&B's steps of the program's rows."""
    return [
        own_step({"kind": "epoch" if number % 5 == 4 else "step", "global_step": 10 * number}) for number in numbers
    ]


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_every_row_is_logged_with_its_keys_and_a_resumed_run_goes_on_under_the_same_id(run_dir):
    said = log_rows(run_dir, "offline", 0, 12)
    first_id = dict(said)["id"]
    assert "warn" not in dict(said) and first_id in dict(said)["inform"]
    assert (run_dir / "wandb_id").read_text() == f"{first_id}\n"
    assert dict(log_rows(run_dir, "offline", 8, 15))["id"] == first_id

    before, after = records(run_dir)
    # Rows 8 … 11 are logged twice, and kept once: `wandb sync` would send both.
    for session, numbers in ((before, range(12)), (after, range(12, 15))):
        run = next(record["run"] for record in session if record["type"] == "run")
        assert (run["run_id"], run["project"], run["display_name"]) == (first_id, "tests", "run")
        assert run["config"]["update"]["gate"] == {"target_rate": 0.4}
        metric = next(record["metric"] for record in session if record["type"] == "metric")
        assert (metric["glob_name"], metric["step_metric"]) == ("*", "global_step")
        rows = history(session)
        assert [row["_step"] for row in rows] == steps(numbers)
        for number, row in zip(numbers, rows, strict=True):
            own = {key: value for key, value in row.items() if not key.startswith("_")}
            loss = pytest.approx(1 / (number + 1))
            expected = {"global_step": 10 * number, "gate/rate": 0.4, "train/loss": loss}
            expected |= {"train/steps_nonfinite": number // 6, "kind": "epoch" if number % 5 == 4 else "step"}
            if number % 5 == 4:
                expected |= {"val/acc1": 50.0 - number, "val/loss": 1.0 + number}
            assert own == expected


def test_a_kill_and_what_it_cost_leave_each_row_once_in_all_fragments_together(run_dir):
    # Rows 0 … 11 reached the disk before the kill. The run goes on from a checkpoint after row 8, and is killed with
    # nothing of rows 12 … 15 on disk; then from one after row 14: rows 12 … 14 are in metrics.jsonl alone.
    log_rows(run_dir, "offline", 0, 13, watched=8000)
    log_rows(run_dir, "offline", 9, 16, watched=1, restored=9)
    said = log_rows(run_dir, "offline", 15, 20, restored=15)
    assert "warn" not in dict(said)
    sessions = records(run_dir)
    kept = [[row["_step"] for row in history(session)] for session in sessions]
    assert len(kept[0]) >= 10, "the first kill left rows behind"
    assert set(steps([13, 14])) <= set(kept[-1]), "rows that the second one cost are logged again"
    assert [step for fragment in kept for step in fragment] == steps(range(20)), "each once, as `wandb sync` sends them"
    # Of the whole run, not of the last session alone.
    assert summary(sessions[-1])["val/acc1"] == {"max": 46.0}
    assert summary(sessions[-1])["val/loss"] == {"min": 5.0}


def test_online_the_server_gets_each_row_once_through_a_kill_and_a_session_offline(run_dir):
    with wandb_server() as server:
        log_rows(run_dir, "online", 0, 10, server.environment)
        assert [row["_step"] for row in server.rows] == steps(range(10))
        assert all(log.with_name(f"{log.name}.synced").exists() for log in run_dir.glob("wandb/run-*/*.wandb"))
        # Killed before W&B sent a thing: it does so every 15 s.
        log_rows(run_dir, "online", 8, 15, server.environment, restored=8, watched=9000)
        assert [row["_step"] for row in server.rows] == steps(range(10))
        log_rows(run_dir, "offline", 13, 17, restored=13)
        assert [row["_step"] for row in server.rows] == steps(range(10))
        said = log_rows(run_dir, "online", 16, 20, server.environment, restored=16)
        assert "warn" not in dict(said)
        assert [row["_step"] for row in server.rows] == steps(range(20))
        sent = len(server.rows)
        command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online"]
        command += map(str, run_dir.glob("wandb/*run-*"))
        env = {**os.environ, **server.environment, "HOME": str(run_dir.parent / "home")}
        subprocess.run(command, check=True, capture_output=True, env=env, cwd=run_dir.parent, timeout=100)
        assert len(server.rows) == sent, "there is nothing left to send"


def test_a_row_has_the_same_step_however_often_rows_are_written():
    # Row numbers of metrics.jsonl would mean other steps once a killed run goes on with another track.every_steps.
    rows = [{"kind": "step", "global_step": step} for step in (90, 100)] + [{"kind": "epoch", "global_step": 100}]
    assert [own_step(row) for row in rows] == [180, 200, 201]


def test_the_page_shows_group_tags_job_type_and_which_code_it_is(run_dir):
    long = "a.very.long.module:Name" * 4
    log_rows(run_dir, "offline", 0, 1, group="series", tags=["mine", "sundew", "mine", long])
    (session,) = records(run_dir)
    run = next(record["run"] for record in session if record["type"] == "run")
    assert (run["run_group"], run["job_type"], run["tags"]) == (
        "series",
        "train",
        sorted(["mine", "sundew", long[:64]]),
    )
    assert run["config"]["update"]["code"] == code_version()


def test_the_code_is_told_by_version_and_by_commit_where_there_is_one(tmp_path):
    assert code_version(tmp_path) == {"ast_dist": ast_dist.__version__}

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    git("init")
    assert code_version(tmp_path) == {"ast_dist": ast_dist.__version__}
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert code_version(tmp_path)["commit"] == commit
    (tmp_path / "file").write_text("two")
    assert code_version(tmp_path)["commit"] == f"{commit}-dirty"


def test_alerts_of_rows_and_of_the_end_are_recorded_once_a_kind(run_dir):
    log_rows(run_dir, "offline", 0, 20, close={"state": "failed", "message": "RuntimeError: lost"})
    (session,) = records(run_dir)
    alerts = [record["alert"] for record in session if record["type"] == "alert"]
    assert [(alert["title"], alert["level"]) for alert in alerts] == [
        ("NaN or infinity", "WARN"),
        ("the run has ended", "ERROR"),
    ]
    assert alerts[0]["text"] == "by step 60, 1 steps were skipped: not finite (0 before)."
    assert alerts[1]["text"] == "failed: RuntimeError: lost"
    assert [alert["wait_duration"] for alert in alerts] == ["600000", "600000"]
    exit_code = next(record["exit"]["exit_code"] for record in session if record["type"] == "exit")
    assert exit_code == 1


def test_the_id_of_a_restored_checkpoint_wins_and_is_kept(run_dir):
    (run_dir / "wandb_id").write_text("fromfile\n")
    assert dict(log_rows(run_dir, "offline", 0, 1))["id"] == "fromfile"
    assert dict(log_rows(run_dir, "offline", 1, 2, run_id="restored"))["id"] == "restored"
    assert (run_dir / "wandb_id").read_text() == "restored\n"


def test_online_without_a_key_warns_once_and_writes_every_row_offline(run_dir):
    said = log_rows(run_dir, "online", 0, 5)
    warnings = [text for kind, text in said if kind == "warn"]
    assert len(warnings) == 1
    assert "no API key: set WANDB_API_KEY or run `wandb login`" in warnings[0] and "written offline" in warnings[0]
    assert [len(history(session)) for session in records(run_dir)] == [5]


def test_an_unreachable_server_warns_once_and_every_row_is_written_offline(run_dir):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        environment = {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{nobody.getsockname()[1]}"}
        said = log_rows(run_dir, "online", 0, 5, environment, init_timeout_s=1)
    warnings = [text for kind, text in said if kind == "warn"]
    assert len(warnings) == 1 and "W&B: not online (CommError" in warnings[0]
    # The try to go online may leave a log, too, without a row.
    assert [len(rows) for session in records(run_dir) if (rows := history(session))] == [5]


def test_a_server_that_never_answers_holds_neither_rows_nor_the_end(run_dir):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        said = log_rows(run_dir, "online", 0, 20_000, environment, init_timeout_s=3, close={"timeout_s": 0.1})
    warnings = [text for kind, text in said if kind == "warn"]
    assert len(warnings) == 2
    assert "10,000 rows wait to be sent" in warnings[0]
    assert "not done 0.1 s after the end" in warnings[1]


def test_an_alert_that_a_server_never_answers_does_not_hold_the_process(run_dir):
    with wandb_server() as server:
        server.unanswered = "NotifyScriptableRunAlert"
        said = log_rows(run_dir, "online", 0, 10, server.environment, close={"timeout_s": 5})
    # The process has ended, with exit code 0 and no traceback.
    warnings = [text for kind, text in said if kind == "warn"]
    assert len(warnings) == 1 and "not done 5 s after the end; send the rest: wandb sync" in warnings[0]
    assert [len(history(session)) for session in records(run_dir)] == [10]


def test_the_helper_of_a_notebook_that_started_the_training_is_not_used(run_dir):
    # It is gone here; where it is not, it keeps a killed session's run to itself.
    said = log_rows(run_dir, "offline", 0, 5, {"WANDB_SERVICE": "3-1-unix-/nowhere/no-such-socket"})
    assert "warn" not in dict(said)
    assert [len(history(session)) for session in records(run_dir)] == [5]


def test_a_folder_that_takes_no_files_turns_wandb_off_with_one_warning(run_dir):
    # W&B would fall back to a temporary folder where it cannot write; a file in its place makes it fail.
    (run_dir / "wandb").write_text("not a folder")
    said = log_rows(run_dir, "offline", 0, 5)
    warnings = [text for kind, text in said if kind == "warn"]
    assert len(warnings) == 1 and "W&B: off from here on" in warnings[0]


def test_off_writes_nothing_and_loads_no_torch(run_dir):
    assert log_rows(run_dir, "off", 0, 5) == [("id", None), ("torch", False)]
    assert list(run_dir.iterdir()) == []
