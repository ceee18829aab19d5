"""Claims about checkpoints that something damaged after they were committed: found out, told, passed over."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ast_dist.distributed import World
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.commit import DamagedCheckpointError, committed, verify
from tests.faults.harness import SAVE_STEPS, Reference, Run, words
from tests.training import state_hash

POINTS = 5


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was killed in mid-training, with several checkpoints."""
    run_dir = tmp_path_factory.mktemp("runs") / "stopped"
    with Run(words(shards, run_dir), world_size=2) as run:
        run.wait_for_step(100)
    assert len(committed(run_dir / "checkpoints")) >= 3
    return run_dir


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


def truncate(file: Path, rng: random.Random) -> None:
    """Cut a file at a random length."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_a_bit(file: Path, rng: random.Random) -> None:
    """Change one random bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def remove(file: Path, _rng: random.Random) -> None:
    """Remove a file."""
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(
    stopped: Path, world: World, tmp_path: Path, rng: random.Random, damage: Callable[[Path, random.Random], None]
) -> None:
    before, newest = committed(stopped / "checkpoints")[-2:]
    names = sorted(file.name for file in newest.iterdir())
    assert {".metadata", "manifest.json", "state.json", "__0_0.distcp", "__1_0.distcp"} <= set(names)
    for number, name in enumerate(names * (1 if damage is remove else POINTS)):
        folder = tmp_path / str(number)
        for checkpoint in (before, newest):
            shutil.copytree(checkpoint, folder / checkpoint.name)
        damage(folder / newest.name / name, rng)
        with pytest.warns(RuntimeWarning, match=rf"{name}: .* moved to \.corrupt-{newest.name}"):
            found = Checkpoints(folder, world, keep_last=3).find()
        assert found == folder / before.name
        assert sorted(path.name for path in folder.iterdir()) == [f".corrupt-{newest.name}-0", before.name]
        shutil.rmtree(folder)


def test_no_bit_of_a_manifest_is_believed_once_it_is_flipped(stopped: Path, tmp_path: Path) -> None:
    """What says whether the others are sound has nobody else to vouch for it."""
    checkpoint = tmp_path / "step-00000001"
    shutil.copytree(committed(stopped / "checkpoints")[-1], checkpoint)
    verify(checkpoint)
    manifest = checkpoint / "manifest.json"
    whole = manifest.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: "):
            verify(checkpoint)


def test_a_run_whose_newest_checkpoints_are_damaged_goes_on_from_the_one_before_bit_for_bit(
    shards: Path,
    stopped: Path,
    tmp_path: Path,
    unfaulted: Callable[[int], Reference],
    rng: random.Random,
) -> None:
    reference, run_dir = unfaulted(2), tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    *_, last_good, newer, newest = committed(run_dir / "checkpoints")
    flip_a_bit(newer / "__1_0.distcp", rng)
    truncate(newest / ".metadata", rng)
    with Run(words(shards, run_dir, "--resume", "must"), world_size=2) as run:
        output = run.finish()
    start = run.starts()[-1]
    assert start["checkpoint"] == last_good.name
    assert start["steps_repeated"] + SAVE_STEPS > 2 * SAVE_STEPS
    for damaged in (newer, newest):
        assert f"moved to .corrupt-{damaged.name}" in output
    assert state_hash(run_dir) == reference.sha256


def test_a_run_all_of_whose_checkpoints_are_damaged_does_not_start_anew_unasked(
    shards: Path, stopped: Path, tmp_path: Path, rng: random.Random
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    all_of_them = committed(run_dir / "checkpoints")
    for checkpoint in all_of_them:
        flip_a_bit(checkpoint / "manifest.json", rng)
    with Run(words(shards, run_dir)) as run:
        output = run.finish(expected=2)
    assert f"none of its {len(all_of_them)} checkpoints is sound" in output
    assert "--resume never" in output
    assert committed(run_dir / "checkpoints") == all_of_them, "nothing is touched: a person may still mend it"
