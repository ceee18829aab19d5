"""Claims about checkpoints of several processes: one outcome for all, and any number of them loads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import finish, start

WORLD_SIZES = (2, 3)


def run(out: Path, what: str, world_size: int, expected: int = 0) -> list[dict[str, Any]]:
    """Let each rank do it; return what each saw."""
    finish(start("-m", "tests.checkpoint_program", str(out), what, world_size=world_size), expected)
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {size: run(tmp_path_factory.mktemp(f"world-{size}"), "all", size) for size in WORLD_SIZES}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_batch_statistics_are_rank_0s_and_random_states_are_each_ranks_own(worlds: Any, world_size: int) -> None:
    for rank in worlds[world_size]:
        seen = rank["buffers_and_rng"]
        assert seen["mean_saved"] == seen["mean_held"] == [0.0] * 16
        assert seen["draws_come_back"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_one_ranks_disk_refuses_is_refused_on_all_alike(worlds: Any, world_size: int) -> None:
    first, *others = [rank["one_ranks_disk"] for rank in worlds[world_size]]
    assert all(other == first for other in others)
    good, refused, again, stopped, *left = first
    assert good.endswith("step-00000000")
    assert (refused, again) == ("None", "None")
    assert f"on rank {world_size - 1}" in stopped
    assert "that was failure 3 in a row" in stopped
    assert left == ["step-00000000"], "the half that was written holds no room"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_ranks_nan_is_refused_on_all_ranks_alike(worlds: Any, world_size: int) -> None:
    told = {rank["one_ranks_nan"] for rank in worlds[world_size]}
    assert len(told) == 1
    assert "NonFiniteStateError: checkpoint" in (text := told.pop())
    assert f"model/3.bias holds NaN or infinity on rank {world_size - 1}" in text


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_lost_lease_ends_all_ranks(worlds: Any, world_size: int) -> None:
    told = {rank["lost_lease"] for rank in worlds[world_size]}
    assert len(told) == 1
    assert told.pop().startswith("LostLeaseError: ")


def test_any_number_of_processes_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    after = None
    for steps, world_size in enumerate((1, 2, 3, 1)):
        seen = run(tmp_path, "go_on", world_size)[:world_size]
        assert {rank["found"] for rank in seen} == {f"step-{steps:08d}" if steps else None}
        if after:
            assert {rank["loaded"] for rank in seen} == after, f"loaded by {world_size}"
        after = {rank["after"] for rank in seen}
        assert len(after) == 1
        assert seen[0]["rng_of"] == [str(rank) for rank in range(world_size)]


def test_a_peer_that_dies_amid_a_save_is_told_and_not_waited_for(tmp_path: Path) -> None:
    [seen] = run(tmp_path, "lose_a_peer", world_size=2, expected=1)
    assert "the save of step-00000000 broke off (" in seen["polled"]
    assert "the save of step-00000000 broke off (" in seen["waited"], "not swallowed by the first who asks"
    assert not list((tmp_path / "checkpoints").glob("step-*"))
