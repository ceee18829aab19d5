"""ast_dist/data/order.py: orders by blocks of shards, drawn as they are used."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.config import Config, DataConfig, GateConfig
from ast_dist.data import order as order_module
from ast_dist.data.order import BlockOrder, Orders, Plan, epoch_order, step_ids
from ast_dist.gate.policy import PolicySetup, checked_plan
from ast_dist.gate.registry import make_policy
from ast_dist.preflight import with_block_shards
from tests.shards import squares, write_split

shard_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)
blocks = st.integers(1, 5)
seeds = st.integers(0, 2**63)


def shard_of(ids, sizes):
    return np.searchsorted(np.cumsum(sizes), ids, side="right")


@given(shard_sizes, blocks, seeds, st.integers(0, 1000))
def test_every_sample_comes_once_and_the_order_is_a_pure_function(sizes, block_shards, seed, epoch):
    ids = np.asarray(BlockOrder(np.array(sizes), block_shards, seed, epoch))
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(sum(sizes)))
    np.testing.assert_array_equal(ids, np.asarray(BlockOrder(np.array(sizes), block_shards, seed, epoch)))


@given(shard_sizes, blocks, seeds, st.data())
def test_any_slice_is_that_part_of_the_whole(sizes, block_shards, seed, data):
    order = BlockOrder(np.array(sizes), block_shards, seed, 3)
    whole = np.asarray(order)
    first, last = (data.draw(st.integers(-5, len(whole) + 5)) for _ in range(2))
    stride = data.draw(st.sampled_from([1, 2, 3]))
    part = order[first:last:stride]
    assert part.dtype == np.int64
    np.testing.assert_array_equal(part, whole[first:last:stride])
    np.testing.assert_array_equal(step_ids(order, 2, 7), whole[14:21])


@given(shard_sizes, blocks, seeds)
def test_a_block_holds_the_samples_of_its_shards_alone(sizes, block_shards, seed):
    ids = np.asarray(BlockOrder(np.array(sizes), block_shards, seed, 0))
    shards = shard_of(ids, sizes)
    # In the order in which they are first met, shards come in blocks, each finished before the next begins.
    _, first_met = np.unique(shards, return_index=True)
    met = shards[np.sort(first_met)]
    done = 0
    for start in range(0, len(met), block_shards):
        held = set(met[start : start + block_shards].tolist())
        count = sum(sizes[shard] for shard in held)
        assert set(shards[done : done + count].tolist()) == held
        done += count
    assert done == len(ids)


def test_one_block_of_all_shards_is_shuffled_as_the_whole_set_is():
    np.testing.assert_array_equal(np.asarray(BlockOrder(np.array([40, 60]), 2, 5, 1)), epoch_order(100, 5, 1))


def test_epochs_and_seeds_change_the_order_of_shards_and_of_samples():
    sizes = np.full(40, 5)
    first, epoch, seed = (np.asarray(BlockOrder(sizes, 2, s, e)) for s, e in ((0, 0), (0, 1), (1, 0)))
    for other in (epoch, seed):
        assert (first != other).mean() > 0.9
        assert (shard_of(first, sizes) != shard_of(other, sizes)).mean() > 0.8


def test_samples_of_a_block_are_mixed_over_its_shards():
    shards = shard_of(np.asarray(BlockOrder(np.full(8, 500), 8, 0, 0)), np.full(8, 500))
    counts = np.array([np.bincount(part, minlength=8) for part in np.split(shards, 16)])  # 250 samples each
    assert counts.min() > 10  # 31 expected, standard deviation 5.2


def test_a_step_of_a_billion_samples_takes_memory_for_its_blocks_alone():
    """In a process of its own, whose peak of memory is its own, too."""
    code = """
import resource
import numpy as np
from ast_dist.data.order import Orders, Plan, step_ids
orders = Orders(np.full(400_000, 2_500), seed=0, block_shards=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = Plan(orders.of(0))
steps = plan.num_steps(1024)
for step in (0, 1, steps // 2, steps - 1):
    ids = step_ids(plan.ids, step, 1024)
    assert len(np.unique(ids)) == len(ids) and 0 <= ids.min() and ids.max() < 10**9
plan.id, plan.bits(10**9)
print(len(plan.ids), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    samples, grown_mb = map(int, done.stdout.split())
    assert samples == 10**9
    assert grown_mb < 100  # all ids would be 8,000


@pytest.mark.parametrize("policy", ["full", "short", "online", "selective_backprop"])
def test_policies_that_read_all_hand_a_block_order_on(policy, monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_WHOLE_ORDER", 10)
    orders = Orders(np.full(10, 6), seed=0, block_shards=2)
    config = GateConfig(policy=policy, target_rate=0.5, p_min=0.1)
    plan = checked_plan(make_policy(PolicySetup(config, 60, epochs=2)), 0, orders.of(0))
    assert isinstance(plan.ids, BlockOrder)
    restored = Plan.from_bits(plan.bits(60), orders.of(0))
    assert restored.id == plan.id != Plan(orders.of(1)).id


@pytest.mark.parametrize("policy", ["sundew", "infobatch", "random"])
def test_policies_that_thin_are_given_an_array(policy, monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_WHOLE_ORDER", 10)
    orders = Orders(np.full(10, 6), seed=0, block_shards=2)
    config = GateConfig(policy=policy, target_rate=0.5, p_min=0.1)
    plan = checked_plan(make_policy(PolicySetup(config, 60, epochs=4)), 1, orders.of(1))
    assert isinstance(plan.ids, np.ndarray)
    kept = np.asarray(orders.of(1))
    np.testing.assert_array_equal(plan.ids, kept[np.isin(kept, plan.ids)])


def test_a_small_set_gives_an_array_in_the_order_of_its_blocks():
    orders = Orders(np.full(10, 6), seed=4, block_shards=3)
    assert isinstance(orders.of(2), np.ndarray)
    np.testing.assert_array_equal(orders.of(2), np.asarray(BlockOrder(np.full(10, 6), 3, 4, 2)))
    np.testing.assert_array_equal(Orders(np.full(10, 6), seed=4).of(2), epoch_order(60, 4, 2))


def settled(index, **options):
    config = Config(run_dir="r", data=DataConfig(train="t", val="v", **options))
    return with_block_shards(config, index).data.shuffle_block_shards


def test_the_size_of_blocks_is_settled_before_a_run_records_it(tmp_path, monkeypatch):
    index = write_split(tmp_path / "train", squares(24))
    assert settled(index) == 0
    assert settled(index, shuffle_block_shards=5) == 5
    index.manifest["data_root"] = "https://example.org/train"
    assert settled(index) == 8
    assert settled(index, shuffle_block_shards=0) == 0
