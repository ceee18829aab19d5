"""W&B gets every row under one id, and cannot stop or hold the training. All runs here are offline or refused."""

import json
import os
import socket
import subprocess
import sys

import pytest

LOG = """
import json, sys
from ast_dist.track.wandb import WandbRun
run_dir, mode, first, last, options = sys.argv[1:]
options = json.loads(options)
close = options.pop("close", {})
say = lambda kind: lambda text: print(json.dumps([kind, text]), flush=True)
config = {"gate": {"target_rate": 0.4}}
run = WandbRun(run_dir, mode, "tests", config, warn=say("warn"), inform=say("inform"), **options)
for number in range(int(first), int(last)):
    kind = "epoch" if number % 5 == 4 else "step"
    run.log({"kind": kind, "global_step": 10 * number, "gate/rate": 0.4, "train/loss": 1.0 / (number + 1)}, number)
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
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=100)
    assert ended.stderr == ""
    return [tuple(json.loads(line)) for line in ended.stdout.splitlines()]


def records(run_dir):
    """The records of each offline run in RUN/wandb, oldest first, as `wandb leet inspect --json` prints them."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([json.loads(line) for line in printed.splitlines()])
    return found


def history(session):
    return [record["history"]["item"] for record in session if record["type"] == "history"]


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
    for session, numbers in ((before, range(12)), (after, range(8, 15))):
        run = next(record["run"] for record in session if record["type"] == "run")
        assert (run["run_id"], run["project"], run["display_name"]) == (first_id, "tests", "run")
        assert run["config"]["update"]["gate"] == {"target_rate": 0.4}
        metric = next(record["metric"] for record in session if record["type"] == "metric")
        assert (metric["glob_name"], metric["step_metric"]) == ("*", "global_step")
        rows = history(session)
        # A row's own step is its number in metrics.jsonl: rows 8 … 11, logged twice, are the same rows to W&B.
        assert [row["_step"] for row in rows] == list(numbers)
        assert [row["global_step"] for row in rows] == [10 * number for number in numbers]
        for row in rows:
            kind = "epoch" if row["_step"] % 5 == 4 else "step"
            own = {key: value for key, value in row.items() if not key.startswith("_")}
            loss = pytest.approx(1 / (row["_step"] + 1))
            assert own == {"kind": kind, "global_step": row["global_step"], "gate/rate": 0.4, "train/loss": loss}


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
    assert [len(history(session)) for session in records(run_dir)] == [5]


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


def test_a_folder_that_takes_no_files_turns_wandb_off_with_one_warning(run_dir):
    # W&B would fall back to a temporary folder where it cannot write; a file in its place makes it fail.
    (run_dir / "wandb").write_text("not a folder")
    said = log_rows(run_dir, "offline", 0, 5)
    warnings = [text for kind, text in said if kind == "warn"]
    assert len(warnings) == 1 and "W&B: off from here on" in warnings[0]


def test_off_writes_nothing_and_loads_no_torch(run_dir):
    assert log_rows(run_dir, "off", 0, 5) == [("id", None), ("torch", False)]
    assert list(run_dir.iterdir()) == []
