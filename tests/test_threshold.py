"""ast_dist/gate/threshold.py: the target share, on any scores, from integers that all ranks sum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_dist.gate.threshold import (
    BINS_PER_OCTAVE,
    FULL_WINDOW,
    LOG2_MAX,
    LOG2_MIN,
    NUM_BINS,
    Threshold,
    bin_of,
    histogram,
)

BIN = 1 / BINS_PER_OCTAVE  # width in octaves
RATES = [0.01, 0.2, 0.5, 0.9, 1.0]
rng = np.random.default_rng(0)
TRACES = {
    "uniform": rng.random(20_000),
    "log-normal": rng.lognormal(-2.0, 1.5, 20_000),
    "bimodal": np.concatenate([rng.normal(0.02, 0.002, 15_000), rng.normal(3.0, 0.2, 5_000)]),
    "constant": np.full(20_000, 0.7),
    "zeros": np.zeros(20_000),
    "half zeros": np.concatenate([np.zeros(10_000), rng.random(10_000)]),
    "beyond the bins": np.concatenate([np.full(10_000, 1e-12), np.full(10_000, 1e12)]),
}

scores_of_any_kind = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=True, allow_infinity=True),
        st.floats(0, 20, width=32),
        st.sampled_from([0.0, 0.7]),
    ),
    max_size=60,
)


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def edge(number):
    """Lower edge of a bin, in float32 as scores are."""
    return np.float32(2.0 ** (LOG2_MIN + number / BINS_PER_OCTAVE))


class TestBins:
    def test_a_score_on_an_edge_belongs_to_the_bin_above_and_the_float_below_it_to_the_one_below(self):
        numbers = np.arange(1, NUM_BINS)
        edges = edge(numbers)
        assert bin_of(torch.from_numpy(edges)).tolist() == numbers.tolist()
        below = torch.from_numpy(np.nextafter(edges, np.float32(0)))
        assert bin_of(below).tolist() == (numbers - 1).tolist()

    @given(st.floats(2.0**-30, 2.0**10, width=32))
    def test_bins_are_sixteenths_of_an_octave(self, score):
        exact = (math.log2(score) - LOG2_MIN) * BINS_PER_OCTAVE
        found = bin_of(torch.tensor([score])).item()
        assert found in {min(max(math.floor(exact + error), 0), NUM_BINS - 1) for error in (-1e-5, 1e-5)}

    @given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=50))
    def test_a_scores_bin_does_not_depend_on_the_scores_around_it(self, scores):
        together = bin_of(tensor(scores))
        strided = bin_of(tensor(scores).repeat_interleave(3)[::3])
        assert together.tolist() == strided.tolist() == [bin_of(tensor([score])).item() for score in scores]

    def test_what_lies_beyond_the_range_falls_into_the_first_and_the_last_bin(self):
        scores = tensor([0.0, 1e-45, 2.0**LOG2_MIN, 2.0**LOG2_MAX, 1e38, math.inf])
        assert bin_of(scores).tolist() == [0, 0, 0, NUM_BINS - 1, NUM_BINS - 1, NUM_BINS - 1]

    @given(scores_of_any_kind)
    def test_a_histogram_counts_every_score_once_as_integers(self, scores):
        counts = histogram(tensor(scores))
        assert counts.dtype == torch.int64 and counts.shape == (NUM_BINS + 1,)
        assert counts.sum() == len(scores)
        assert counts[-1] == sum(not math.isfinite(score) for score in scores)
        expected = np.zeros(NUM_BINS, np.int64)
        for score in scores:
            if math.isfinite(score):
                expected[bin_of(tensor([max(score, 0.0)])).item()] += 1
        assert counts[:-1].tolist() == expected.tolist()

    def test_negative_scores_count_as_zero(self):
        counts = histogram(tensor([-1e30, -1.0, -1e-45, -0.0, 0.0]))
        assert counts[0] == 5


class TestFirstWindow:
    @pytest.mark.parametrize("rate", RATES)
    @pytest.mark.parametrize("trace", TRACES)
    def test_it_equals_sorting_the_scores_up_to_one_bin(self, trace, rate):
        scores = tensor(rng.permutation(TRACES[trace]))
        number = max(1, round(rate * len(scores)))
        ranked = scores.sort(descending=True).values
        pivot = ranked[number - 1].clamp(2.0**LOG2_MIN, 2.0**LOG2_MAX).item()
        threshold = Threshold(rate)
        threshold.update(histogram(scores))
        assert abs(math.log2(threshold.threshold / pivot)) <= BIN * 1.001
        # Dithering decides in the pivot's own bin alone.
        keep = threshold.keep(scores, torch.from_numpy(rng.random(len(scores))))
        bins, own = bin_of(scores), bin_of(tensor([pivot])).item()
        assert keep[bins > own].all() and not keep[bins < own].any()

    @pytest.mark.parametrize("rate", RATES)
    @pytest.mark.parametrize("trace", TRACES)
    def test_the_target_share_is_kept_on_any_scores(self, trace, rate):
        scores = tensor(TRACES[trace])
        threshold = Threshold(rate)
        kept = threshold.step(scores)[0].sum().item()
        assert threshold.rate == pytest.approx(rate, abs=0.5 / len(scores))
        deviation = math.sqrt(rate * (1 - rate) * len(scores))  # the largest that dithering can cause
        assert abs(kept - rate * len(scores)) <= 4 * deviation + 1e-9

    def test_an_exact_edge_between_two_groups_needs_no_dithering(self):
        scores = tensor([0.1] * 600 + [2.0] * 400)
        keep, _ = Threshold(0.4).step(scores, dither=torch.full((1000,), 0.999999))
        assert keep.tolist() == [False] * 600 + [True] * 400

    @pytest.mark.parametrize("dither", [0.0, 1 - 2**-53])
    def test_a_target_of_one_keeps_everything(self, dither):
        scores = tensor(TRACES["log-normal"])
        threshold = Threshold(1.0)
        for window in scores.split(100):  # small windows carry the last histogram along
            assert threshold.step(window, dither=torch.full((100,), dither, dtype=torch.float64))[0].all()

    def test_one_sample_is_kept_with_the_target_share_as_its_chance(self):
        for draw, expected in ((0.29, True), (0.31, False)):
            keep, _ = Threshold(0.3).step(tensor([0.5]), dither=torch.tensor([draw]))
            assert keep.tolist() == [expected]

    def test_the_median_is_within_a_bin_of_the_scores_own(self):
        for trace in ("uniform", "log-normal", "constant"):
            threshold = Threshold(0.2)
            threshold.step(tensor(TRACES[trace]))
            assert abs(math.log2(threshold.median / np.median(TRACES[trace]))) <= BIN


class TestDegenerateInput:
    def test_an_empty_window_changes_nothing_but_the_count_of_steps(self):
        threshold = Threshold(0.2)
        threshold.step(tensor(TRACES["uniform"]))
        before = threshold.state_dict()
        keep, value = threshold.step(tensor([]))
        assert keep.shape == (0,) and value == before["threshold"]
        after = threshold.state_dict()
        assert {k for k in after if k != "counts" and after[k] != before[k]} == {"steps"}
        assert torch.equal(after["counts"], before["counts"])

    def test_before_the_first_score_nothing_is_dropped(self):
        threshold = Threshold(0.2)
        assert threshold.step(tensor([]))[1] == 0.0
        assert threshold.keep(tensor([0.0, 5.0]), torch.tensor([0.5, 0.5])).all()

    def test_nan_and_infinite_scores_are_kept_counted_and_move_no_threshold(self):
        scores = tensor(TRACES["uniform"])
        alone, mixed = Threshold(0.2), Threshold(0.2)
        alone.step(scores)
        keep, value = mixed.step(torch.cat([scores, tensor([math.nan, math.inf, -math.inf])]))
        assert keep[-3:].all()
        assert mixed.non_finite == 3
        assert (value, mixed.rate, mixed.integral) == (alone.threshold, alone.rate, alone.integral)

    def test_scores_that_are_all_nan_keep_the_threshold_and_are_all_kept(self):
        threshold = Threshold(0.2)
        value = threshold.step(tensor(TRACES["uniform"]))[1]
        keep, after = threshold.step(torch.full((10,), math.nan))
        assert keep.all() and after == value and threshold.non_finite == 10

    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
    def test_a_target_outside_its_range_is_refused(self, rate):
        with pytest.raises(ValueError, match="target_rate"):
            Threshold(rate)


class TestManyWindows:
    @pytest.mark.parametrize("memory", [None, 0.0, 0.5])
    @pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
    def test_near_constant_scores_meet_the_target_without_switching_on_and_off(self, rate, memory):
        threshold = Threshold(rate, memory=memory)
        draw = np.random.default_rng(1)
        kept = []
        for _ in range(200):
            scores = tensor(0.7 + 1e-4 * draw.standard_normal(128))
            kept.append(threshold.step(scores)[0].float().mean().item())
        assert np.mean(kept) == pytest.approx(rate, rel=0.05)
        assert np.std(kept) < 1.5 * math.sqrt(rate * (1 - rate) / 128)

    @pytest.mark.parametrize("trace", ["falling", "jumping"])
    def test_the_long_run_share_meets_the_target_while_scores_move(self, trace):
        threshold = Threshold(0.2)
        draw = np.random.default_rng(2)
        kept = []
        for window in range(600):
            level = 2.3 * 0.99**window if trace == "falling" else (0.1 if window // 20 % 2 else 2.0)
            kept.append(threshold.step(tensor(level * draw.lognormal(0, 0.5, 256)))[0].float().mean().item())
        assert np.mean(kept[100:]) == pytest.approx(0.2, rel=0.03)

    def test_the_integral_corrects_what_a_remembered_histogram_gets_wrong(self):
        """Scores that fall with every window: the remembered ones are too high, and too few are kept."""

        def mean_rate(ki):
            threshold, draw, rates = Threshold(0.2, ki=ki, memory=0.5), np.random.default_rng(3), []
            for window in range(400):
                threshold.step(tensor(0.97**window * draw.lognormal(0, 0.3, 256)))
                rates.append(threshold.rate)
            return np.mean(rates[100:])

        assert abs(mean_rate(0.05) - 0.2) < 0.002 < abs(mean_rate(0.0) - 0.2)

    @settings(max_examples=50)
    @given(
        st.floats(0.01, 1.0), st.floats(0, 100), st.lists(scores_of_any_kind, max_size=12), st.sampled_from([None, 0.9])
    )
    def test_the_integral_stays_within_half_of_what_the_target_leaves(self, rate, ki, windows, memory):
        threshold = Threshold(rate, ki=ki, memory=memory)
        for scores in windows:
            keep, value = threshold.step(tensor(scores))
            assert abs(threshold.integral) <= 0.5 * min(rate, 1 - rate)
            assert math.isfinite(value) and value >= 0
            assert 0.0 <= threshold.rate <= 1.0 + 1e-12
            assert keep.shape == (len(scores),)

    def test_a_small_window_is_filled_up_with_remembered_scores_and_a_full_one_stands_alone(self):
        def second_rate(size, target=0.5):
            threshold = Threshold(target)
            threshold.step(tensor([0.1] * size))
            threshold.step(tensor([2.0] * size))
            return threshold.rate

        # Half a window is joined by half of the 64 + 0 remembered: half of 96 counts are 48 of the 64 high ones.
        assert second_rate(FULL_WINDOW // 2) == pytest.approx(0.75)
        assert second_rate(FULL_WINDOW) == pytest.approx(0.5)

    def test_what_rounding_leaves_over_is_made_up_by_later_windows(self):
        """Of 130 different scores 13.0 … 39 % are no whole numbers; no window may drift away from its target."""
        for target in (0.1, 0.13, 0.39, 0.777):
            threshold, draw, kept = Threshold(target), np.random.default_rng(4), 0
            for window in range(1, 60):
                keep, _ = threshold.step(tensor(draw.lognormal(0, 1.0, 130)))
                kept += int(keep.sum())
                assert abs(kept - target * 130 * window) <= 3.0
                assert threshold.rate * 130 == pytest.approx(round(threshold.rate * 130))


class TestRanks:
    @settings(max_examples=50)
    @given(st.lists(scores_of_any_kind, min_size=1, max_size=6), st.integers(2, 4), st.floats(0.01, 1.0), st.booleans())
    def test_ranks_that_share_a_window_hold_the_bits_of_one_that_sees_it_whole(
        self, windows, world_size, rate, is_sorted
    ):
        alone, ranks = Threshold(rate), [Threshold(rate) for _ in range(world_size)]
        for number, scores in enumerate(windows):
            whole, ids = tensor(scores), torch.arange(len(scores)) + 1000 * number
            order = whole.argsort(stable=True) if is_sorted else torch.arange(len(scores))
            parts = order.tensor_split(world_size) if is_sorted else [order[r::world_size] for r in range(world_size)]
            total = torch.stack([histogram(whole[part], alone.bins) for part in parts]).sum(dim=0)
            keep, value = alone.step(whole, ids=ids)
            for part, threshold in zip(parts, ranks, strict=True):
                kept, same = threshold.step(whole[part], lambda counts, total=total: total.clone(), ids=ids[part])
                assert same.hex() == value.hex()
                assert kept.tolist() == keep[part].tolist()
                assert same_state(threshold, alone)

    def test_what_is_reduced_is_one_histogram_of_integers(self):
        seen = []
        Threshold(0.3).step(tensor(TRACES["uniform"]), lambda counts: seen.append(counts) or counts)
        assert len(seen) == 1 and seen[0].dtype == torch.int64 and seen[0].shape == (NUM_BINS + 1,)
        assert seen[0].numel() * seen[0].element_size() == 3848

    def test_ids_decide_alike_wherever_a_sample_lies_and_anew_at_each_step(self):
        scores, ids = torch.full((600,), 0.7), torch.randperm(10_000)[:600]
        threshold, reordered = Threshold(0.3), Threshold(0.3)
        keep, _ = threshold.step(scores, ids=ids)
        order = torch.randperm(600)
        assert reordered.step(scores, ids=ids[order])[0].tolist() == keep[order].tolist()
        again, _ = threshold.step(scores, ids=ids)
        assert again.tolist() != keep.tolist()
        others, _ = Threshold(0.3).step(scores, ids=ids + 20_000)
        assert others.tolist() != keep.tolist()


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    equal = [np.array_equal(a[k], b[k], equal_nan=True) for k in a if k != "counts"]
    return all(equal) and torch.equal(a["counts"], b["counts"])


@given(
    st.lists(scores_of_any_kind, max_size=6), st.lists(scores_of_any_kind, max_size=6), st.sampled_from([0.1, 0.5, 1.0])
)
@settings(max_examples=50)
def test_a_restored_threshold_goes_on_with_the_same_bits(before, after, rate):
    original, restored = Threshold(rate), Threshold(rate)
    for scores in before:
        original.step(tensor(scores))
    restored.load_state_dict(original.state_dict())
    for scores in after:
        keep, value = original.step(tensor(scores))
        same_keep, same_value = restored.step(tensor(scores))
        assert (keep.tolist(), value) == (same_keep.tolist(), same_value)
    assert same_state(original, restored)


def test_a_restored_threshold_still_makes_up_for_what_rounding_left_over():
    draw, original, restored = np.random.default_rng(6), Threshold(0.39), Threshold(0.39)
    original.step(tensor(draw.random(130)))
    restored.load_state_dict(original.state_dict())
    for _ in range(5):
        scores = tensor(draw.random(130))
        assert original.step(scores)[0].tolist() == restored.step(scores)[0].tolist()
    assert same_state(original, restored)


def test_a_state_is_a_copy():
    threshold = Threshold(0.2, memory=0.5)
    threshold.step(tensor(TRACES["uniform"]))
    state = threshold.state_dict()
    counts = state["counts"].clone()
    threshold.step(tensor(TRACES["constant"]))
    assert torch.equal(state["counts"], counts)
    other = Threshold(0.2, memory=0.5)
    other.load_state_dict(state)
    other.step(tensor(TRACES["constant"]))
    assert torch.equal(state["counts"], counts)
