"""Claims about checkpoints on a disk that is full: training goes on, and the previous one stands."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ast_dist.distributed import World
from ast_dist.errors import UserError
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints
from tests.states import fresh_state, saved


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def fill(disk: Path, leave: int) -> None:
    there = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(there.f_frsize * there.f_bavail - leave))


def test_too_little_room_is_told_with_both_numbers_and_ends_once_there_is_room(world: World, small_disk: Path) -> None:
    checkpoints, state = Checkpoints(small_disk / "checkpoints", world, keep_last=3), fresh_state()
    good = saved(checkpoints, state)
    fill(small_disk, 16384)
    state.global_step += 1
    told = rf"it needs [\d,]{{6,}} bytes, but 16,384 are free; the last good one is {good.name}; training goes on"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=told):
            assert saved(checkpoints, state) is None
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == [good.name]
    commit.verify(good)
    (small_disk / "filler").unlink()
    assert saved(checkpoints, state) is not None
    assert not checkpoints.is_urgent


def test_the_third_failure_in_a_row_ends_the_run_with_both_numbers(world: World, small_disk: Path) -> None:
    checkpoints, state = Checkpoints(small_disk / "checkpoints", world, keep_last=3), fresh_state()
    fill(small_disk, 16384)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="training goes on"):
            saved(checkpoints, state)
    checkpoints.poll()
    checkpoints.save(state)
    while checkpoints.poll() is None:
        pass
    assert checkpoints.is_urgent, "the ranks should hear of it at once, not at the next save"
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes, but 16,384 are free.* failure 3 in a row"):
        checkpoints.wait()


class Hopeful(Checkpoints):
    """Believes that there is room, as where another program takes it amid the save."""

    def _free_bytes(self) -> int:
        return max(super()._free_bytes(), 10**9)


@pytest.mark.parametrize("leave", [0, 4096, 16384, 32768, 45056])
def test_a_disk_that_fills_up_amid_a_save_leaves_no_half_that_holds_room(
    world: World, small_disk: Path, leave: int
) -> None:
    checkpoints, state = Hopeful(small_disk / "checkpoints", world, keep_last=3), fresh_state()
    good = saved(checkpoints, state)
    fill(small_disk, leave)
    state.global_step += 1
    with pytest.warns(RuntimeWarning, match=rf"No space left.*it needs [\d,]+ bytes.*last good one is {good.name}"):
        assert saved(checkpoints, state) is None
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == [good.name]
    commit.verify(good)


def test_room_is_made_of_what_is_kept_no_longer_and_of_nothing_else(world: World, small_disk: Path) -> None:
    state = fresh_state()
    before = Checkpoints(small_disk / "checkpoints", world, keep_last=3)
    for step in range(3):
        state.global_step = step
        saved(before, state, 90.0 if step == 0 else None)
    fill(small_disk, 16384)
    state.global_step = 3
    with pytest.warns(RuntimeWarning, match="was not saved"):
        assert saved(before, state) is None
    assert len(commit.committed(small_disk / "checkpoints")) == 3
    assert saved(Checkpoints(small_disk / "checkpoints", world, keep_last=1), state) is not None
    left = [path.name[-1] for path in commit.committed(small_disk / "checkpoints")]
    assert left == ["0", "3"], "the best and the newest"


def test_what_a_killed_save_left_makes_room_for_the_next(world: World, small_disk: Path) -> None:
    stage = commit.new_stage(small_disk / "checkpoints", "step-00000000")
    (stage / "half.distcp").write_bytes(bytes(900_000))
    assert saved(Checkpoints(small_disk / "checkpoints", world, keep_last=3), fresh_state()) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bytes_that_a_save_is_said_to_need_suffice(world: World, tmp_path: Path, dtype: torch.dtype) -> None:
    needed: list[int] = []

    class Watched(Checkpoints):
        def _needed_bytes(self, *arguments) -> int:
            needed.append(super()._needed_bytes(*arguments))
            return needed[-1]

    state = fresh_state()
    state.model.to(dtype)
    path = saved(Watched(tmp_path, world, keep_last=3), state)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size <= needed[0] <= 2 * size + 20_000
