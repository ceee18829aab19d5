"""Claims about the training command, in one process, called as its main function."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml

from ast_dist.errors import run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.launching import finish, start, steps_done, wait_for
from tests.shards import overwrite, squares, write_split
from tests.training import NUM_SAMPLES, progress, snapshot, state_hash, words, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated run that is done."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert run_command(main, words(shards, run_dir, "--data.cache", "none", "--gate.anneal-share", "0")) == 0
    return run_dir


def test_a_finished_run_leaves_what_the_design_names(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "progress.json", "STATUS.txt", "sessions.jsonl"} <= names
    assert progress(finished)["state"] == "finished"
    rows = read_rows(finished / "metrics.jsonl")
    keys = set().union(*(row.keys() for row in rows))
    assert {"train/loss", "train/acc1_selected", "train/lr", "val/acc1", "val/acc5", "val/loss"} <= keys
    assert {"gate/rate", "gate/rate_target", "gate/threshold", "gate/integral", "gate/score_p50"} <= keys
    assert {"cost/samples_skipped", "cost/flops_saved", "perf/images_per_s", "perf/step_ms", "perf/data_wait"} <= keys
    assert not any("joules" in key or "energy" in key for key in keys), "no GPU, no joules"


def test_a_skipped_sample_is_not_read(finished: Path) -> None:
    epochs = [row for row in read_rows(finished / "metrics.jsonl") if row["kind"] == "epoch"]
    planned = [row["cost/samples_planned"] for row in epochs]
    assert planned[0] == NUM_SAMPLES
    assert planned[1] < NUM_SAMPLES
    read_so_far = [row["cost/session_samples_read"] for row in epochs]
    assert read_so_far == [sum(planned[: number + 1]) for number in range(len(planned))]
    assert epochs[-1]["cost/samples_skipped"] == 3 * NUM_SAMPLES - sum(planned)
    assert epochs[-1]["cost/flops_saved"] == pytest.approx(1 - sum(planned) / (3 * NUM_SAMPLES))


def test_the_same_command_on_a_finished_run_changes_no_weight(
    finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_hash(finished)
    assert run_command(main, words(shards, finished, "--data.cache", "none", "--gate.anneal-share", "0")) == 0
    assert state_hash(finished) == before
    assert progress(finished)["state"] == "finished"
    assert progress(finished)["sessions"] == 2


def test_two_runs_of_one_command_give_the_same_state(finished: Path, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "again"
    # The cache changes where pixels come from, not which.
    assert run_command(main, words(shards, run_dir, "--data.cache", "ram", "--gate.anneal-share", "0")) == 0
    assert state_hash(run_dir) == state_hash(finished)
    assert run_command(main, words(shards, tmp_path / "other", "--seed", "1", "--gate.anneal-share", "0")) == 0
    assert state_hash(tmp_path / "other") != state_hash(finished)


def test_never_moves_the_old_run_aside_whole(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--loop.epochs", "1")) == 0
    before = snapshot(run_dir)
    assert run_command(main, words(shards, run_dir, "--loop.epochs", "2", "--resume", "never")) == 0
    asides = list(tmp_path.glob("run.archived-*"))
    assert len(asides) == 1
    assert {k: v for k, v in snapshot(asides[0]).items() if k != ".lease"} == {
        k: v for k, v in before.items() if k != ".lease"
    }
    assert progress(run_dir)["sessions"] == 1
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["loop"]["epochs"] == 2


def test_a_restart_by_torchrun_goes_on_although_never_was_asked_for(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    argv = words(shards, run_dir, "--loop.epochs", "1", "--resume", "never")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert run_command(main, argv) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_command(main, argv) == 0
    assert not list(tmp_path.glob("run.archived-*"))
    assert progress(run_dir)["restarts"] == 1


def test_a_first_attempt_that_died_early_does_not_make_never_go_on_with_the_old_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--loop.epochs", "1")) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_command(main, words(shards, run_dir, "--loop.epochs", "1", "--resume", "never")) == 0
    assert len(list(tmp_path.glob("run.archived-*"))) == 1


def test_never_moves_what_a_link_points_to_and_keeps_the_link(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    argv = words(shards, tmp_path / "link", "--loop.epochs", "1", "--resume", "never")
    assert [run_command(main, argv) for _ in range(2)] == [0, 0]
    assert (tmp_path / "link").is_symlink()
    assert progress(tmp_path / "real")["state"] == "finished"
    assert len(list(tmp_path.glob("real.archived-*"))) == 1


def test_a_metrics_file_that_was_cut_is_set_aside_and_the_run_goes_on(
    finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    metrics = run_dir / "metrics.jsonl"
    cut = metrics.read_bytes()[:300]
    metrics.write_bytes(cut)
    assert run_command(main, words(shards, run_dir, "--data.cache", "none", "--gate.anneal-share", "0")) == 0
    assert (run_dir / "metrics.jsonl.damaged-1").read_bytes() == cut
    assert "the old one is now metrics.jsonl.damaged-1" in capsys.readouterr().err
    assert state_hash(run_dir) == state_hash(finished)


def test_an_epoch_of_a_tiny_target_still_trains_and_saves(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tiny = ("--gate.target-rate", "0.0001", "--gate.p-min", "0", "--gate.anneal-share", "0")
    assert run_command(main, words(shards, run_dir, *tiny)) == 0
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    assert state["epoch"] == 3
    assert state["global_step"] == 6 + 1 + 1


def test_a_half_removed_checkpoint_does_not_keep_later_ones_from_being_saved(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = words(shards, run_dir, "--checkpoint.every-steps", "2")
    assert run_command(main, [*argv, "--session.hours", "1e-9"]) == 0
    stale = run_dir / "checkpoints/step-00000001"
    stale.mkdir()
    assert run_command(main, argv) == 0
    assert progress(run_dir)["state"] == "finished"


def test_dry_run_writes_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, words(shards, tmp_path / "run", "--dry-run")) == 0
    assert list(tmp_path.iterdir()) == []
    output = capsys.readouterr().out
    assert "96 samples" in output
    assert "nothing was written" in output


def test_sigterm_saves_the_step_it_came_in_and_the_run_goes_on_exactly(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = words(shards, run_dir, "--data.cache", "none", "--gate.anneal-share", "0")

    is_over = threading.Event()

    def strike() -> None:
        while steps_done(run_dir) < 3 and not is_over.is_set():
            pass
        if not is_over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        assert run_command(main, argv) == 0
    finally:
        is_over.set()
        thread.join()
    assert progress(run_dir)["state"] == "paused"
    assert "SIGTERM: preempted, nothing lost" in progress(run_dir)["message"]
    assert progress(run_dir)["step"] == steps_done(run_dir)
    assert 3 <= progress(run_dir)["step"] < 18
    assert run_command(main, argv) == 0
    assert progress(run_dir)["state"] == "finished"
    assert state_hash(run_dir) == state_hash(finished)


def test_the_sessions_deadline_saves_and_ends_with_exit_code_0(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--session.hours", "1e-9")) == 0
    assert progress(run_dir)["state"] == "paused"
    assert "deadline" in progress(run_dir)["message"]
    assert 0 < progress(run_dir)["step"] <= 3
    assert run_command(main, words(shards, run_dir)) == 0
    assert progress(run_dir)["state"] == "finished"


def test_ctrl_c_saves_and_ends_cleanly(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start("-m", "ast_dist.train", *words(shards, run_dir, "--loop.epochs", "400"))
    wait_for(lambda: steps_done(run_dir) >= 2, "step 2", job)
    job.send_signal(signal.SIGINT)
    output = finish(job)
    assert "Traceback" not in output
    assert progress(run_dir)["state"] == "paused"
    assert progress(run_dir)["step"] == steps_done(run_dir)


@pytest.mark.parametrize(
    "more",
    [
        ("--optim.name", "adamw", "--optim.lr", "0.001", "--loop.precision", "bf16", "--optim.label-smoothing", "0.1"),
        ("--optim.clip-grad-norm", "1.0", "--optim.schedule", "linear"),
        ("--model.name", "resnet18", "--data.image-size", "32", "--loop.global-batch-size", "19", "--loop.epochs", "2"),
        ("--model.norm", "group", "--model.no-channels-last", "--loop.deterministic", "--gate.p-min", "0.4"),
    ],
    ids=["adamw-bf16", "clip-linear", "resnet-lone-sample", "group-deterministic"],
)
def test_stopped_and_resumed_equals_uninterrupted_whatever_the_recipe(
    shards: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    try:
        assert run_command(main, words(shards, whole, *more)) == 0
        # The deadline ends each session after its second step.
        assert run_command(main, words(shards, stopped, *more, "--session.hours", "1e-9")) == 0
        assert progress(stopped)["state"] == "paused"
        assert run_command(main, words(shards, stopped, *more)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert state_hash(stopped) == state_hash(whole)
    assert progress(whole)["last_acc1"] is not None


def test_damaged_samples_below_the_limit_are_named_counted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_split(tmp_path / "train", squares(NUM_SAMPLES, side=8))
    write_split(tmp_path / "val", squares(20, side=8))
    overwrite(index, 5, b"not a JPEG")
    run_dir = tmp_path / "run"
    # The limit allows one an epoch: that the same one is met in each of three epochs is no reason to stop.
    more = ("--gate.policy", "sundew", "--gate.warmup-epochs", "3", "--data.damaged-limit", "0.011", "--track.quiet")
    assert run_command(main, words(tmp_path, run_dir, *more)) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert all("0000005-x" in line for line in warnings)
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    assert state["counts"]["damaged"] == 3
    assert state["counts"]["backwarded"] == 3 * (NUM_SAMPLES - 1)
    assert state["gate"]["memory"]["visits"].tolist() == [3 * int(i != 5) for i in range(NUM_SAMPLES)]


def test_damaged_samples_above_the_limit_stop_the_run_with_their_list(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", squares(NUM_SAMPLES, side=8))
    write_split(tmp_path / "val", squares(20, side=8))
    overwrite(index, 5, b"not a JPEG")
    overwrite(index, 9, b"not a JPEG")
    run_dir = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"2 damaged samples in .*, but .* allows 1 .*check_shards.*0000005-x"):
        main(words(tmp_path, run_dir, "--loop.epochs", "1"))
    assert progress(run_dir)["state"] == "failed"


def test_damaged_validation_samples_above_the_limit_stop_the_run_too(tmp_path: Path) -> None:
    """Otherwise a lost mount would look like an accuracy of 0 %, and might be kept as the best."""
    write_split(tmp_path / "train", squares(NUM_SAMPLES, side=8))
    val = write_split(tmp_path / "val", squares(20, side=8))
    for sample_id in (3, 4):
        overwrite(val, sample_id, b"not a JPEG")
    with pytest.raises(RuntimeError, match=r"2 damaged samples in .*, but .* allows 1 .*check_shards.*0000003-x"):
        main(words(tmp_path, tmp_path / "run", "--loop.epochs", "1"))
    assert progress(tmp_path / "run")["best_acc1"] is None


def test_damaged_validation_samples_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "train", squares(NUM_SAMPLES, side=8))
    overwrite(write_split(tmp_path / "val", squares(20, side=8)), 7, b"not a JPEG")
    assert run_command(main, words(tmp_path, tmp_path / "run", "--loop.epochs", "1")) == 0
    assert "0000007-x" in capsys.readouterr().err
    assert read_rows(tmp_path / "run/metrics.jsonl")[-1]["val/samples_damaged"] == 1


def test_other_versions_than_before_are_told(finished: Path, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    env = json.loads((run_dir / "env.json").read_text())
    (run_dir / "env.json").write_text(json.dumps({**env, "torch": "2.0.0"}))
    with pytest.warns(RuntimeWarning, match=r"other versions than the run had before \(torch 2\.0\.0 → "):
        main(words(shards, run_dir, "--data.cache", "none", "--gate.anneal-share", "0"))


def test_a_runs_own_config_starts_another_run(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, ["--config", str(finished / "config.yaml"), "--run-dir", str(run_dir)]) == 0
    assert state_hash(run_dir) == state_hash(finished)
