"""Claims about budgets, rows, tables and plots of a comparison, against figures worked out by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ast_dist import compare_plot
from ast_dist.command_line import parse
from ast_dist.compare_budget import predict, settings_at_cost
from ast_dist.compare_rows import Outcome, add_leads, aggregate, markdown, outcome, print_table, remarks, verdicts
from ast_dist.config import Config
from ast_dist.errors import UserError
from ast_dist.result_file import describe_result

WORDS = ["--run-dir", "x", "--data.train", "x", "--data.val", "x"]


def config(*more: str) -> Config:
    return parse([*WORDS, *more])


def predicted(policy: str, share: float, *more: str) -> tuple[int, float, float]:
    """Epochs, target rate and cost of the run that meets a budget."""
    found = predict(config(*more, *settings_at_cost(policy, share, config("--gate.policy", "full", *more))))
    return dataclasses.astuple(found)


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("policy", ["short", "random", "sundew", "ast_dist.gate.baselines:Random"])
def test_the_predicted_cost_is_the_budget(policy: str, share: float) -> None:
    more = ("--loop.epochs", "30", "--gate.p-min", "0.05")
    assert predicted(policy, share, *more)[2] == pytest.approx(share * 30, rel=1e-4)


def test_warm_up_and_annealing_are_paid_from_the_budget() -> None:
    # 2 + 2 of 22 epochs are full: 18 · r + 4 = 15, and no other number of epochs brings r nearer to 0.6.
    epochs, target, _ = predicted("sundew", 0.5, "--loop.epochs", "30", "--gate.warmup-epochs", "2")
    assert (epochs, target) == (22, pytest.approx(11 / 18, abs=1e-5))


def test_a_falling_rate_meets_the_budget_too() -> None:
    more = ("--loop.epochs", "30", "--gate.rate-fall", "0.2", "--gate.p-min", "0.05")
    assert predicted("sundew", 0.5, *more)[2] == pytest.approx(15.0, rel=1e-4)


def test_online_pays_for_its_scoring() -> None:
    # 1 + 2 of 19 epochs are full: 16 · (r + 1/3) + 3 = 0.6 · 30.
    epochs, target, cost = predicted("online", 0.6, "--loop.epochs", "30")
    assert epochs == 19
    assert target == pytest.approx(15 / 16 - 1 / 3, abs=1e-5)
    assert cost == pytest.approx(18.0, rel=1e-4)


def test_short_has_fewer_epochs_and_random_all_of_them() -> None:
    assert predicted("short", 0.5, "--loop.epochs", "30")[0] == 15
    assert predicted("random", 0.1, "--loop.epochs", "30") == (30, pytest.approx(0.1), pytest.approx(3.0))


def test_infobatch_and_selective_backprop_keep_their_numbers_and_get_the_nearest_epochs() -> None:
    full = config("--loop.epochs", "30", "--gate.policy", "full")
    assert settings_at_cost("infobatch", 0.5, full)[:2] == ["--gate.policy", "infobatch"]
    for policy in ("infobatch", "selective_backprop"):
        arguments = settings_at_cost(policy, 0.5, full)
        epochs = int(arguments[arguments.index("--loop.epochs") + 1])
        distance = {
            count: abs(predict(config(*arguments, "--loop.epochs", str(count))).cost - 15.0) for count in range(1, 61)
        }
        assert distance[epochs] == min(distance.values())
        assert config(*arguments).gate.prune_ratio == 0.5
    # Each epoch costs 1/3 for scoring and 1/3 for training.
    assert predicted("selective_backprop", 0.5, "--loop.epochs", "30")[0] in (22, 23)
    assert config(*settings_at_cost("selective_backprop", 0.5, full)).gate.target_rate == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("policy", "share", "says"),
    [
        # The shortest run has one epoch, which is a warm-up: 1.
        ("sundew", 0.04, "of 0.4 of 1 epochs cannot be met: at gate.target_rate 0.2, the lowest allowed, it costs 1"),
        ("infobatch", 0.04, "a budget of 0.4 epochs cannot be met: a single epoch costs 1"),
    ],
)  # fmt: skip
def test_a_budget_out_of_reach_is_refused_with_both_numbers(policy: str, share: float, says: str) -> None:
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        settings_at_cost(policy, share, config("--loop.epochs", "10", "--gate.policy", "full"))


def test_an_outcome_is_the_last_epochs_not_the_best(tmp_path: Path) -> None:
    rows = [
        {"kind": "epoch", "epoch": 1, "val/acc1": 90.0, "cost/flops_saved": 0.0, "cost/samples_skipped": 0},
        {"kind": "step", "global_step": 7, "cost/flops_saved": 0.9},
        {"kind": "epoch", "epoch": 5, "val/acc1": 80.0, "cost/flops_saved": 0.4, "cost/samples_skipped": 1200},
    ]
    text = "".join(json.dumps({**row, "time/total_s": 33.0, "cost/gpu_joules": 50.0}) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert outcome(tmp_path) == Outcome(5, 3.0, 80.0, 1200, 33.0, 50.0)


def test_a_finished_run_without_figures_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind":"epoch","epoch":3}\n')
    with pytest.raises(UserError, match="its last epoch cannot be read"):
        outcome(tmp_path)


def row_of(policy: str, rate: float, accuracies: list[float], cost: float = 5.0, **more: Any) -> dict[str, Any]:
    runs = [Outcome(10, cost, acc1, 500, 60.0, None) for acc1 in accuracies]
    return {**aggregate(policy, rate, 0.4, runs, 10, 100), "jobs": 1, **more}


def test_aggregation_by_hand() -> None:
    runs = [Outcome(5, 4.0, 80.0, 20, 60.0, 100.0), Outcome(5, 4.4, 83.0, 30, 70.0, 120.0)]
    row = aggregate("short", 0.4, 1.0, [*runs, Outcome(5, 4.8, 82.0, 10, 80.0, 110.0)], 10, 100)
    assert row["acc1"] == [80.0, 83.0, 82.0]
    assert row["acc1_mean"] == pytest.approx(245 / 3)
    assert row["acc1_sd"] == pytest.approx((((5 / 3) ** 2 + (4 / 3) ** 2 + (1 / 3) ** 2) / 2) ** 0.5)
    assert (row["seeds"], row["epochs"], row["wall_s"], row["gpu_joules"]) == (3, 5, 70.0, 110.0)
    assert row["cost"] == pytest.approx(4.4)
    # Against full training's 10 epochs of 100 samples: half of them were never begun.
    assert row["samples_skipped"] == 500 + 20
    assert row["flops_saved"] == pytest.approx(0.56)


def test_joules_of_some_seeds_are_no_mean_of_all() -> None:
    runs = [Outcome(5, 4.0, 80.0, 0, 60.0, 100.0), Outcome(5, 4.0, 80.0, 0, 60.0, None)]
    assert aggregate("short", 0.4, 1.0, runs, 10, 100)["gpu_joules"] is None


def test_a_lead_is_to_the_best_other_at_the_same_rate_and_clear_beyond_the_larger_spread() -> None:
    rows = [
        row_of("full", 1.0, [90.0, 91.0], cost=10.0),
        row_of("sundew", 0.5, [84.0, 84.2]),
        row_of("random", 0.5, [83.0, 83.8]),
        row_of("short", 0.5, [83.6, 83.8]),
        row_of("sundew", 0.3, [82.0]),
        row_of("short", 0.3, [81.0]),
    ]
    found = {(row["policy"], row["rate"]): row for row in add_leads(rows)}
    assert found["full", 1.0]["acc1_lead"] is None
    assert found["sundew", 0.5]["acc1_lead"] == pytest.approx(0.4)  # short is second, not random
    assert found["sundew", 0.5]["lead_is_clear"] is True
    assert found["random", 0.5]["acc1_lead"] == pytest.approx(-0.7)
    assert found["random", 0.5]["lead_is_clear"] is True  # 0.7 against 0.57
    assert found["sundew", 0.3]["acc1_lead"] == pytest.approx(1.0)
    assert found["sundew", 0.3]["lead_is_clear"] is None
    rows[3] = row_of("short", 0.5, [83.3, 84.1])
    found = {(row["policy"], row["rate"]): row for row in add_leads(rows)}
    assert found["sundew", 0.5]["lead_is_clear"] is False  # 0.4 against 0.57


def test_the_verdict_says_whether_the_spread_allows_one() -> None:
    rows = add_leads([row_of("sundew", 0.5, [84.0, 84.2]), row_of("short", 0.5, [83.6, 83.8])])
    assert verdicts(rows) == [
        "rate 0.5: sundew is best, 0.40 points above short; more than the larger standard deviation (0.14, 2 seeds)."
    ]
    rows = add_leads([row_of("sundew", 0.5, [84.0, 84.2]), row_of("short", 0.5, [83.0, 84.6])])
    assert "; not more than the larger standard deviation (1.13, 2 seeds)." in verdicts(rows)[0]
    rows = add_leads([row_of("sundew", 0.5, [84.0]), row_of("short", 0.5, [83.0])])
    assert "one seed shows no spread, so this shows no difference" in verdicts(rows)[0]


def test_a_cost_off_its_budget_and_shared_processors_are_told() -> None:
    found = remarks([row_of("infobatch", 0.5, [80.0], cost=5.5), row_of("short", 0.5, [80.0], jobs=2)], 10)
    assert "infobatch at 0.5 (5.50 for 5.00)" in found[0]
    assert "short" not in found[0]
    assert found[1].startswith("2 runs went side by side")


def bake_off() -> list[dict[str, Any]]:
    """Rows as they come from a comparison of all policies, the top five within half a point."""
    rows = [row_of("full", 1.0, [85.8, 86.1], cost=10.0)]
    names = ("short", "random", "infobatch", "selective_backprop", "sundew", "mine.module:EveryOther")
    for rate in (0.5, 0.3):
        for number, policy in enumerate(names):
            rows.append(row_of(policy, rate, [82.0 + rate + 0.1 * number, 82.3], cost=10 * rate))
    return add_leads(rows)


def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(bake_off(), 10)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("selective_backprop" in line and "82." in line for line in lines), "a name is broken over two lines"


def test_markdown_has_a_row_for_each_and_says_where_they_are_from() -> None:
    content = {**describe_result("compare", "the command", "abc"), "rows": bake_off()}
    text = markdown(content, 10)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 13
    assert len({line.count("|") for line in lines}) == 1
    assert "commit abc: `the command`" in text


def test_names_in_the_plot_do_not_cover_each_other() -> None:
    figure = compare_plot.draw(bake_off(), "title")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 13 + 2 + 1  # names, rates, and the line's own
    names = [text for text in axes.texts if text.get_text().strip() in ("EveryOther", "short", "sundew", "random")]
    extents = [text.get_window_extent() for text in names]
    for i, one in enumerate(extents):
        assert not any(one.overlaps(other) for other in extents[:i])
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 + 1 for box in extents)


def test_every_policy_has_a_marker_of_its_own() -> None:
    styles = compare_plot._styles_of(["full", "a.b:One", "a.b:Two"])
    assert len({marker for marker, _ in styles.values()}) == len(styles)


def test_one_run_is_enough_for_a_picture(tmp_path: Path) -> None:
    compare_plot.render(add_leads([row_of("full", 1.0, [90.0])]), tmp_path / "compare.png", "title")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
