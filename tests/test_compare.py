"""Claims about `python -m ast_dist.compare`: which runs it makes, what it makes of them, and that it can be stopped."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from ast_dist.compare import main, parse_compare_arguments, plan
from ast_dist.compare_jobs import Run
from ast_dist.errors import run_command
from ast_dist.fault.lease import Lease
from ast_dist.track.history import read
from ast_dist.track.progress import lease_is_held
from tests.launching import PATIENCE_S, start, steps_done, wait_for
from tests.shards import overwrite, squares, write_split
from tests.training import NUM_SAMPLES, progress, snapshot, state_hash, words, write_shards

RUNS = ["full-1-seed0", "short-0.5-seed0", "random-0.5-seed0", "sundew-0.5-seed0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def argv(shards: Path, out: Path, *more: str) -> list[str]:
    """A comparison of four runs of 2 to 4 epochs. The tests' training arguments less the run's folder."""
    ours = ("--out", str(out), "--policies", "sundew", "--rates", "0.5", "--seeds", "1", "--loop.epochs", "4")
    gate = ("--gate.warmup-epochs", "0", "--gate.anneal-share", "0", "--checkpoint.every-steps", "2")
    return [*words(shards, out)[2:], *ours, *gate, *more]


@pytest.fixture(scope="module")
def done(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nobody disturbed."""
    out = tmp_path_factory.mktemp("comparisons") / "done"
    assert run_command(main, argv(shards, out, "--jobs", "2")) == 0
    return out


