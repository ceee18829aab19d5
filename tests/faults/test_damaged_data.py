"""Claims about shards that something damaged: one bad image is left out by all, a lost shard ends the run in words."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ast_dist.data.index import Index
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from tests import training
from tests.faults.harness import EPOCHS, NUM_SAMPLES, Faults, Run, words
from tests.shards import overwrite
from tests.training import progress, snapshot, state_hash

BAD_SAMPLES = 5
# Every epoch reads every sample from disk.
FULL = ("--gate.warmup-epochs", str(EPOCHS), "--data.cache", "none")


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return shutil.copytree(shards, tmp_path / "shards")


def test_images_with_flipped_bytes_are_left_out_named_and_counted_alike_on_any_number_of_ranks_and_after_kills(
    own_shards: Path, tmp_path: Path, rng: random.Random
) -> None:
    index = Index.open(own_shards / "train")
    bad = sorted(rng.sample(range(NUM_SAMPLES), BAD_SAMPLES))
    for sample_id in bad:
        shard, size = index.shard_paths[int(index.shard[sample_id])], int(index.size[sample_id])
        place = int(index.offset[sample_id]) + rng.randrange(size)
        overwrite_byte(shard, place, rng.randrange(1, 256))
    more = (*FULL, "--loop.epochs", "4", "--gate.warmup-epochs", "4", "--data.damaged-limit", "0.05")
    hashes = {}
    for name, world_size, step in (("alone", 0, None), ("two", 2, None), ("killed", 2, rng.randrange(20, 60))):
        with Run(words(own_shards, tmp_path / name, *more), world_size, max_restarts=1) as run:
            if step is not None:
                Faults(run).fail_at(rng.randrange(2), step).strike()
            output = run.finish()
        state, _ = read(committed(run.run_dir / "checkpoints")[-1])
        assert state["counts"]["damaged"] == 4 * BAD_SAMPLES
        assert state["counts"]["backwarded"] == 4 * (NUM_SAMPLES - BAD_SAMPLES)
        assert state["gate"]["memory"]["visits"].tolist() == [4 * (i not in bad) for i in range(NUM_SAMPLES)]
        assert all(index.key(sample_id) in output for sample_id in bad)
        hashes[name] = state_hash(run.run_dir)
    assert hashes["killed"] == hashes["two"]


def overwrite_byte(file: Path, place: int, by: int) -> None:
    """Change one byte of a file: `by`, not 0, is added to it."""
    with file.open("r+b") as stream:
        stream.seek(place)
        old = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([(old + by) % 256]))


def test_more_damage_than_the_limit_ends_all_ranks_with_the_list_and_a_checkpoint_to_go_on_from(
    own_shards: Path, tmp_path: Path, rng: random.Random, unfaulted: Callable
) -> None:
    index = Index.open(own_shards / "train")
    argv = words(own_shards, tmp_path / "run", "--data.cache", "none")
    whole = {path: path.read_bytes() for path in index.shard_paths}
    with Run(argv, world_size=2) as run:
        run.wait_for_step(rng.randrange(30, 60))
        # In mid-training: a disk that goes bad, not a set that was.
        for sample_id in range(NUM_SAMPLES):
            overwrite(index, sample_id, b"garbage")
        output = run.finish(expected=1)
    assert progress(run.run_dir)["state"] == "failed"
    assert "data.damaged_limit allows 1" in progress(run.run_dir)["message"]
    assert "check_shards" in output
    for path, data in whole.items():
        path.write_bytes(data)
    with Run(argv, world_size=2) as run:
        run.finish()
    assert state_hash(run.run_dir) == unfaulted(2).sha256, "the bad disk left no trace"


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_shard_that_was_cut_or_removed_is_refused_before_anything_is_written(
    own_shards: Path, tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    index = Index.open(own_shards / "train")
    whole = {path: path.read_bytes() for path in index.shard_paths}
    for _ in range(5):
        shard = rng.choice(index.shard_paths)
        if damage == "cut":
            os.truncate(shard, rng.randrange(shard.stat().st_size))
        else:
            shard.unlink()
        before = snapshot(tmp_path)
        line = training.refused(words(own_shards, tmp_path / "run")[2:], capsys)
        assert shard.name in line
        assert snapshot(tmp_path) == before
        shard.write_bytes(whole[shard])


def test_a_shard_that_vanishes_in_mid_training_ends_all_ranks_with_its_name_and_once_back_the_run_goes_on(
    own_shards: Path, tmp_path: Path, rng: random.Random, unfaulted: Callable
) -> None:
    index = Index.open(own_shards / "train")
    argv = words(own_shards, tmp_path / "run", "--data.cache", "none")
    shard = rng.choice(index.shard_paths)
    with Run(argv, world_size=2) as run:
        run.wait_for_step(rng.randrange(30, 60))
        run.kill()
    hidden = shard.with_suffix(".away")
    shard.rename(hidden)
    with Run(argv, world_size=2) as run:
        output = run.finish(expected=1)
    assert output.count("error: ") == 1
    assert shard.name in output
    hidden.rename(shard)
    with Run(argv, world_size=2) as run:
        run.wait_for_step(run.step + 10)
        # Ranks hold the shards open; cutting one is what they notice.
        whole = shard.read_bytes()
        os.truncate(shard, 1024)
        output = run.finish(expected=1)
    assert shard.name in output
    shard.write_bytes(whole)
    with Run(argv, world_size=2) as run:
        run.finish()
    assert state_hash(run.run_dir) == unfaulted(2).sha256
