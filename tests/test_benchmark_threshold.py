"""benchmarks.threshold: the rules are what they claim, the measures count right, and the command writes its rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ast_dist.errors import UserError
from benchmarks import tables, threshold
from benchmarks.result import RESULTS, load
from benchmarks.threshold_measures import Log, measures, own_ranks, settled_step, shared_ranks, split, top_missed
from benchmarks.threshold_rules import RULES, Original, Selected, quantile
from benchmarks.threshold_traces import Trace, load_trace

ROOT = Path(__file__).resolve().parents[1]


def scores(steps, batch, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).lognormal(0, 0.5, (steps, batch))).astype(np.float32)


def trace(steps=60, batch=40, **options):
    labels = np.random.default_rng(1).integers(4, size=(steps, batch)).astype(np.int16)
    return Trace("made-up", scores(steps, batch, **options), 20, 40, labels)


def log_of(rates, batch=100):
    """A log whose steps keep the given shares, of the scores 1 … batch, from the top."""
    log = Log()
    for rate in rates:
        values = np.arange(1, batch + 1, dtype=np.float32)
        log.add(values, Selected(values > batch - round(rate * batch), 1.0))
    return log


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_the_original_rule_follows_its_equations(scale):
    """Step by step in plain numbers: EMA, integral with its leak, clamp, floor."""
    kp, ki, target, value, smoothed, integral = 0.5, 0.05, 0.3, 3.0, 0.3, 0.0
    rule = Original(target, kp, ki)
    touched = set()
    for batch in scores(200, 30, scale):
        kept = [score > value for score in batch]
        if sum(kept) < 3:
            kept = [score >= sorted(batch)[-3] for score in batch]
        found = rule.select(batch, np.arange(30))
        assert found.keep.tolist() == kept and found.threshold == pytest.approx(value)
        smoothed = 0.1 * (sum(kept) / 30) + 0.9 * smoothed
        integral = integral + smoothed - target if 0.5 < value < 10.0 else 0.9 * integral
        value = max(0.5, min(10.0, value + kp * (smoothed - target) + ki * integral))
        touched.add(value)
    assert (0.5 in touched or scale != 0.05) and (10.0 in touched or scale != 30.0)


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith("original")])
def test_every_other_rule_meets_its_target_on_scores_that_stand_still(name):
    rule, log = RULES[name](0.25), Log()
    for step, batch in enumerate(scores(300, 200)):
        log.add(batch, rule.select(batch, np.arange(200) + 200 * step))
    assert log.rates[100:].mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_bears_an_empty_batch_and_a_batch_of_one(name):
    rule = RULES[name](0.25)
    for size in (0, 1, 0, 1, 5):
        selected = rule.select(np.full(size, 1.0, np.float32), np.arange(size))
        assert selected.keep.shape == (size,) and selected.keep.dtype == bool


def test_a_quantile_is_reached_by_exactly_its_share():
    batch = scores(1, 200)[0]
    assert (batch >= quantile(batch, 0.35)).sum() == 70
    assert (batch >= quantile(batch, 0.001)).sum() == 1


def test_errors_are_relative_to_the_target_and_over_whole_epochs():
    log = log_of([0.1] * 50 + [0.3] * 50 + [0.9] * 10)
    found = measures(log, 0.2, 50)
    assert found["worst_epoch_error"] == pytest.approx(0.5)
    assert found["rms_50_error"] == pytest.approx(0.5)
    assert found["rms_step_error"] == pytest.approx(np.sqrt((100 * 0.25 + 10 * 3.5**2) / 110))
    assert found["mean_error"] == pytest.approx((50 * -0.5 + 50 * 0.5 + 10 * 3.5) / 110)


@pytest.mark.parametrize(
    ("relative", "expected"),
    [
        ([0.0] * 120, 0),
        ([1.0] * 10 + [0.0] * 110, 8),  # 2 of 50 steps at +1 leave 4 %, 3 leave 6 %
        ([0.0] * 70 + [0.1] * 50, None),
        ([0.04] * 20, 0),
        ([0.06] * 20, None),
    ],
)
def test_settled_is_the_first_step_after_which_no_mean_of_50_steps_leaves_the_band(relative, expected):
    assert settled_step(np.array(relative)) == expected


def test_top_missed_counts_the_highest_scores_that_were_not_kept():
    batch, keep = np.arange(10, dtype=np.float32), np.zeros(10, dtype=bool)
    keep[[9, 3]] = True
    log = Log()
    log.add(batch, Selected(keep, 1.0))
    log.add(batch - 100, Selected(keep, 1.0))
    assert top_missed(log, 0.2, 1) == 0.5
    # Of both steps' 20 scores the top 4 are 9, 8, 7, 6 of the first.
    assert top_missed(log, 0.2, 50) == 0.75


@pytest.mark.parametrize("spread", ["dealt", "by label", "by significance"])
@pytest.mark.parametrize("ranks", [1, 3, 40, 64])
def test_ranks_get_every_sample_once_also_when_they_outnumber_the_samples(ranks, spread):
    parts = split(trace(), 7, ranks, spread)
    assert len(parts) == ranks
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))


@pytest.mark.parametrize("spread", ["dealt", "by label", "by significance"])
def test_one_threshold_is_the_same_on_all_simulated_ranks_and_controllers_of_their_own_are_not(spread):
    shared = shared_ranks(trace(), 0.2, 64, spread, 20)
    assert shared["identical"] is True and "rank_disagreement" not in shared
    own = own_ranks(RULES["ours"], trace(), 0.2, 4, spread, 20)
    assert own["rank_disagreement"] > 0.01 and own["share_top_missed"] > shared["share_top_missed"]


def test_a_trace_is_read_as_it_was_written(tmp_path):
    written = trace()
    read = load_trace(written.save(tmp_path))
    np.testing.assert_array_equal(read.significance, written.significance)
    np.testing.assert_array_equal(read.label, written.label)
    assert (read.name, read.steps_per_epoch, read.drop_step) == ("made-up", 20, 40)


def write_text(path):
    path.write_text("step,loss\n")


def write_other_fields(path):
    np.savez(path, x=np.zeros(3))


def write_flat(path):
    np.savez(path, sig=np.zeros(3, np.float32), spe=1, drop=1)


def write_cut(path):
    np.savez(path, sig=np.zeros((30, 8), np.float32), spe=1, drop=1)
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("write", [None, write_text, write_other_fields, write_flat, write_cut])
def test_a_file_that_is_no_trace_is_refused_in_one_line_before_anything_is_written(tmp_path, write):
    path = tmp_path / "x.npz"
    if write:
        write(path)
    with pytest.raises(UserError, match=r"x\.npz") as caught:
        threshold.main([str(path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--images", "100"], ["--epoch-share", "0"], ["--epoch-share", "1.5"]])
def test_arguments_out_of_range_are_refused_in_one_line(tmp_path, words):
    with pytest.raises(UserError, match=words[0]) as caught:
        threshold.main([*words, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)


def test_the_command_compares_all_rules_and_shows_its_table(tmp_path):
    given = trace(batch=128).save(tmp_path)
    small = ["--images", "130", "--epoch-share", "0.1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.threshold", str(given), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "threshold.json").read_text())["rows"]
    by_measure = {row["measure"] for row in rows}
    assert by_measure == {"replay", "closed_loop", "ranks", "summary", "summary_given"}
    keys = {"rule", "trace", "target", "ranks", "batch", "worst_epoch_error", "rms_step_error", "settled_step"}
    assert all(keys <= row.keys() for row in rows if not row["measure"].startswith("summary"))
    assert {row["rule"] for row in rows if row["measure"] == "replay"} == RULES.keys()
    assert {row["trace"] for row in rows if row.get("source") == "given"} == {"made-up"}
    assert {row["ranks"] for row in rows if row["measure"] == "ranks"} == {1, 4, 64, 1024}
    assert all(row.get("identical", True) for row in rows)
    assert str(tmp_path) not in (tmp_path / "threshold.json").read_text()
    assert "python -m benchmarks.threshold TRACES --images 130" in done.stdout.rstrip().splitlines()[-1]


def test_the_result_file_in_the_repository_meets_what_it_is_shown_for():
    rows = load(RESULTS / "threshold.json")["rows"]
    assert all(row["identical"] for row in rows if "identical" in row)
    assert {"threshold", "threshold-cost"} <= tables.TABLES.keys()
    assert len(rows) < 250


def test_the_gates_cost_stays_below_a_hundredth_of_a_step_in_the_published_figures():
    rows = load(RESULTS / "gate_cost.json")["rows"]
    assert rows and all(row["gate_share"] < 0.01 and row["all_reduce_bytes"] == 3848 for row in rows)
