"""ast_dist/gate/policy.py: which samples an epoch trains on, the same on every rank."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_dist.config import GateConfig
from ast_dist.data.order import epoch_order
from ast_dist.gate.policy import Full, PolicySetup
from ast_dist.gate.registry import make_policy
from ast_dist.gate.sundew import Sundew
from ast_dist.gate.threshold import bin_of

COUNT = 4000
EPOCHS = 20
SCORES = np.random.default_rng(0).lognormal(-1.0, 1.5, COUNT).astype(np.float32)


def sundew(config=None, count=COUNT, epochs=EPOCHS, seed=0, **options):
    return Sundew(PolicySetup(config or GateConfig(target_rate=0.4), count, epochs, seed, **options))


def remember(policy, scores=SCORES, epoch=0):
    """Let a policy have seen samples; NaN marks those that it has not."""
    ids = np.flatnonzero(np.isfinite(scores))
    policy.observe(torch.from_numpy(ids), torch.from_numpy(scores[ids]))
    policy.merge(epoch)
    return policy


def plan(policy, epoch=1, seed=0, count=COUNT):
    return policy.plan(epoch, epoch_order(count, seed, epoch)).ids


@pytest.mark.parametrize(("target", "p_min"), [(0.4, 0.2), (0.4, 0.0), (0.4, 0.4), (0.1, 0.05), (0.95, 0.3), (0.02, 0)])
def test_the_share_of_an_epoch_meets_the_target_with_the_random_share_in_it(target, p_min):
    policy = remember(sundew(GateConfig(target_rate=target, p_min=p_min)))
    for epoch in range(1, 6):
        rate = len(plan(policy, epoch)) / COUNT
        assert rate == pytest.approx(target, abs=4 * math.sqrt(p_min * (1 - p_min) / COUNT) + 0.002)
        assert policy.report()["rate"] == rate
        assert policy.report()["rate_target"] == policy.target_rate(epoch) == target


@pytest.mark.parametrize("p_min", [0.0, 0.2])
def test_samples_above_the_threshold_are_always_kept_and_those_below_with_the_chance_p_min(p_min):
    policy = remember(sundew(GateConfig(target_rate=0.4, p_min=p_min), epochs=400))
    times_kept = np.zeros(COUNT)
    for epoch in range(1, 201):
        times_kept[plan(policy, epoch)] += 1
    own_bin = bin_of(torch.tensor([policy.report()["threshold"]])).item()
    bins = bin_of(torch.from_numpy(SCORES)).numpy()
    assert (times_kept[bins > own_bin] == 200).all()
    below = times_kept[bins < own_bin]
    assert below.mean() / 200 == pytest.approx(p_min, abs=0.005)
    assert below.max() <= 200 * p_min + 6 * math.sqrt(200 * p_min * (1 - p_min))


def test_samples_never_seen_are_kept_with_the_target_as_their_chance():
    scores = SCORES.copy()
    scores[::2] = np.nan
    policy = remember(sundew(GateConfig(target_rate=0.4, p_min=0.1)), scores)
    kept = np.isin(np.arange(COUNT), plan(policy))
    assert kept[::2].mean() == pytest.approx(0.4, abs=0.04)
    assert kept[1::2].mean() == pytest.approx(0.4, abs=0.04)


def test_with_no_memory_at_all_the_target_share_is_drawn():
    policy = sundew(GateConfig(target_rate=0.4, warmup_epochs=0))
    assert len(plan(policy, epoch=0)) / COUNT == pytest.approx(0.4, abs=0.04)
    assert "score_p50" not in policy.report()


@pytest.mark.parametrize("scores", [np.full(COUNT, 0.7), np.zeros(COUNT)], ids=["constant", "zeros"])
def test_equal_scores_are_thinned_to_the_target(scores):
    policy = remember(sundew(), scores.astype(np.float32))
    assert len(plan(policy)) / COUNT == pytest.approx(0.4, abs=0.04)


@settings(max_examples=25)
@given(
    st.integers(0, 40),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.lists(st.one_of(st.floats(0, 10, width=32), st.just(math.nan)), min_size=40, max_size=40),
)
def test_a_plan_keeps_the_order_and_shows_a_sample_once_at_most(count, target, p_min, scores):
    policy = sundew(GateConfig(target_rate=target, p_min=min(p_min, target)), count)
    remember(policy, np.array(scores[:count], np.float32))
    for epoch in (0, 1):
        order = epoch_order(count, 3, epoch)
        kept = policy.plan(epoch, order)
        assert kept.weights is None
        assert kept.ids.tolist() == [sample_id for sample_id in order.tolist() if sample_id in {*kept.ids.tolist()}]
        assert len({*kept.ids.tolist()}) == len(kept.ids)


def test_warm_up_and_annealing_train_on_everything():
    policy = remember(sundew(GateConfig(warmup_epochs=2, anneal_share=0.1)))
    full = [epoch for epoch in range(EPOCHS) if len(plan(policy, epoch)) == COUNT]
    assert full == [0, 1, 18, 19]
    assert [epoch for epoch in range(EPOCHS) if policy.target_rate(epoch) == 1.0] == full
    assert policy.report() == {"rate": 1.0, "rate_target": 1.0}


@pytest.mark.parametrize(
    ("share", "epochs", "annealed"), [(0.0, 20, 0), (0.1, 4, 0), (0.1, 5, 1), (0.25, 20, 5), (1, 3, 3)]
)
def test_annealing_takes_the_nearest_whole_number_of_epochs(share, epochs, annealed):
    policy = sundew(GateConfig(warmup_epochs=0, anneal_share=share), epochs=epochs)
    assert [policy.schedule.is_full(epoch) for epoch in range(epochs)] == [False] * (epochs - annealed) + [
        True
    ] * annealed


def test_a_target_of_one_trains_on_everything():
    policy = remember(sundew(GateConfig(target_rate=1.0, p_min=0.0)))
    assert all(len(plan(policy, epoch)) == COUNT for epoch in range(EPOCHS))


def test_another_epoch_or_seed_draws_another_random_share():
    plans = [
        {*plan(remember(sundew(seed=seed, epochs=99)), epoch).tolist()} for seed, epoch in ((0, 1), (0, 2), (1, 1))
    ]
    easy = {*np.flatnonzero(np.quantile(SCORES, 0.5) > SCORES).tolist()}
    chosen = [kept & easy for kept in plans]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(chosen[one] & chosen[other]) / len(easy) == pytest.approx(0.04, abs=0.015)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_number_of_ranks_plans_the_same_samples(world_size):
    scores = SCORES.copy()
    scores[::7] = np.nan
    config = GateConfig(target_rate=0.3, p_min=0.1)

    def ranks(all_reduce):
        return [
            remember(sundew(config, rank=rank, world_size=world_size, all_reduce=all_reduce), scores)
            for rank in range(world_size)
        ]

    histograms = []
    for epoch in range(1, 4):
        alone = remember(sundew(config), scores)
        expected = plan(alone, epoch)
        histograms.clear()
        for policy in ranks(lambda counts: histograms.append(counts) or counts):  # what each rank would send
            plan(policy, epoch)
        total = torch.stack(histograms).sum(dim=0)
        assert len(histograms) == world_size and total.sum() == np.isfinite(scores).sum()
        for policy in ranks(lambda counts, total=total: total.clone()):
            assert plan(policy, epoch).tolist() == expected.tolist()
            assert policy.report() == alone.report()


def test_scores_reach_the_memory_of_all_ranks_through_the_gather():
    other_ranks_rows = (torch.tensor([2, 3]), torch.tensor([0.2, 0.3]))

    def gather(ids, scores):
        return torch.cat([ids, other_ranks_rows[0]]), torch.cat([scores, other_ranks_rows[1]])

    policy = sundew(count=4, world_size=2, gather=gather)
    policy.observe(torch.tensor([0, -1]), torch.tensor([0.5, 9.9]))
    policy.merge(0)
    np.testing.assert_array_equal(policy.memory.significance, np.float32([0.5, np.nan, 0.2, 0.3]))


def test_a_restored_policy_plans_the_same_from_there_on():
    original = remember(sundew(count=300), SCORES[:300])  # few enough for the threshold to remember its histogram
    for epoch in (1, 2):
        plan(original, epoch, count=300)
    restored = sundew(count=300)
    restored.load_state_dict(original.state_dict())
    assert restored.report() == original.report()
    for epoch in (3, 4, 5):
        changed = (SCORES[:300] * epoch).astype(np.float32)
        for policy in (original, restored):
            remember(policy, changed, epoch)
        assert plan(restored, epoch, count=300).tolist() == plan(original, epoch, count=300).tolist()
        assert restored.report() == original.report()


def test_full_trains_on_everything_in_the_given_order():
    policy = make_policy(PolicySetup(GateConfig(policy="full"), COUNT, EPOCHS))
    assert isinstance(policy, Full)
    order = epoch_order(COUNT, 0, 5)
    assert policy.plan(5, order).ids is order
    assert policy.target_rate(5) == 1.0
    assert policy.report() == {"rate": 1.0, "rate_target": 1.0}
    policy.observe(torch.tensor([0]), torch.tensor([1.0]))
    policy.merge(0)
    policy.load_state_dict(policy.state_dict())


def test_the_policy_is_the_one_that_the_configuration_names():
    assert isinstance(make_policy(PolicySetup(GateConfig(policy="sundew"), 10, 2)), Sundew)
