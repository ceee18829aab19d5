"""The threshold on several processes: one number for all of them, however samples are spread over the ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import finish, start
from tests.threshold_program import SPREADS, STEPS

WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world saw, by world size."""
    seen = {}
    for world_size in WORLD_SIZES:
        out = tmp_path_factory.mktemp(f"world-{world_size}")
        finish(start("tests/threshold_program.py", str(out), world_size=world_size))
        seen[world_size] = [torch.load(Path(out) / f"rank-{rank}.pt") for rank in range(world_size)]
    return seen


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_state_is_the_same_bit_for_bit_on_every_rank_and_for_every_world_size(
    worlds: Any, world_size: int, spread: str
) -> None:
    alone = worlds[1][0]["dealt"]["bits"]
    assert len({value for value, _, _ in alone}) >= STEPS - 2, "the threshold should move, or this shows nothing"
    assert all(rank[spread]["bits"] == alone for rank in worlds[world_size])


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_same_samples_are_kept_whichever_rank_holds_them(worlds: Any, world_size: int, spread: str) -> None:
    for step, alone in enumerate(worlds[1][0]["dealt"]["kept"]):
        together = [sample for rank in worlds[world_size] for sample in rank[spread]["kept"][step]]
        assert sorted(together) == sorted(alone)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_sends_3848_bytes_a_step_whatever_the_number_of_ranks_and_samples(worlds: Any, world_size: int) -> None:
    assert all(rank[spread]["sent"] == [3848] * STEPS for rank in worlds[world_size] for spread in SPREADS)
