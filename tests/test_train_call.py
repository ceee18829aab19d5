"""`ast_dist.train(…)`: the training command, called from Python."""

import importlib
import json
import shutil
import signal
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ast_dist
from ast_dist.track.history import read as read_rows
from tests.launching import finish, start, steps_done, wait_for
from tests.training import progress, snapshot, state_hash, words, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def settings(shards: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    """The settings of `tests.training.words`, as a caller writes them."""
    sections: dict[str, Any] = {
        "data": {"train": shards / "train", "val": str(shards / "val"), "image_size": 8, "crop": "padded"},
        "model": {"name": "small_cnn", "width": 8},
        "optim": {"lr": 0.05},
        "loop": {"epochs": 3, "global_batch_size": 16},
        "checkpoint": {"every_s": 0},
        "track": {"every_steps": 1, "dashboard": False},
    }
    sections["data"]["crop_pad_px"] = 1
    for name, value in more.items():
        sections[name] = sections.get(name, {}) | value if isinstance(value, dict) else value
    return {"run_dir": str(run_dir), "quiet": True, **sections}


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert ast_dist.train.main(words(shards, run_dir, "--quiet")) == 0
    return run_dir


def test_a_call_trains_what_the_command_trains_and_returns_the_final_progress(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    ended = ast_dist.train(**settings(shards, tmp_path / "run"))
    assert ended == progress(tmp_path / "run")
    assert (ended["state"], ended["epoch"], ended["eta_s"]) == ("finished", 3, 0.0)
    assert state_hash(tmp_path / "run") == state_hash(finished)
    ours, theirs = (yaml.safe_load((run / "config.yaml").read_text()) for run in (tmp_path / "run", finished))
    assert {k: v for k, v in ours.items() if k != "run_dir"} == {k: v for k, v in theirs.items() if k != "run_dir"}


def test_a_second_call_in_one_process_resumes_and_a_third_trains_another_run(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    ended = ast_dist.train(**settings(shards, tmp_path / "run", session={"hours": 1e-9}))
    assert ended["state"] == "paused" and ended["message"].startswith("session deadline")
    assert ended["session_hours"] == 1e-9 and ended["sessions_left_high"] >= ended["sessions_left_low"] >= 1
    assert 0 < ended["eta_low_s"] < ended["eta_s"] < ended["eta_high_s"]
    ended = ast_dist.train(**settings(shards, tmp_path / "run"))
    assert (ended["state"], ended["sessions"]) == ("finished", 2)
    assert state_hash(tmp_path / "run") == state_hash(finished)
    other = ast_dist.train(**settings(shards, tmp_path / "other", seed=1))
    assert other["state"] == "finished" and state_hash(tmp_path / "other") != state_hash(finished)


def test_epoch_rows_tell_the_pace_from_which_the_next_session_knows_the_time_left(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ast_dist.train(**settings(shards, run_dir))
    for row in read_rows(run_dir / "metrics.jsonl"):
        assert ("perf/s_per_sample" in row) == (row["kind"] == "epoch")
    trained = 96
    first = next(row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch")
    assert first["perf/s_per_sample"] == pytest.approx(first["perf/epoch_s"] / trained)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gate": {"target_rat": 0.4}}, "gate.target-rat"),
        ({"gate": {"target_rate": 1.4}}, "gate.target_rate is 1.4, not in (0, 1]."),
        ({"data": {"train": "no/such/folder"}}, "no/such/folder"),
        ({"run_dir": ""}, "--run-dir is missing"),
        ({"colour": "red"}, "colour"),
        ({"run_dir": None}, "run_dir has no value"),
        ({"gate": {"target_rate": None}}, "gate.target_rate has no value"),
        ({"help": True}, "help is no setting"),
    ],
)
def test_bad_input_is_a_user_error_of_one_line_and_changes_nothing(
    wrong: dict[str, Any], said: str, shards: Path, tmp_path: Path
) -> None:
    given = settings(shards, tmp_path / "run")
    given |= {name: given.get(name, {}) | value for name, value in wrong.items() if isinstance(value, dict)}
    given |= {name: value for name, value in wrong.items() if not isinstance(value, dict)}
    with pytest.raises(ast_dist.UserError) as refusal:
        ast_dist.train(**given)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert isinstance(refusal.value, ValueError)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(finished: Path, shards: Path) -> None:
    before = snapshot(finished)
    with pytest.raises(ast_dist.UserError, match="another configuration"):
        ast_dist.train(**settings(shards, finished, seed=7))
    assert snapshot(finished) == before


def test_a_run_saved_by_a_version_that_lacked_a_setting_goes_on(finished: Path, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    del saved["gate"]["hard_tail_visits"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    ended = ast_dist.train(**settings(shards, run_dir))
    assert (ended["state"], ended["sessions"]) == ("finished", 2)
    with pytest.raises(ast_dist.UserError, match=r"gate\.hard_tail_visits: 4 → 3"):
        ast_dist.train(**settings(shards, run_dir, gate={"hard_tail_visits": 3}))


def test_a_dry_run_returns_nothing_and_writes_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ast_dist.train(**settings(shards, tmp_path / "run", dry_run=True)) == {}
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_process_is_left_as_it_was(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    before = (torch.get_rng_state().tolist(), warnings.formatwarning, torch.backends.cudnn.benchmark)
    threads = set(threading.enumerate())
    ast_dist.train(**settings(shards, tmp_path / "run", loop={"epochs": 1, "deterministic": True}))
    assert (torch.get_rng_state().tolist(), warnings.formatwarning, torch.backends.cudnn.benchmark) == before
    assert not torch.are_deterministic_algorithms_enabled() and not torch.distributed.is_initialized()
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert set(threading.enumerate()) <= threads


def test_in_a_thread_it_trains_the_same_and_leaves_signals_alone(finished: Path, shards: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(ast_dist.train(**settings(shards, tmp_path / "run")))
        except BaseException as error:  # noqa: BLE001 - a thread's error is the test's to tell
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) is before
        thread.join(0.01)
    assert isinstance(results[0], dict), results
    assert results[0]["state"] == "finished" and state_hash(tmp_path / "run") == state_hash(finished)


def test_a_process_group_of_ones_own_is_refused(shards: Path, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ast_dist.UserError, match="destroy_process_group"):
            ast_dist.train(**settings(shards, tmp_path / "run"))
    finally:
        torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_of_two_calls_at_once_one_trains_and_the_other_is_refused_untouched(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    gate = threading.Barrier(2)
    ended: dict[str, Any] = {}

    def call(name: str) -> None:
        gate.wait()
        try:
            ended[name] = ast_dist.train(**settings(shards, tmp_path / name))
        except BaseException as error:  # noqa: BLE001 - a thread's error is the test's to tell
            ended[name] = error

    threads = [threading.Thread(target=call, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [trained] = [name for name, found in ended.items() if isinstance(found, dict)]
    [refused] = [name for name, found in ended.items() if isinstance(found, ast_dist.UserError)]
    assert "one run at a time" in str(ended[refused])
    assert state_hash(tmp_path / trained) == state_hash(finished) and not (tmp_path / refused).exists()
    dry = settings(shards, tmp_path / refused, dry_run=True)
    assert ast_dist.train(**dry) == {}, "a call that is over holds nothing"


SCRIPT = """
import json, sys
import ast_dist
assert "torch" not in sys.modules
given = json.loads(sys.argv[1])
try:
    ast_dist.train(**given)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    print(json.dumps(ast_dist.train(**given)))
else:
    print("not interrupted")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_training.py"
    path.write_text(SCRIPT)
    return path


def long_run(shards: Path, run_dir: Path) -> dict[str, Any]:
    whole = settings(shards, run_dir, loop={"epochs": 15})
    return json.loads(json.dumps(whole, default=str))


def test_ctrl_c_saves_then_raises_keyboard_interrupt_and_the_next_call_goes_on(
    shards: Path, script: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(str(script), json.dumps(long_run(shards, run_dir)))
    wait_for(lambda: steps_done(run_dir) >= 5, "step 5", process)
    process.send_signal(signal.SIGINT)
    first, second = finish(process).splitlines()
    assert first == "interrupted"
    ended = json.loads(second)
    assert (ended["state"], ended["epoch"], ended["sessions"]) == ("finished", 15, 2)
    again = [row for row in read_rows(run_dir / "sessions.jsonl") if "event" not in row][1]
    assert again["steps_repeated"] == 0 and again["resumed_from_step"] >= 5


def test_sigterm_ends_the_script_as_it_would_have_but_with_the_run_saved(
    shards: Path, script: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(str(script), json.dumps(long_run(shards, run_dir)))
    wait_for(lambda: steps_done(run_dir) >= 5, "step 5", process)
    process.send_signal(signal.SIGTERM)
    assert finish(process, expected=-signal.SIGTERM) == ""
    told = progress(run_dir)
    assert told["state"] == "paused" and told["message"] == "SIGTERM: preempted, nothing lost"
    assert told["checkpoint"] == f"step-{told['step']:08d}"


def test_the_module_is_the_function_and_stays_the_module() -> None:
    # The script above asks for it before the module is imported; tests.training has imported the module here.
    from ast_dist.train import main, train

    assert callable(ast_dist.train) and isinstance(ast_dist.train, types.ModuleType)
    assert ast_dist.train.main is main and ast_dist.train.train is train
    assert sys.modules["ast_dist.train"] is ast_dist.train


def test_the_public_names_are_documented_and_listed() -> None:
    assert {"Gate", "UserError", "train"} <= set(dir(ast_dist))
    assert "run_dir" in ast_dist.train.__call__.__doc__
    for name in ast_dist.__all__:
        found = getattr(ast_dist, name)
        assert isinstance(found, str | types.ModuleType) or found.__doc__
    assert importlib.import_module("ast_dist.train") is ast_dist.train
