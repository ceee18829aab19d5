"""ast_dist/data/order.py: every sample once, in the same global batches whatever the number of ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.data.order import Plan, epoch_order, rank_share, step_ids

sizes = st.integers(0, 300)
seeds = st.integers(0, 2**63)
epochs = st.integers(0, 1000)


@given(sizes, seeds, epochs)
def test_an_epochs_order_is_a_permutation_and_a_pure_function(num_samples, seed, epoch):
    order = epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    np.testing.assert_array_equal(order, epoch_order(num_samples, seed, epoch))


def test_the_order_of_earlier_versions_is_kept():
    assert epoch_order(10, 0, 0).tolist() == [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]


@given(seeds, epochs)
def test_another_seed_or_epoch_gives_another_order(seed, epoch):
    order = epoch_order(100, seed, epoch)
    assert (order != epoch_order(100, seed + 1, epoch)).any()
    assert (order != epoch_order(100, seed, epoch + 1)).any()


def test_every_sample_comes_at_every_position_equally_often():
    places = np.stack([np.argsort(epoch_order(8, 5, epoch)) for epoch in range(4000)])
    for sample_id in range(8):
        counts = np.bincount(places[:, sample_id], minlength=8)
        chi2 = ((counts - 500.0) ** 2 / 500.0).sum()
        assert chi2 < 30  # 7 degrees of freedom, 0.9999 of the mass


@given(sizes, st.integers(1, 40), seeds, st.integers(1, 4))
def test_any_number_of_ranks_trains_the_same_global_batches(num_samples, global_batch_size, seed, world_size):
    plan = Plan(epoch_order(num_samples, seed, 0))
    trained = []
    for step in range(plan.num_steps(global_batch_size)):
        batch = step_ids(plan.ids, step, global_batch_size)
        shares = [rank_share(batch, rank, world_size) for rank in range(world_size)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        dealt = np.empty_like(batch)
        for rank, share in enumerate(shares):
            dealt[rank::world_size] = share
        np.testing.assert_array_equal(dealt, batch)
        trained += batch.tolist()
    assert trained == plan.ids.tolist()
    assert sorted(trained) == list(range(num_samples))


@given(st.integers(1, 300), st.integers(1, 40))
def test_all_batches_are_full_but_the_last(num_samples, global_batch_size):
    plan = Plan(np.arange(num_samples))
    num_steps = plan.num_steps(global_batch_size)
    lengths = [len(step_ids(plan.ids, step, global_batch_size)) for step in range(num_steps)]
    assert lengths[:-1] == [global_batch_size] * (num_steps - 1)
    assert 1 <= lengths[-1] <= global_batch_size
    assert len(step_ids(plan.ids, num_steps, global_batch_size)) == 0


def test_a_batch_smaller_than_the_world_leaves_ranks_with_empty_shares():
    batch = np.array([7, 9])
    assert [rank_share(batch, rank, 4).tolist() for rank in range(4)] == [[7], [9], [], []]


def test_an_empty_plan_has_no_steps():
    assert Plan(np.zeros(0, np.int64)).num_steps(16) == 0


def test_a_plans_id_names_its_ids_their_order_and_its_weights():
    ids = np.arange(20)
    ones, halves = np.ones(20, np.float32), np.full(20, 0.5, np.float32)
    plans = [Plan(ids), Plan(ids[::-1]), Plan(ids[:-1]), Plan(ids, ones), Plan(ids, halves)]
    assert len({plan.id for plan in plans}) == len(plans)
    assert Plan(np.repeat(ids, 2)[::2], ones.copy()).id == Plan(ids, ones).id
