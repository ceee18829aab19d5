"""ast_dist/gate/baselines.py: the opponents do what their papers say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.config import POLICY_NAMES, GateConfig
from ast_dist.data.order import Plan, epoch_order
from ast_dist.errors import UserError
from ast_dist.gate.baselines import InfoBatch, Random, SelectiveBackprop, Short
from ast_dist.gate.policy import FORWARD_COST, Policy, PolicySetup, checked_plan
from ast_dist.gate.registry import POLICIES, make_policy
from ast_dist.gate.threshold import histogram

COUNT = 4000
LOSSES = np.random.default_rng(0).lognormal(-1.0, 1.5, COUNT).astype(np.float32)
rates = st.floats(0.01, 1.0)


def setup(policy, epochs=20, count=COUNT, **options):
    return PolicySetup(GateConfig(policy=policy, **options), count, epochs)


def order(epoch, count=COUNT):
    return epoch_order(count, 0, epoch)


class TestShort:
    @given(rates, st.integers(1, 40))
    def test_its_epochs_cost_the_share_of_full_trainings_and_all_but_the_last_are_whole(self, rate, epochs):
        policy = Short(setup("short", epochs, target_rate=rate))
        sizes = [len(policy.plan(epoch, order(epoch)).ids) for epoch in range(policy.epochs)]
        assert sum(sizes) == pytest.approx(max(1, rate * epochs * COUNT), abs=1)
        assert all(size == COUNT for size in sizes[:-1])
        assert policy.epochs == max(1, math.ceil(rate * epochs - 1e-9)) <= epochs

    def test_a_budget_that_is_a_whole_number_of_epochs_is_not_made_one_more_by_its_last_bit(self):
        assert [Short(setup("short", 20, target_rate=rate)).epochs for rate in (0.3, 0.7, 0.15)] == [6, 14, 3]


class TestRandom:
    @given(rates, st.integers(0, 100))
    def test_it_trains_exactly_the_target_share_in_each_epoch_and_another_one_in_the_next(self, rate, epoch):
        policy = Random(setup("random", target_rate=rate))
        kept, after = (set(policy.plan(e, order(e)).ids.tolist()) for e in (epoch, epoch + 1))
        assert len(kept) == len(after) == max(1, math.floor(rate * COUNT + 0.5))
        assert rate > 0.99 or kept != after
        assert policy.target_rate(epoch) == policy.cost(epoch) == rate


class TestInfoBatch:
    def trained(self, losses=LOSSES, **options):
        policy = InfoBatch(setup("infobatch", count=len(losses), **options))
        ids = np.flatnonzero(np.isfinite(losses))
        policy.observe(torch.from_numpy(ids), torch.from_numpy(losses[ids]))
        policy.merge(0)
        return policy

    @pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
    def test_below_the_mean_loss_it_prunes_with_its_ratio_and_rescales_the_rest_by_1_over_1_minus_r(self, ratio):
        policy = self.trained(prune_ratio=ratio)
        below = LOSSES.astype(np.float64).mean() > LOSSES
        times_kept = np.zeros(COUNT)
        for epoch in range(1, 17):
            plan = policy.plan(epoch, order(epoch))
            times_kept[plan.ids] += 1
            assert plan.weights is not None
            np.testing.assert_array_equal(plan.weights, np.where(below[plan.ids], np.float32(1 / (1 - ratio)), 1))
        assert (times_kept[~below] == 16).all()
        assert times_kept[below].mean() / 16 == pytest.approx(1 - ratio, abs=0.01)

    def test_the_weighted_number_of_samples_stays_what_it_was(self):
        weights = [self.trained().plan(epoch, order(epoch)).weights.sum() for epoch in range(1, 17)]
        assert np.mean(weights) == pytest.approx(COUNT, rel=0.01)

    def test_the_first_epoch_and_the_last_eighth_train_everything_unweighted(self):
        policy = self.trained(epochs=16)
        full = [epoch for epoch in range(16) if policy.plan(epoch, order(epoch)).weights is None]
        assert full == [0, 14, 15]
        assert [epoch for epoch in range(16) if policy.target_rate(epoch) == 1.0] == full

    def test_samples_without_a_known_loss_are_never_pruned(self):
        losses = LOSSES.copy()
        losses[::5] = np.nan
        plan = self.trained(losses, prune_ratio=0.9).plan(1, order(1))
        assert set(range(0, COUNT, 5)) <= set(plan.ids.tolist())

    def test_it_scores_by_the_loss_alone_whatever_the_mix(self):
        policy = InfoBatch(setup("infobatch", loss_weight=0.2, entropy_weight=5.0))
        logits, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(policy.score(logits, labels), expected)

    def test_a_restored_policy_plans_the_same(self):
        policy = self.trained()
        restored = InfoBatch(setup("infobatch"))
        restored.load_state_dict(policy.state_dict())
        assert restored.plan(3, order(3)).id == policy.plan(3, order(3)).id


class TestSelectiveBackprop:
    def after(self, losses, epoch=0, **options):
        policy = SelectiveBackprop(setup("selective_backprop", **options))
        policy.plan(epoch, order(epoch))
        policy.absorb(histogram(torch.from_numpy(losses)))
        return policy

    @pytest.mark.parametrize("rate", [0.25, 1 / 3, 0.5])
    def test_a_sample_is_kept_with_the_chance_of_its_losss_percentile_to_the_power_beta(self, rate):
        policy = self.after(LOSSES, target_rate=rate)
        assert policy.beta == pytest.approx(1 / rate - 1)
        many = 20_000
        for percentile in (0.1, 0.5, 0.8, 0.97):
            loss = float(np.quantile(LOSSES, percentile))
            keep = policy.select(torch.arange(many), torch.full((many,), loss)) > 0
            assert keep.double().mean().item() == pytest.approx(percentile**policy.beta, abs=0.025)

    @pytest.mark.parametrize("losses", [LOSSES, np.full(COUNT, 0.7, np.float32), np.zeros(COUNT, np.float32)])
    def test_the_share_kept_is_the_target_whatever_the_distribution(self, losses):
        policy = self.after(losses, target_rate=1 / 3)
        keep = policy.select(torch.arange(COUNT), torch.from_numpy(losses))
        assert keep.mean().item() == pytest.approx(1 / 3, abs=0.025)

    def test_before_the_first_histogram_the_target_share_is_drawn(self):
        policy = SelectiveBackprop(setup("selective_backprop", target_rate=0.3))
        policy.plan(0, order(0))
        assert policy.select(torch.arange(COUNT), torch.from_numpy(LOSSES)).mean().item() == pytest.approx(
            0.3, abs=0.03
        )

    def test_the_distribution_is_that_of_the_newest_losses_and_older_ones_leave_it(self):
        policy = self.after(np.full(100, 9.0, np.float32), loss_history=200, target_rate=0.5)
        probe = torch.full((COUNT,), 1.0)
        assert policy.select(torch.arange(COUNT), probe).sum() == 0  # below all that is known
        for _ in range(2):
            policy.absorb(histogram(torch.full((100,), 0.5)))
        assert policy.select(torch.arange(COUNT), probe).sum() == COUNT  # the nines are gone

    def test_losses_that_are_no_numbers_are_kept_and_do_not_enter_the_distribution(self):
        losses = LOSSES.copy()
        losses[:10] = np.nan
        policy = self.after(losses, target_rate=0.2)
        assert (policy.select(torch.arange(COUNT), torch.from_numpy(losses))[:10] == 1).all()
        nothing = self.after(np.full(5, np.nan, np.float32), target_rate=0.2)
        assert nothing.select(torch.arange(COUNT), torch.from_numpy(LOSSES)).mean().item() == pytest.approx(
            0.2, abs=0.03
        )

    def test_scoring_is_part_of_its_cost(self):
        policy = SelectiveBackprop(setup("selective_backprop", target_rate=1 / 3))
        assert policy.cost(0) == pytest.approx(FORWARD_COST + 1 / 3)

    def test_a_restored_policy_selects_the_same(self):
        policy = self.after(LOSSES, epoch=4, target_rate=0.3)
        restored = SelectiveBackprop(setup("selective_backprop", target_rate=0.3))
        restored.load_state_dict(policy.state_dict())
        ids, scores = torch.arange(COUNT), torch.from_numpy(LOSSES)
        assert torch.equal(restored.select(ids, scores), policy.select(ids, scores))


class EveryOther(Policy):
    """A policy as the documentation shows it."""

    def target_rate(self, epoch):
        return 0.5

    def plan(self, epoch, order):
        return Plan(order[epoch % 2 :: 2])


class Planned(Policy):
    """Returns the plan that it was given."""

    given: Plan

    def plan(self, epoch, order):
        return self.given


class TestPlansOfOnesOwn:
    def plan(self, ids, weights=None, chances=None):
        policy = Planned(setup("full", count=6))
        policy.given = Plan(np.asarray(ids), weights, chances)
        return checked_plan(policy, 1, np.array([5, 3, 1, 0, 2, 4]))

    def test_a_thinned_order_is_taken_as_it_is(self):
        assert self.plan([5, 1, 4], np.float32([1, 0, 2])).ids.tolist() == [5, 1, 4]

    @pytest.mark.parametrize(
        ("ids", "told"),
        [
            (np.zeros(0, np.int64), "at least one"),
            ([[5, 3]], "one row"),
            ([1.0, 0.0], "float64"),
            ([5, 6], "to 6"),
            ([-1, 5], "from -1"),
            ([3, 5], "changes the order"),
            ([5, 5, 3], "repeats"),
        ],
    )
    def test_ids_that_are_no_plan_are_told_in_one_line(self, ids, told):
        with pytest.raises(UserError, match=told) as caught:
            self.plan(ids)
        assert "\n" not in str(caught.value) and "Planned.plan of epoch 1" in str(caught.value)

    @pytest.mark.parametrize("weights", [np.ones(2), np.float32([1, np.nan, 1]), np.float32([1, -1, 1])])
    def test_weights_that_are_none_are_told_in_one_line(self, weights):
        with pytest.raises(UserError, match="one finite weight"):
            self.plan([5, 1, 4], weights)

    @pytest.mark.parametrize("chances", [np.ones(2), np.float32([1, np.nan, 1]), np.float32([1, 1.5, 1]), -0.1])
    def test_chances_that_are_none_are_told_in_one_line(self, chances):
        with pytest.raises(UserError, match="a number in 0 … 1"):
            self.plan([5, 1, 4], chances=chances)

    def test_one_chance_for_all_is_taken_as_it_is(self):
        assert self.plan([5, 1, 4], chances=np.float64(0.5)).chances == 0.5


class TestNames:
    def test_the_configuration_knows_the_names_that_there_are(self):
        assert set(POLICY_NAMES) == set(POLICIES)

    def test_every_policy_of_ours_can_be_built_by_name(self):
        for name, kind in POLICIES.items():
            assert type(make_policy(setup(name))) is kind

    def test_a_policy_of_ones_own_is_found_by_module_and_class(self):
        policy = make_policy(setup(f"{__name__}:EveryOther"))
        assert type(policy).__name__ == "EveryOther"
        assert len(policy.plan(1, order(1)).ids) == COUNT // 2

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("no_such_module_here:Policy", "cannot be imported"),
            ("math:Policy", "math has no Policy"),
            ("math:floor", "no subclass of ast_dist.gate.policy.Policy"),
            ("collections:OrderedDict", "no subclass of ast_dist.gate.policy.Policy"),
        ],
    )
    def test_one_that_is_not_there_is_told_in_one_line(self, name, told):
        with pytest.raises(UserError, match=told) as caught:
            make_policy(setup(name))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["sundow", "", ":Class", "module:", "a b:C", "module.:C"])
    def test_a_name_that_can_be_none_is_refused_with_the_configuration(self, name):
        with pytest.raises(UserError, match="no such policy"):
            GateConfig(policy=name)


class TestReports:
    def test_a_plans_share_and_target_are_reported_for_a_policy_that_says_nothing(self):
        policy = EveryOther(setup("full"))
        checked_plan(policy, 1, order(1))
        assert policy.report() == {"rate": 0.5, "rate_target": 0.5}
        restored = EveryOther(setup("full"))
        restored.load_state_dict(policy.state_dict())
        assert restored.report() == policy.report()


class Failing(Policy):
    """Goes wrong where it is told to."""

    where = "plan"

    def __init__(self, setup):
        super().__init__(setup)
        if self.where == "init":
            raise KeyError("weights.pt\nis not there")

    @property
    def epochs(self):
        return 0 if self.where == "epochs" else 3

    def plan(self, epoch, order):
        if self.where == "plan":
            raise ZeroDivisionError("by nothing\nat all")
        return


class TestPoliciesThatFail:
    @pytest.mark.parametrize(
        ("where", "told"),
        [
            ("init", "cannot be built .KeyError"),
            ("epochs", "whose epochs is 0"),
            ("plan", "Failing.plan of epoch 0 raises ZeroDivisionError: by nothing at all"),
            ("none", "gives NoneType: give an ast_dist.data.order.Plan"),
        ],
    )
    def test_they_are_told_in_one_line(self, where, told, monkeypatch):
        monkeypatch.setattr(Failing, "where", where)
        with pytest.raises(UserError, match=told) as caught:
            checked_plan(make_policy(setup(f"{__name__}:Failing")), 0, order(0))
        assert "\n" not in str(caught.value)

    def test_a_module_that_fails_when_it_is_imported_is_told_with_its_own_error(self, tmp_path, monkeypatch):
        (tmp_path / "broken_policy_module.py").write_text("import math\nmath.no_such_thing\nclass P: pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=r"cannot be imported .AttributeError.*no_such_thing"):
            make_policy(setup("broken_policy_module:P"))
