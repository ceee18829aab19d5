"""ast_dist/gate/threshold.py: bins around the last threshold, and defined answers to input that is hardly any."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.gate.significance import significance
from ast_dist.gate.threshold import FIXED, NUM_BINS, Bins, Threshold, histogram

CENTRES = [2.0**-24, 1e-3, 0.7, 2.303, 64.0]
FIRST_TARGETS = [0.01, 0.2, 1.0]


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def around(score):
    return Bins(int(np.float32(score).view(np.int32)))


def bits(score):
    return int(np.float32(max(score, 0.0)).view(np.int32)) if score > 0 else 0


class TestBinsAroundAScore:
    @given(st.sampled_from(CENTRES), st.lists(st.floats(-1, 2.0**20, width=32), max_size=30))
    def test_a_scores_bin_is_the_one_whose_bounds_hold_it(self, centre, scores):
        bins = around(centre)
        for score, found in zip(scores, bins.of(tensor(scores)).tolist(), strict=True):
            lower, upper = bins.bounds[found], bins.bounds[found + 1]
            assert found == 0 or lower <= bits(score)
            assert found == NUM_BINS - 1 or bits(score) < upper

    @pytest.mark.parametrize("centre", CENTRES)
    def test_a_score_on_a_bound_belongs_to_the_bin_above(self, centre):
        bins, numbers = around(centre), np.arange(1, NUM_BINS)
        on_bounds = torch.from_numpy(bins.bounds[1:-1].astype(np.int32).view(np.float32))
        assert bins.of(on_bounds).tolist() == numbers.tolist()
        below = torch.from_numpy((bins.bounds[1:-1] - 1).astype(np.int32).view(np.float32))
        assert bins.of(below).tolist() == (numbers - 1).tolist()

    @pytest.mark.parametrize("centre", CENTRES)
    def test_they_are_narrow_at_the_centre_widen_outwards_and_reach_as_far_as_the_fixed_ones(self, centre):
        bins = around(centre)
        widths, middle = np.diff(bins.bounds), NUM_BINS // 2
        assert bins.bounds[middle] == bins.centre
        assert (np.diff(widths[middle:]) >= 0).all() and (np.diff(widths[:middle]) <= 0).all()
        upper = bins.score(middle, 1.0)
        assert 0 < math.log2(upper / centre) < 1e-4
        assert bins.score(NUM_BINS - 1, 1.0) >= 2.0**3 and bins.score(0, 0.0) <= 2.0**-21

    def test_the_share_left_to_chance_is_small_once_the_threshold_is_near(self):
        """Scores as close together as an untrained model's: the fixed bins put a third of them into one."""
        draw = np.random.default_rng(0)
        threshold = Threshold(0.1)
        for _ in range(3):
            threshold.step(tensor(draw.normal(2.3, 0.05, 512)))
        scores = tensor(draw.normal(2.3, 0.05, 512))
        threshold.step(scores)

        def left_to_chance(threshold):
            kept = [threshold.keep(scores, torch.full((512,), chance)).sum().item() for chance in (0.0, 1 - 2**-20)]
            return kept[0] - kept[1]

        assert left_to_chance(threshold) <= 2
        threshold.update(histogram(scores))
        assert left_to_chance(threshold) >= 50

    @pytest.mark.parametrize(("before", "after"), [(0.0, 2.3), (60.0, 1e-6), (1e-7, 60.0), (2.3, 0.0)])
    def test_a_jump_across_the_whole_range_is_followed_within_a_few_windows(self, before, after):
        threshold, draw = Threshold(0.2), np.random.default_rng(1)
        for _ in range(5):
            threshold.step(tensor(before * draw.lognormal(0, 0.1, 512)))
        for _ in range(4):
            keep, value = threshold.step(tensor(after * draw.lognormal(0, 0.1, 512)))
        if after:
            assert value == pytest.approx(after, rel=0.2)
            assert keep.sum().item() == pytest.approx(0.2 * 512, abs=2)
        else:
            assert keep.float().mean().item() == pytest.approx(0.2, abs=0.08)

    def test_small_windows_keep_their_memory_when_the_bins_move(self):
        """The second window's bins lie elsewhere; the remembered scores still count, where they were."""
        threshold = Threshold(0.5, ki=0.0, memory=0.5)
        threshold.step(tensor([0.1] * 64))
        threshold.step(tensor([0.05] * 64))
        # Of 64 + 32 counts half are 48: 32 remembered ones lie above, so 16 of the 64.
        assert threshold.rate == pytest.approx(16 / 64)
        threshold.step(tensor([2.0] * 64))
        # Of 64 + 32 + 16 counts half are 56, all among the 64 high ones.
        assert threshold.rate == pytest.approx(56 / 64)


