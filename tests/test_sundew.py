"""ast_dist/gate/sundew.py: the options of the gate, and the gate for streams."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.command_line import parse
from ast_dist.config import GateConfig
from ast_dist.data.order import epoch_order
from ast_dist.errors import UserError
from ast_dist.gate.policy import FORWARD_COST, PolicySetup
from ast_dist.gate.registry import make_policy
from ast_dist.gate.sundew import Online, Sundew, TargetSchedule
from ast_dist.gate.threshold import histogram

COUNT = 4000
EPOCHS = 20
LABELS = np.arange(COUNT) % 10
SCORES = np.random.default_rng(0).lognormal(-1.0, 1.5, COUNT).astype(np.float32)


def sundew(scores=SCORES, labels=LABELS, **options):
    """A policy that has seen every sample once."""
    policy = Sundew(PolicySetup(GateConfig(**options), len(scores), EPOCHS, labels=labels))
    policy.observe(torch.arange(len(scores)), torch.from_numpy(scores))
    policy.merge(0)
    return policy


def plan(policy, epoch=2):
    return policy.plan(epoch, epoch_order(COUNT, 0, epoch))


class TestSchedule:
    @given(st.floats(0.3, 0.7), st.floats(0.0, 0.5), st.integers(0, 3), st.floats(0.0, 0.3), st.integers(8, 40))
    def test_the_mean_rate_of_gated_epochs_is_the_target_however_it_falls(self, target, fall, warmup, anneal, epochs):
        config = GateConfig(target_rate=target, rate_fall=fall, p_min=0, warmup_epochs=warmup, anneal_share=anneal)
        schedule = TargetSchedule(config, epochs)
        gated = [schedule.target_rate(epoch) for epoch in range(epochs) if not schedule.is_full(epoch)]
        assert np.mean(gated) == pytest.approx(target)
        assert gated == sorted(gated, reverse=True)
        assert gated[0] - gated[-1] == pytest.approx(fall, abs=1e-9)

    def test_the_gate_follows_the_schedule(self):
        policy = sundew(target_rate=0.5, rate_fall=0.4, p_min=0.1)
        for epoch in (1, 9, 17):
            target = policy.target_rate(epoch)
            assert len(plan(policy, epoch).ids) / COUNT == pytest.approx(target, abs=0.03)
        assert policy.target_rate(1) == pytest.approx(0.7) and policy.target_rate(17) == pytest.approx(0.3)

    @pytest.mark.parametrize(("target", "fall"), [(0.5, 1.2), (0.9, 0.3), (0.2, 0.4), (0.2, -0.5)])
    def test_a_fall_that_leaves_0_to_1_is_refused_with_both_rates(self, target, fall):
        with pytest.raises(UserError, match="rates would go from"):
            GateConfig(target_rate=target, rate_fall=fall, p_min=0)


class TestWeights:
    def test_without_a_cap_above_one_every_kept_sample_weighs_the_same(self):
        assert plan(sundew(p_min=0.2)).weights is None

    @pytest.mark.parametrize(("p_min", "cap", "expected"), [(0.2, 1.5, 1.5), (0.2, 50.0, 5.0), (0.5, 3.0, 2.0)])
    def test_kept_samples_below_the_threshold_weigh_1_over_p_min_up_to_the_cap(self, p_min, cap, expected):
        policy = sundew(target_rate=0.6, p_min=p_min, weight_cap=cap)
        kept = plan(policy)
        weights = dict(zip(kept.ids.tolist(), kept.weights.tolist(), strict=True))
        threshold = policy.report()["threshold"]
        easy = [weights[i] for i in weights if SCORES[i] < 0.95 * threshold]
        hard = [weights[i] for i in weights if SCORES[i] > 1.05 * threshold]
        assert set(easy) == {expected} and set(hard) == {1.0} and easy and hard

    def test_samples_never_seen_weigh_one(self):
        policy = sundew(np.full(COUNT, np.nan, np.float32), target_rate=0.4, weight_cap=5.0)
        assert set(plan(policy).weights.tolist()) == {1.0}


class TestClassFloor:
    def test_every_class_gets_its_floor_its_most_significant_samples_first(self):
        scores = SCORES.copy()
        scores[LABELS == 3] *= 1e-4  # a class that is learnt
        without, floor = (sundew(scores, target_rate=0.4, p_min=0.02, class_floor=f) for f in (0.0, 0.5))
        kept = plan(floor).ids
        of_class = np.flatnonzero(LABELS == 3)
        assert np.isin(of_class, plan(without).ids).mean() < 0.05
        assert np.isin(of_class, kept).mean() == pytest.approx(0.2, abs=0.001)
        added = np.setdiff1d(kept, plan(without).ids)
        assert (LABELS[added] == 3).all()
        left_out = np.setdiff1d(of_class, kept)
        assert scores[added].min() >= scores[left_out].max()

    def test_where_every_class_has_its_share_the_floor_changes_nothing(self):
        assert plan(sundew(class_floor=0.3)).id == plan(sundew()).id


class TestHardTail:
    @pytest.mark.parametrize("rate", [0.3, 0.6, 0.8])
    def test_suspects_are_trained_as_often_as_the_average_sample(self, rate):
        scores = SCORES.copy()
        scores[:100] = 30.0  # 2.5 % that nothing teaches
        policy = sundew(scores, target_rate=rate, p_min=0.2, hard_tail_share=0.025, hard_tail_visits=3)
        kept_share = []
        for epoch in range(1, 13):
            kept_share.append(np.isin(np.arange(100), plan(policy, epoch).ids).mean())
            policy.observe(torch.arange(COUNT), torch.from_numpy(scores))
            policy.merge(epoch)
        assert kept_share[0] == 1.0
        assert np.mean(kept_share[4:]) == pytest.approx(rate, abs=0.06)
        assert policy.report()["hard_tail"] == pytest.approx(100, abs=5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_number_of_ranks_plans_the_same_with_every_option(world_size):
    options = {
        **{"target_rate": 0.5, "rate_fall": 0.2, "p_min": 0.2, "weight_cap": 2.0, "class_floor": 0.6},
        **{"hard_tail_share": 0.05, "hard_tail_visits": 2, "memory_decay": 0.3},
    }
    config = GateConfig(**options)
    alone = sundew(**options)
    sent = []

    def rank_of(rank, all_reduce):
        setup = PolicySetup(config, COUNT, EPOCHS, 0, LABELS, rank, world_size, all_reduce)
        policy = Sundew(setup)
        policy.observe(torch.arange(COUNT), torch.from_numpy(SCORES))
        policy.merge(0)
        return policy

    for epoch in (1, 2, 3):
        sent.clear()
        for rank in range(world_size):
            plan(rank_of(rank, lambda counts: sent.append(counts.clone()) or counts), epoch)
        total = torch.stack(sent).sum(dim=0)
        expected = plan(sundew(**options), epoch)
        for rank in range(world_size):
            policy = rank_of(rank, lambda counts, total=total: total.clone())
            found = plan(policy, epoch)
            assert found.id == expected.id  # ids and weights
            alone = sundew(**options)
            plan(alone, epoch)
            assert policy.threshold.threshold == alone.threshold.threshold


class TestOnline:
    def started(self, epoch=1, **options):
        policy = Online(PolicySetup(GateConfig(policy="online", **options), COUNT, EPOCHS))
        policy.plan(epoch, epoch_order(COUNT, 0, epoch))
        return policy

    def test_before_the_first_histogram_the_target_share_is_drawn(self):
        weights = self.started(target_rate=0.3, p_min=0.1).select(torch.arange(COUNT), torch.from_numpy(SCORES))
        assert weights.mean().item() == pytest.approx(0.3, abs=0.03)

    @pytest.mark.parametrize(("target", "p_min"), [(0.4, 0.2), (0.2, 0.0), (0.5, 0.5), (0.9, 0.1)])
    def test_the_share_selected_meets_the_target_and_the_top_is_never_left_out(self, target, p_min):
        policy = self.started(target_rate=target, p_min=p_min)
        policy.absorb(histogram(torch.from_numpy(SCORES)))
        weights = policy.select(torch.arange(COUNT), torch.from_numpy(SCORES))
        assert (weights > 0).float().mean().item() == pytest.approx(target, abs=0.03)
        if target > p_min:
            assert (weights[torch.from_numpy(SCORES) > 1.05 * policy.report()["threshold"]] == 1).all()

    def test_warm_up_and_annealing_are_not_scored_and_cost_one_epoch(self):
        policy = self.started(target_rate=0.3)
        scored = [epoch for epoch in range(EPOCHS) if policy.scores_epoch(epoch)]
        assert scored == list(range(1, 18))
        assert policy.cost(0) == 1.0 and policy.cost(5) == pytest.approx(0.3 + FORWARD_COST)

    def test_easy_samples_that_chance_keeps_weigh_up_to_the_cap(self):
        policy = self.started(target_rate=0.5, p_min=0.25, weight_cap=2.0)
        policy.absorb(histogram(torch.from_numpy(SCORES)))
        weights = policy.select(torch.arange(COUNT), torch.from_numpy(SCORES))
        assert set(weights.tolist()) == {0.0, 1.0, 2.0}

    def test_scores_that_are_no_numbers_are_kept_and_counted(self):
        scores = SCORES.copy()
        scores[:7] = [np.nan, np.inf, -np.inf, np.nan, np.nan, np.nan, np.nan]
        policy = self.started(target_rate=0.3, p_min=0.0)
        policy.absorb(histogram(torch.from_numpy(scores)))
        assert (policy.select(torch.arange(COUNT), torch.from_numpy(scores))[:7] == 1).all()
        assert policy.report()["scores_non_finite"] == 7

    def test_a_restored_gate_selects_the_same(self):
        policy = self.started(target_rate=0.3, p_min=0.1)
        for shift in (1.0, 2.0):
            policy.absorb(histogram(torch.from_numpy(SCORES * shift)))
        restored = Online(PolicySetup(GateConfig(policy="online", target_rate=0.3, p_min=0.1), COUNT, EPOCHS))
        restored.load_state_dict(policy.state_dict())
        for one in (policy, restored):
            one.absorb(histogram(torch.from_numpy(SCORES)))
        ids, scores = torch.arange(COUNT), torch.from_numpy(SCORES)
        assert torch.equal(restored.select(ids, scores), policy.select(ids, scores))
        assert restored.report() == policy.report()


def test_the_controllers_values_are_reported():
    policy = sundew(target_rate=0.4, p_min=0.1)
    plan(policy)
    report = policy.report()
    assert {"threshold", "integral", "error", "score_p50", "rate", "rate_target", "scores_non_finite"} <= report.keys()
    above = (0.4 - 0.1) / (1 - 0.1)  # what the threshold is to let pass
    kept = np.mean(report["threshold"] <= SCORES)
    assert report["error"] == pytest.approx(kept - above, abs=0.01)


def test_scoring_on_fewer_pixels_costs_their_share_of_a_forward_pass():
    words = ["--run-dir=r", "--data.train=t", "--data.val=v", "--gate.policy=online", "--data.image-size=32"]
    costs = {}
    for side in (0, 32, 16):
        config = parse([*words, f"--gate.scoring-px={side}", "--gate.target-rate=0.3"])
        costs[side] = make_policy(PolicySetup.of_run(config, COUNT)).cost(5)
    assert costs[0] == costs[32] == pytest.approx(0.3 + FORWARD_COST)
    assert costs[16] == pytest.approx(0.3 + FORWARD_COST / 4)


@pytest.mark.parametrize("count", [5, 20, 100])
def test_small_sets_meet_their_target_while_scores_fall(count):
    config = GateConfig(target_rate=0.4, p_min=0.2, anneal_share=0.0)
    policy = Sundew(PolicySetup(config, count, 300))
    rates = []
    for epoch in range(300):
        kept = policy.plan(epoch, epoch_order(count, 0, epoch)).ids
        rates.append(len(kept) / count)
        policy.observe(torch.from_numpy(kept), torch.from_numpy(SCORES[kept] * np.float32(0.97**epoch)))
        policy.merge(epoch)
    assert np.mean(rates[1:]) == pytest.approx(0.4, abs=0.05)
