"""Claims about the gate in a DDP loop of one's own: what must not depend on the number of processes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ast_dist.distributed import World
from ast_dist.fault.state import hash_state
from tests.launching import finish, start
from tests.own_loop_program import GLOBAL_BATCH_SIZE, NUM_SAMPLES, STOPPED_AT, Points, make_gate, results, watched

WORLD_SIZES = (2, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world saw, by world size."""
    seen = {1: [results(World.current())]}
    for world_size in WORLD_SIZES:
        out = tmp_path_factory.mktemp(f"world-{world_size}")
        finish(start("tests/own_loop_program.py", str(out), world_size=world_size))
        seen[world_size] = [torch.load(Path(out) / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]
    return seen


def global_batches(ranks: list[dict[str, Any]], epoch: int) -> list[dict[int, float]]:
    """Loss weight by sample of every global batch, as DDP's mean over the ranks counts it."""
    batches = []
    for shares in zip(*(rank["epochs"][epoch] for rank in ranks), strict=True):
        rows = [row for ids, weights in shares for row in zip(ids, weights, strict=True)]
        assert all(weight == 0.0 for sample_id, weight in rows if sample_id < 0)
        trained = [(sample_id, weight / len(ranks)) for sample_id, weight in rows if sample_id >= 0]
        assert len(dict(trained)) == len(trained)
        batches.append(dict(trained))
    return batches


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_world_sizes_keep_the_same_samples_in_the_same_batches_with_the_same_weights(
    worlds: Any, world_size: int
) -> None:
    for epoch in range(3):
        alone = global_batches(worlds[1], epoch)
        assert global_batches(worlds[world_size], epoch) == alone
        kept = Counter(sample_id for batch in alone for sample_id in batch)
        assert set(kept.values()) == {1}
        assert len(kept) == NUM_SAMPLES if epoch == 0 else 80 <= len(kept) <= 120
    assert len({weight for batch in alone[:-1] for weight in batch.values()}) == 2, "easy samples should weigh more"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_threshold_and_memory_are_the_same_bit_for_bit_on_every_rank_of_every_world(
    worlds: Any, world_size: int
) -> None:
    (alone,) = worlds[1]
    thresholds = [report["threshold"] for report in alone["reports"][1:]]
    assert len({*thresholds}) == 2
    for rank in worlds[world_size]:
        assert rank["reports"] == alone["reports"]
        assert hash_state(rank["state"]) == hash_state(alone["state"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_has_as_many_batches_and_rows_as_the_others(worlds: Any, world_size: int) -> None:
    for epoch in range(3):
        shapes = {tuple(len(ids) for ids, _ in rank["epochs"][epoch]) for rank in worlds[world_size]}
        assert len(shapes) == 1
        assert min(*shapes) >= 2
    # One sample for all ranks: the others still take part.
    assert [rank["epochs"][0][-1][0].count(-1) for rank in worlds[world_size]] == [1] + [2] * (world_size - 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_trained_weights_do_not_depend_on_the_number_of_processes(worlds: Any, world_size: int) -> None:
    (alone,) = worlds[1]
    for rank in worlds[world_size]:
        for name, value in rank["trained"].items():
            assert torch.equal(value, worlds[world_size][0]["trained"][name])
            torch.testing.assert_close(value, alone["trained"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_state_with_observations_not_yet_shared_is_refused_on_every_rank(worlds: Any, world_size: int) -> None:
    assert worlds[1][0]["refusal"] == "", "one process merges by itself"
    for rank in worlds[world_size]:
        assert "gate.merge()" in rank["refusal"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_stopped_epoch_goes_on_with_another_number_of_processes(worlds: Any, world_size: int) -> None:
    for rank in worlds[world_size]:
        assert hash_state(rank["stopped"]) == hash_state(worlds[1][0]["stopped"])
        assert rank["stopped"]["samples_unscored"] == 2 * GLOBAL_BATCH_SIZE
    gate = make_gate()
    gate.load_state_dict(worlds[world_size][0]["stopped"])
    left = [ids.tolist() for *_, ids in gate.loader(Points(), GLOBAL_BATCH_SIZE, 1, start_batch=STOPPED_AT)]
    whole = make_gate()
    whole.load_state_dict(worlds[1][0]["stopped"])
    assert left == [ids.tolist() for *_, ids in whole.loader(Points(), GLOBAL_BATCH_SIZE, 1)][STOPPED_AT:]
    with_two = GLOBAL_BATCH_SIZE // 2
    with pytest.raises(ValueError, match=f"{GLOBAL_BATCH_SIZE} samples over all .* batch_size {with_two} × 1 "):
        gate.loader(Points(), with_two, 1, start_batch=STOPPED_AT)


def test_a_process_group_of_one_changes_nothing(worlds: Any) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    world = World.current()
    try:
        epochs, reports, gate = watched(world.size)
    finally:
        world.close()
    assert epochs == worlds[1][0]["epochs"] and reports == worlds[1][0]["reports"]
    assert hash_state(gate.state_dict()) == hash_state(worlds[1][0]["state"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_whose_plans_differ_are_told_so(worlds: Any, world_size: int) -> None:
    assert worlds[1][0]["disagreement"] == ""
    for rank in worlds[world_size]:
        assert "plans of epoch 0 differ" in rank["disagreement"] and "\n" not in rank["disagreement"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_loader_from_before_the_process_group_is_refused(worlds: Any, world_size: int) -> None:
    for number, rank in enumerate(worlds[world_size]):
        assert rank["world"] == (number, world_size, "cpu")
        assert f"made for 1 processes, but the process group has {world_size}" in rank["early"]
        assert rank["late"] == -(-NUM_SAMPLES // (2 * world_size))
