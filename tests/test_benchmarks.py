"""The benchmarks run, write what they promise, and README's tables come from it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ast_dist.errors import UserError
from benchmarks import tables
from benchmarks.cifar10 import epoch_rows
from benchmarks.gpu_loader import WAYS

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"benchmark", "command", "commit", "date", "machine", "versions", "rows"}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple["subprocess.CompletedProcess[str]", dict[str, Any]]:
    """The GPU benchmark at toy size, with time enough for all of it on a busy machine."""
    out = tmp_path_factory.mktemp("results")
    done = run("benchmarks.gpu", "--toy", "--no-compiled", "--budget-minutes", "5", "--out", str(out))
    return done, json.loads((out / "gpu-toy.json").read_text())


def rows_of(content: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["measure"] == measure]


def test_gpu_benchmark_ends_well_and_prints_its_tables_last(toy):
    done, content = toy
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in {key for row in content["rows"] for key in row}
    last_line = done.stdout.rstrip().splitlines()[-1]
    assert content["command"] in last_line and content["date"][:10] in last_line


def test_result_file_says_what_was_measured_where_and_on_which_device(toy):
    _, content = toy
    assert content.keys() == KEYS
    assert content["benchmark"] == "gpu-toy" and content["command"] == "python -m benchmarks.gpu --toy"
    assert {"cpu", "cores", "memory_gb", "gpu"} <= content["machine"].keys() and content["machine"]["cores"] >= 1
    assert {"python", "torch", "ast-dist"} <= content["versions"].keys()
    assert all(row["device"] for row in content["rows"])


def test_every_measure_has_a_row_with_its_figures(toy):
    _, content = toy
    figures = {
        "ceilings": {"matmul_bf16_tflops", "copy_gb_per_s", "peak_tflops", "peak_source"},
        "training_step": {"images_per_s", "step_ms", "mfu", "peak_tflops", "gate_ms", "gate_share", "batch_size"},
        "exact_resume": {"identical", "sha256", "sha256_resumed", "resumed_from_step"},
        "checkpoint_stall": {"stall_ms", "merge_ms", "save_ms", "write_ms", "commit_ms", "checkpoint_mb"},
        "end_to_end": {"images_per_s", "data_wait", "decode_images_per_s", "threads", "jpeg_kb"},
        "gpu_loader": {"way", "cores", "images_per_s", "cpu_ms_per_image", "times_training"},
        "gate_per_epoch": {"order_ms", "plan_ms", "merge_ms"},
    }
    for measure, keys in figures.items():
        first = rows_of(content, measure)[0]
        assert keys <= first.keys(), measure
    assert len(rows_of(content, "gpu_loader")) == len(WAYS)
    step, loaded = rows_of(content, "training_step")[0], rows_of(content, "end_to_end")[0]
    assert 0 < step["mfu"] < 1 and 0 < step["gate_share"] < 1
    assert step["images_per_s"] == pytest.approx(1000 * step["batch_size"] / step["step_ms"], rel=0.01)
    assert 0 <= loaded["data_wait"] <= 1


def test_a_killed_run_that_went_on_has_the_state_of_one_that_never_stopped(toy):
    _, content = toy
    (row,) = rows_of(content, "exact_resume")
    assert row["identical"] is True and row["sha256"] == row["sha256_resumed"]
    assert row["full_epoch_steps"] < row["resumed_from_step"] < row["steps"] == row["resumed_steps"]


def test_what_does_not_fit_into_the_budget_is_left_out_and_says_why(tmp_path):
    done = run("benchmarks.gpu", "--toy", "--budget-minutes", "0.001", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu-toy.json").read_text())["rows"]
    assert len(rows) >= 6 and all("s left" in row["skipped"] for row in rows)
    assert any(row.get("compiled") for row in rows)


def test_a_result_file_is_whole_at_every_moment(tmp_path):
    path = tmp_path / "x.json"
    writer = (
        "import sys; from pathlib import Path; from benchmarks.result import ResultFile\n"
        "result = ResultFile(Path(sys.argv[1]), 'x', 'x')\n"
        "print(flush=True)\n"
        "while True: result.add({'measure': 'x', 'value': 1 / 3})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        seen = 0
        while seen < 30:
            seen = len(json.loads(path.read_text())["rows"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    content = json.loads(path.read_text())
    assert len(content["rows"]) >= seen and content["rows"][0]["value"] == 0.3333


def test_epoch_rows_keep_decoding_and_cached_epochs_apart(tmp_path):
    def step(rate: float, wait: float) -> dict[str, Any]:
        return {"kind": "step", "perf/images_per_s": rate, "perf/step_ms": 1000 / rate, "perf/data_wait": wait}

    def epoch(number: int, read: int) -> dict[str, Any]:
        costs = {"cost/samples_planned": 8, "cost/session_samples_read": read, "cost/flops_saved": 0.0}
        return {"kind": "epoch", "epoch": number, "perf/epoch_s": 1.5, "time/total_s": 2.0, "val/acc1": 50.0, **costs}

    rows = [step(10, 0.5), step(20, 0.1), step(90, 0.3), epoch(1, 8), step(40, 0.0), epoch(2, 12)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = epoch_rows(metrics)
    assert (first["images_per_s"], first["samples_read"], first["data_wait"]) == (20, 8, pytest.approx(0.3))
    assert (second["images_per_s"], second["samples_read"], second["data_wait"]) == (40, 4, 0.0)


README = "# title\n\n<!-- table:gpu-resume -->\nold\n<!-- end -->\n\nafter\n"


@pytest.fixture
def shown(tmp_path) -> tuple[Path, Path]:
    """A README with one table, and the results it shows."""
    row = {"measure": "exact_resume", "model": "m", "steps": 1234, "identical": True, "sha256": "ab" * 32}
    content = {
        **{"benchmark": "gpu", "command": "python -m benchmarks.gpu", "commit": "abc", "date": "2026-01-02T00:00:00"},
        **{"machine": {"gpu": "Some GPU", "cpu": "c", "cores": 1}, "versions": {"torch": "2.11"}},
        "rows": [row, {"measure": "exact_resume", "model": "left out", "skipped": "no time"}],
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpu.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    return readme, tmp_path / "results"


def make_tables(readme: Path, results: Path, *more: str) -> int:
    return tables.main(["--readme", str(readme), "--results", str(results), *more])


def test_tables_come_from_the_results_and_nothing_else_changes(shown):
    readme, _ = shown
    assert make_tables(*shown) == 0
    text = readme.read_text()
    assert text.startswith("# title\n\n<!-- table:gpu-resume -->\n") and text.endswith("<!-- end -->\n\nafter\n")
    assert "1,234" in text and "`abababababababab…`" in text and "old" not in text and "left out" not in text
    assert "Some GPU, torch 2.11, 2026-01-02, commit abc: `python -m benchmarks.gpu`" in text


def test_rows_kept_from_an_earlier_run_name_its_commit_and_command(shown):
    readme, results = shown
    content = json.loads((results / "gpu.json").read_text())
    earlier = {**content["rows"][0], "commit": "0123abc", "command": "python -m benchmarks.gpu --earlier"}
    (results / "gpu.json").write_text(json.dumps({**content, "rows": [earlier, *content["rows"]]}))
    make_tables(readme, results)
    [line] = [line for line in readme.read_text().splitlines() if "--earlier" in line]
    assert "commit 0123abc: `python -m benchmarks.gpu --earlier`; " in line
    assert line.endswith(f"`{content['command']}`")


def test_check_fails_exactly_while_readme_is_out_of_date(shown):
    readme, results = shown
    assert make_tables(*shown, "--check") == 1
    assert readme.read_text() == README
    assert make_tables(*shown) == 0
    assert make_tables(*shown, "--check") == 0
    path = results / "gpu.json"
    path.write_text(path.read_text().replace("1234", "1235"))
    assert make_tables(*shown, "--check") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table:nonsense -->\n<!-- end -->\n", "no such table: nonsense"),
        ("<!-- table:gpu-resume -->\nno end", "not each has its own"),
        ("<!-- table:gpu-resume -->\n<!-- table:gpu-step -->\n<!-- end -->\n", "not each has its own"),
        ("<!-- table:gpu-step -->\n<!-- end -->\n", "holds no rows of training_step"),
        ("<!-- table:cifar10 -->\n<!-- end -->\n", "python -m benchmarks.cifar10"),
    ],
)
def test_a_table_that_cannot_be_made_is_one_line_and_changes_nothing(shown, text, says):
    readme, _ = shown
    readme.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        make_tables(*shown)
    assert "\n" not in str(caught.value)
    assert readme.read_text() == text