def rows_of(out: Path) -> dict[str, dict]:
    return {row["policy"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}


def test_every_policy_runs_at_its_budget_and_the_rows_say_what_it_cost(done: Path) -> None:
    assert sorted(path.name for path in (done / "runs").iterdir() if path.is_dir()) == sorted(RUNS)
    rows = rows_of(done)
    assert list(rows) == ["full", "short", "random", "sundew"]
    assert rows["full"]["cost"] == 4.0
    for policy in ("short", "random"):
        assert rows[policy]["cost"] == 2.0
        assert rows[policy]["samples_skipped"] == 2 * NUM_SAMPLES
        assert rows[policy]["flops_saved"] == 0.5
    # 96 samples are few for a random share: the sundew's cost is near its budget, not on it.
    assert rows["sundew"]["cost"] == pytest.approx(2.0, abs=0.25)
    assert [rows[policy]["epochs"] for policy in rows] == [4, 2, 4, 3]
    for name, row in zip(RUNS, rows.values(), strict=True):
        last = read(done / "runs" / name / "metrics.jsonl")[-1]
        assert row["acc1"] == [row["acc1_mean"]] == [pytest.approx(last["val/acc1"], rel=1e-3)]
        assert row["wall_s"] == pytest.approx(last["time/total_s"], rel=1e-3)
        assert (row["seeds"], row["acc1_sd"], row["gpu_joules"], row["jobs"]) == (1, None, None, 2)


def test_the_result_file_is_one_of_the_projects(done: Path) -> None:
    content = json.loads((done / "compare.json").read_text())
    assert content.keys() == {"benchmark", "command", "commit", "date", "machine", "versions", "rows"}
    assert content["benchmark"] == "compare"
    assert content["command"].startswith("python -m ast_dist.compare --data.train TRAIN --data.val VAL ")
    assert "--out OUT" in content["command"]
    assert str(done.parent) not in json.dumps(content)


def test_table_and_picture_are_written(done: Path) -> None:
    text = (done / "compare.md").read_text()
    body = [line for line in text.splitlines() if line.startswith("|")]
    assert len(body) == 2 + 4
    assert "one seed shows no spread, so this shows no difference" in text
    assert "the larger of the two standard deviations" in text
    assert imread(done / "compare.png").shape[:2] == (1000, 1600)


def test_a_second_start_trains_nothing_and_gives_the_same_table(
    done: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, rows = snapshot(done / "runs"), rows_of(done)
    assert run_command(main, argv(shards, done, "--jobs", "2")) == 0
    assert snapshot(done / "runs") == before
    assert rows_of(done) == rows
    assert max(map(len, capsys.readouterr().out.splitlines()[1:-1])) <= 80


def test_killed_in_the_middle_and_started_again_it_ends_with_the_same_figures(
    done: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    job = start("-m", "ast_dist.compare", *argv(shards, out, "--jobs", "2", "--policies", "random"))
    third = out / "runs" / RUNS[2]
    wait_for(lambda: steps_done(third) >= 1, "the third run's first step", job)
    job.kill()
    job.communicate()
    wait_until_free(out)
    finished_before = set(rows_of(out))
    assert finished_before
    assert run_command(main, argv(shards, out, "--jobs", "2", "--policies", "random")) == 0
    for name in RUNS[:3]:
        assert state_hash(out / "runs" / name) == state_hash(done / "runs" / name)
        if name.partition("-")[0] in finished_before:
            assert len(read(out / "runs" / name / "sessions.jsonl")) == 1, "a finished run was started again"
    other = {"wall_s", "acc1_lead"}  # the undisturbed comparison has one more policy to lead
    for policy, row in rows_of(out).items():
        expected = rows_of(done)[policy]
        assert {key: row[key] for key in row.keys() - other} == {key: expected[key] for key in row.keys() - other}


def wait_until_free(folder: Path) -> None:
    """Return once no process holds a folder; the kernel ends an orphan as soon as it is scheduled."""
    deadline = time.monotonic() + PATIENCE_S / 4
    while lease_is_held(folder):
        assert time.monotonic() < deadline, f"{folder} is still held"


def test_a_killed_comparison_leaves_no_training_behind(shards: Path, tmp_path: Path) -> None:
    job = start("-m", "ast_dist.compare", *argv(shards, tmp_path / "out", "--loop.epochs", "300"))
    first = tmp_path / "out/runs" / RUNS[0]
    wait_for(lambda: steps_done(first) >= 1, "the first step", job)
    job.kill()
    job.communicate()
    wait_until_free(first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_let_the_training_save_and_exit_with_130(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    first = tmp_path / "out/runs" / RUNS[0]
    is_over = threading.Event()

    def strike() -> None:
        while steps_done(first) < 2 and not is_over.is_set():
            pass
        if not is_over.is_set():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        assert run_command(main, argv(shards, tmp_path / "out", "--loop.epochs", "300")) == 130
    finally:
        is_over.set()
        thread.join()
    assert "0 of 4 runs are finished. The same command goes on." in capsys.readouterr().out
    assert progress(first)["state"] == "paused"
    assert "preempted, nothing lost" in progress(first)["message"]
    assert not lease_is_held(first)


def test_a_run_that_fails_ends_the_comparison_with_its_last_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_split(tmp_path / "train", squares(NUM_SAMPLES, side=8))
    write_split(tmp_path / "val", squares(20, side=8))
    for sample_id in (5, 9):
        overwrite(index, sample_id, b"not a JPEG")
    assert run_command(main, argv(tmp_path, tmp_path / "out")) == 1
    told = capsys.readouterr().err
    assert f"error: {RUNS[0]} failed with exit code 1" in told
    assert "2 damaged samples in" in told
    assert progress(tmp_path / "out/runs" / RUNS[0])["state"] == "failed"
    assert not (tmp_path / "out/runs" / RUNS[1]).exists()
    assert not (tmp_path / "out/compare.json").exists()


def test_a_training_that_was_told_to_stop_pauses_the_comparison(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, argv(shards, tmp_path / "out", "--session.hours", "1e-9")) == 0
    told = capsys.readouterr().out
    assert f"{RUNS[0]} is paused (session deadline: saved, nothing lost" in told
    assert "The same command goes on." in told


def names_of(out: Path, *arguments: str) -> list[str]:
    return [member.run.name for member in plan(parse_compare_arguments(["--out", str(out), *arguments])).members]


def test_seeds_are_outermost_and_full_short_and_random_are_always_there(shards: Path, tmp_path: Path) -> None:
    common = argv(shards, tmp_path / "out")
    found = names_of(tmp_path / "out", *common, "--rates", "0.5,0.25,0.50", "--seeds", "2", "--policies", "random")
    one_seed = ["full-1", "short-0.5", "random-0.5", "short-0.25", "random-0.25"]
    assert found == [f"{name}-seed{seed}" for seed in (0, 1) for name in one_seed]


def test_a_run_gets_its_seed_its_folder_and_the_training_options(shards: Path, tmp_path: Path) -> None:
    common = argv(shards, tmp_path / "out", "--optim.lr", "0.07", "--seeds", "2")
    members = plan(parse_compare_arguments(common)).members
    for member in members:
        assert isinstance(member.run, Run)
        config = member.config
        assert (config.seed, config.optim.lr, config.run_dir) == (member.seed, 0.07, str(member.run.run_dir))
        assert member.run.words[-6:-2] == ("--run-dir", config.run_dir, "--seed", str(member.seed))


def test_dry_run_lists_the_runs_and_writes_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, argv(shards, tmp_path / "out", "--dry-run")) == 0
    assert list(tmp_path.iterdir()) == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:5]] == RUNS
    assert lines[2] == ["short-0.5-seed0", "2", "1.0000", "2.00"]
    assert lines[4] == ["sundew-0.5-seed0", "3", "0.6667", "2.00"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--policies", "full,sundow"], "sundow: no such policy. Perhaps you meant sundew."),
        (["--policies", "no_such_module:Mine"], "no_such_module cannot be imported"),
        (["--rates", "0"], "0 is no share of full training's cost: it must lie in (0, 1]"),
        (["--rates", "0.5,1.5"], "1.5 is no share"),
        (["--rates", "half"], "--rates half: expected numbers"),
        (["--rates", ","], "--rates is empty"),
        (["--seeds", "0"], "--seeds is 0, but must be at least 1"),
        (["--seeds", "few"], "invalid int value"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--processes", "17"], "loop.global_batch_size is 16, but there are 17 processes"),
        (["--seed", "3"], "--seed: a comparison sets this for each of its runs. Use --seeds."),
        (["--gate.target_rate=0.3"], "Use --rates."),
        (["--gate.policy", "sundew"], "Use --policies."),
        (["--optim.lrr", "0.1"], "--optim.lr"),
        (["--optim.lr", "-1"], "optim.lr is -1, but must be above 0"),
        (["--data.train", "nowhere"], "nowhere: no such folder"),
        (["--rates", "0.03"], "sundew: a budget of 0.12 of 1 epochs cannot be met: at gate.target_rate 0.2"),
        (["--policies", "online", "--rates", "0.1"], "online: a budget of 0.4 of 1 epochs cannot be met"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line_and_leave_no_trace(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert says in refused(argv(shards, tmp_path / "out", *more), capsys)
    assert list(tmp_path.iterdir()) == []


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run_command(main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_out_must_be_a_folder_of_this_comparison(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    before = snapshot(tmp_path)
    assert "this is a file" in refused(argv(shards, tmp_path / "thesis.tex"), capsys)
    assert "holds 1 other files or folders (thesis.tex" in refused(argv(shards, tmp_path), capsys)
    assert "cannot be written" in refused(argv(shards, tmp_path / "thesis.tex/out"), capsys)
    assert snapshot(tmp_path) == before
    assert "--out" in refused(argv(shards, tmp_path)[: -len(argv(shards, tmp_path))], capsys)


def test_a_comparison_with_other_settings_is_refused_with_the_difference(
    done: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(done)
    line = refused(argv(shards, done, "--optim.lr", "0.3", "--processes", "2"), capsys)
    assert "optim.lr: 0.05 → 0.3; processes: 1 → 2" in line
    assert snapshot(done) == before


def test_more_seeds_may_be_asked_for_later(done: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, argv(shards, done, "--seeds", "2", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("(finished)" in line for line in lines) == 4
    assert lines[-1].startswith("8 runs")


def test_two_comparisons_do_not_share_a_folder(done: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = Lease(done)
    try:
        assert "another comparison runs here" in refused(argv(shards, done), capsys)
    finally:
        lease.release()


def test_settings_are_kept_beside_the_results(done: Path) -> None:
    kept = yaml.safe_load((done / "compare.yaml").read_text())
    assert (kept["policies"], kept["rates"], kept["seeds"]) == (["full", "short", "random", "sundew"], [0.5], 1)
    assert kept["training"]["loop"]["epochs"] == 4


def test_runs_take_one_thread_unless_told_otherwise(done: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in ((None, "1"), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if before:
            monkeypatch.setenv("OMP_NUM_THREADS", before)
        assert run_command(main, argv(shards, done)) == 0
        assert os.environ["OMP_NUM_THREADS"] == after
