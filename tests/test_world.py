"""Claims about several processes: what every rank must see alike, and what must not depend on their number."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import finish, start

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world saw, by world size."""
    seen = {}
    for world_size in WORLD_SIZES:
        out = tmp_path_factory.mktemp(f"world-{world_size}")
        finish(start("tests/world_program.py", str(out), world_size=world_size))
        seen[world_size] = [torch.load(Path(out) / f"rank-{rank}.pt") for rank in range(world_size)]
    return seen


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_threshold_is_the_same_bit_for_bit_on_every_rank(worlds: Any, world_size: int) -> None:
    first = worlds[world_size][0]["thresholds"]
    assert len(set(first)) == len(first), "the threshold should move, or this shows nothing"
    assert all(rank["thresholds"] == first for rank in worlds[world_size])


def test_gated_plans_are_the_same_on_every_rank_and_for_every_world_size(worlds: Any) -> None:
    plans = [rank["plans"] for ranks in worlds.values() for rank in ranks]
    assert len(set(plans[0])) == 4
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("key", ["weights", "weights_damaged"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradient_does_not_depend_on_how_samples_are_spread_over_ranks(worlds: Any, world_size: int, key: str) -> None:
    alone = worlds[1][0][key]
    for rank in worlds[world_size]:
        for name, value in rank[key].items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_add_up_to_the_step_without_them(worlds: Any, world_size: int) -> None:
    alone = worlds[1][0]["weights"]
    for rank in worlds[world_size]:
        for name, value in rank["weights_micro"].items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


def test_gradient_depends_on_which_samples_are_damaged(worlds: Any) -> None:
    alone = worlds[1][0]
    assert any(not torch.equal(alone["weights"][n], alone["weights_damaged"][n]) for n in alone["weights"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_ranks_vote_reaches_all_ranks_one_step_later(worlds: Any, world_size: int) -> None:
    for rank in worlds[world_size]:
        assert rank["votes"] == [None, [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_are_gathered_in_order_of_rank_with_their_ids_intact(worlds: Any, world_size: int) -> None:
    expected = [row + (1 << 40) * rank for rank in range(world_size) for row in range(rank)]
    for rank in worlds[world_size]:
        ids, scores = rank["gathered"]
        assert ids.dtype == torch.int64
        assert ids.tolist() == expected
        assert scores.tolist() == torch.tensor(expected).float().tolist()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sum_adds_every_rank_once(worlds: Any, world_size: int) -> None:
    assert {rank["summed_in_place"] for rank in worlds[world_size]} == {world_size * (world_size + 1) // 2}
