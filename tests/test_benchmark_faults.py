"""The benchmark of faults strikes real trainings, times what it says it times, and its formula is Daly's."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.faults import PARTS, main
from benchmarks.faults_goodput import best_interval_s, goodput_by_formula, goodput_of_regular_kills, predictions
from benchmarks.faults_peers import torchvision_tool, write_images
from benchmarks.faults_recovery import KILL_RANK, recover
from benchmarks.faults_runs import Tool, Training, our_tool, torchrun
from benchmarks.faults_saving import paired_costs_ms
from tests.launching import ROOT, environment
from tests.shards import squares, write_split


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A tiny training that all tools can do."""
    folder = tmp_path_factory.mktemp("faults")
    train = write_split(folder / "train", squares(160, side=32))
    val = write_split(folder / "val", squares(16, side=32))
    write_images(train.root, 32, folder / "images.pt")
    return Training(train.root, val.root, folder / "images.pt", "small_cnn", 8, 32, 10, 16, 2, 0, 120.0)


OURS = our_tool("ast_dist", lambda processes: torchrun(processes, 10), 0.5, by_hand=False)


@pytest.mark.faults
@pytest.mark.parametrize("tool", [OURS, torchvision_tool()], ids=lambda tool: tool.name)
def test_a_strike_is_timed_to_the_next_first_step_and_its_parts_add_up(
    training: Training, tmp_path: Path, tool: Tool
) -> None:
    row = recover(tool, KILL_RANK, training, tmp_path / "run", tries=1)
    assert row["tries"] == 1 and row["unloadable"] == 0
    assert row["interval_s"] > 0.0 and row["steps_lost_max"] >= row["steps_lost_median"] >= 0
    parts = [row[f"{part}_median"] for part in ("detect_s", "restart_s", "load_s", "first_step_s")]
    assert all(part > 0.0 for part in parts)
    assert sum(parts) == pytest.approx(row["recovery_s_median"], abs=0.01)


@pytest.mark.faults
def test_kills_of_a_saving_process_leave_our_checkpoints_loadable_and_are_counted(tmp_path: Path) -> None:
    for name, kills in (("ast_dist", 4), ("torchvision reference", 4)):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-m", "benchmarks.faults_kills", name, str(folder), str(kills), "0", "8"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        assert row["tries"] == kills and row["saves"] > 0 and row["checkpoint_mb"] > 0.1
        assert row["nothing_loads"] == 0 and row["mixed"] == 0
        if name == "ast_dist":
            assert row["unloadable"] == 0


def test_the_formula_is_what_a_simulation_of_random_faults_gives() -> None:
    generator = random.Random(0)
    mtbf_s, every_s, save_s, recovery_s = 300.0, 60.0, 3.0, 20.0
    useful_s = wall_s = 0.0
    for _ in range(40_000):
        left_s = generator.expovariate(1.0 / mtbf_s)
        # A fault in the recovery itself begins another one, which the exponential has no memory of.
        while left_s < recovery_s:
            wall_s += left_s
            left_s = generator.expovariate(1.0 / mtbf_s)
        useful_s += every_s * int((left_s - recovery_s) / (every_s + save_s))
        wall_s += left_s
    assert goodput_by_formula(mtbf_s, every_s, save_s, recovery_s) == pytest.approx(useful_s / wall_s, rel=0.01)


def test_the_best_interval_is_the_best_and_near_youngs() -> None:
    for mtbf_s, save_s in ((3600.0, 1.0), (86400.0, 5.0), (600.0, 10.0)):
        best_s = best_interval_s(mtbf_s, save_s)
        best = goodput_by_formula(mtbf_s, best_s, save_s, 10.0)
        assert all(goodput_by_formula(mtbf_s, other * best_s, save_s, 10.0) < best for other in (0.8, 1.25))
        assert best_s == pytest.approx(math.sqrt(2 * save_s * mtbf_s), rel=0.1)


def test_regular_kills_cost_a_recovery_and_half_an_interval_each() -> None:
    assert goodput_of_regular_kills(60.0, 10.0, 0.0, 7.0) == pytest.approx(1 - 12 / 60)
    assert goodput_of_regular_kills(10.0, 10.0, 0.0, 7.0) == 0.0


def test_a_fault_that_comes_before_any_step_leaves_no_goodput() -> None:
    rows = list(predictions(0.05, 0.5, 8.0))
    assert len(rows) == 8
    assert [row["ranks"] for row in rows if row["mtbf_of"] == "one rank"] == ["8", "256", "4,096"] * 2
    hopeless = next(row for row in rows if row["ranks"] == "4,096" and row["mtbf_h"] == 1.0)
    assert hopeless["job_mtbf_s"] < 1.0 and hopeless["goodput_best"] < 0.01
    assert all(0.0 <= row["goodput_best_slow"] <= row["goodput_best"] <= 1.0 for row in rows)


def test_a_saves_cost_is_what_its_segment_takes_beyond_its_neighbours() -> None:
    def step(number: int, step_ms: float) -> dict[str, Any]:
        return {"kind": "step", "global_step": number, "perf/step_ms": step_ms}

    # Saves after steps 20, 40 and 60 of 10 a segment; an epoch ends at 55 and cuts into the segment up to 60.
    rows = [step(10, 900), step(20, 100), step(30, 130), step(40, 110), step(50, 131), {"kind": "epoch"}]
    rows += [step(60, 500), step(70, 150), step(80, 120)]
    costs_ms, plain_ms = paired_costs_ms(rows, 10)
    assert costs_ms == pytest.approx([10 * (130 - 105), 10 * (131 - 110), 10 * (150 - 120)])
    assert plain_ms == pytest.approx([100, 110, 120])


def test_a_part_replaces_its_own_rows_and_leaves_the_others_saying_where_they_are_from(tmp_path: Path) -> None:
    path = tmp_path / "faults-toy.json"
    save = {"part": "saving", "measure": "saving", "tool": "ast_dist", "model": "small_cnn", "saves": 9}
    fault = {"part": "recovery", "measure": "fault", "tool": "ast_dist", "fault": "SIGKILL of a rank"}
    old = [
        {"part": "prediction", "measure": "prediction", "mtbf_of": "nobody"},
        {**save, "total_ms": 50.0, "stall_ms": 20.0, "commit_s": 0.3, "step_ms": 400.0, "stall_max_ms": 30.0},
        {**fault, "saves": "every 10 s", "interval_s": 10.0, "recovery_s_median": 7.0, "tries": 5},
    ]
    path.write_text(json.dumps({"commit": "abc", "date": "2026", "command": "c", "rows": old}))
    assert main(["--toy", "--parts", "prediction", "--out", str(tmp_path)]) == 0
    content = json.loads(path.read_text())
    parts = [row["part"] for row in content["rows"]]
    assert parts == sorted(parts, key=PARTS.index)
    assert [row["commit"] for row in content["rows"] if row["part"] != "prediction"] == ["abc", "abc"]
    assert "nobody" not in path.read_text()
    goodput = [row for row in content["rows"] if row["measure"] == "goodput"]
    assert [(row["kill_every_s"], row["source"]) for row in goodput] == [(60.0, "formula"), (300.0, "formula")]
    assert goodput[0]["goodput"] == pytest.approx((1 - (7.3 + 5) / 60) * 10 / 10.05, rel=1e-3)
    assert "one rank" in tables.render_all(content)