class TestDegenerateInput:
    @pytest.mark.parametrize("target", FIRST_TARGETS)
    @pytest.mark.parametrize("value", [0.0, 1e-30, 0.7, 1e30])
    def test_equal_scores_are_kept_with_the_target_share_as_their_chance(self, value, target):
        threshold = Threshold(target)
        kept = [
            threshold.step(torch.full((1000,), value), ids=1000 * n + torch.arange(1000))[0].sum() for n in range(20)
        ]
        share = float(sum(kept)) / 20_000
        assert share == pytest.approx(target, abs=5 * math.sqrt(target * (1 - target) / 20_000) + 1e-12)

    def test_one_class_scores_zero_and_is_thinned_to_the_target(self):
        scores = significance(torch.randn(4000, 1), torch.zeros(4000, dtype=torch.int64))
        assert not scores.any()
        keep, _ = Threshold(0.4).step(scores)
        assert keep.float().mean().item() == pytest.approx(0.4, abs=0.04)

    @pytest.mark.parametrize("target", [0.1, 0.4])
    def test_batches_of_one_meet_the_target_and_still_prefer_the_significant(self, target):
        draw, threshold = np.random.default_rng(2), Threshold(target)
        scores = draw.lognormal(0, 1, 1500).astype(np.float32)
        kept = np.array(
            [bool(threshold.step(tensor([score]), ids=torch.tensor([n]))[0]) for n, score in enumerate(scores)]
        )
        assert kept[300:].mean() == pytest.approx(target, abs=0.03)
        top = scores >= np.quantile(scores, 1 - target)
        assert kept[top][50:].mean() > 0.8

    def test_a_target_of_one_percent_keeps_the_top_of_large_windows_and_the_mean_of_small_ones(self):
        draw = np.random.default_rng(3)
        large, small = Threshold(0.01), Threshold(0.01)
        large.step(tensor(draw.lognormal(0, 1, 5000)))
        scores = tensor(draw.lognormal(0, 1, 5000))
        keep, _ = large.step(scores)
        assert keep.sum().item() == pytest.approx(50, abs=2)
        assert keep[scores.topk(40).indices].all()
        kept = [small.step(tensor(draw.lognormal(0, 1, 8)))[0].sum().item() for _ in range(1250)]
        assert np.mean(kept[250:]) / 8 == pytest.approx(0.01, abs=0.004)

    @pytest.mark.parametrize("first", [[], [math.nan, math.inf]], ids=["nothing", "nothing finite"])
    def test_windows_that_are_empty_on_every_rank_leave_the_threshold_and_its_integral(self, first):
        threshold = Threshold(0.2, ki=1.0)
        keep, value = threshold.step(tensor(first))
        assert keep.all() and (value, threshold.integral) == (0.0, 0.0)
        threshold.step(tensor(np.random.default_rng(4).random(600)))
        before = (threshold.threshold, threshold.integral, threshold.bins)
        for _ in range(3):
            keep, _ = threshold.step(tensor(first))
            assert keep.all()
        assert (threshold.threshold, threshold.integral, threshold.bins) == before

    def test_error_is_what_the_last_window_kept_too_much(self):
        threshold = Threshold(0.2)
        threshold.update(histogram(tensor(np.random.default_rng(5).random(600))))
        threshold.integrate(0.26)
        assert threshold.error == pytest.approx(0.06)


def test_counting_and_keeping_never_wait_for_the_device():
    """Tensors without data: whatever reads a value, or depends on one for its shape, raises here."""
    scores = torch.empty(64, device="meta")
    threshold = Threshold(0.2)
    threshold.step(tensor(np.random.default_rng(6).random(600)))
    for bins in (FIXED, threshold.bins):
        counts = histogram(scores, bins)
        assert (counts.shape, counts.dtype, counts.device.type) == ((NUM_BINS + 1,), torch.int64, "meta")
    keep = threshold.keep(scores, torch.empty(64, device="meta"))
    assert (keep.shape, keep.dtype, keep.device.type) == ((64,), torch.bool, "meta")
