"""ast_dist/data/loader.py: the plan's samples, each once, whatever the start, the ranks, the cache or the threads."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ast_dist.data.augment import train_crops, val_crops
from ast_dist.data.decode_torch import decode
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.data.resize import crop_resize
from ast_dist.data_config import DataConfig
from tests.shards import open_shards, overwrite, photos, restate, squares, write_split

SIZE = 12
RESIZED = DataConfig(image_size=SIZE, crop="resized", threads=2, prefetch_batches=2)
PADDED = DataConfig(image_size=16, crop="padded", crop_pad_px=2, threads=2, prefetch_batches=2)
COUNT = 60
PHOTOS = photos(COUNT)


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """60 images of varying size."""
    return write_split(tmp_path_factory.mktemp("varied") / "train", PHOTOS)


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """60 images of 16 × 16 pixels."""
    return write_split(tmp_path_factory.mktemp("equal") / "train", squares(COUNT))


@pytest.fixture
def split(tmp_path):
    """A split that a test may damage."""
    return write_split(tmp_path / "train", squares(24))


@pytest.fixture
def make_loader():
    """Builds loaders and closes them after the test."""
    loaders = []

    def make(index, config=RESIZED, rank=0, world_size=1, **options):
        loaders.append(Loader(index, config, rank, world_size, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def samples_read(varied, equal, monkeypatch):
    """Sample ids in the order in which their bytes are asked of the operating system."""
    places = {}
    for index in (varied, equal):
        inodes = [path.stat().st_ino for path in index.shard_paths]
        places |= {(inodes[index.shard[i]], int(index.offset[i])): i for i in range(index.num_samples)}
    found, pread, lock = [], os.pread, threading.Lock()

    def counting_pread(file, size, offset):
        with lock:
            found.append(places[os.fstat(file).st_ino, offset])
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", counting_pread)
    return found


def assert_equal(batch, other):
    for name in ("ids", "images", "labels", "weights", "is_active"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert (batch.step, batch.planned, batch.damaged) == (other.step, other.planned, other.damaged)


def active_ids(batches):
    return [sample_id for batch in batches for sample_id in batch.ids[batch.is_active].tolist()]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 25), st.integers(1, 3), st.integers(0, 5))
def test_resuming_at_any_step_gives_the_batches_of_the_uninterrupted_pass(
    varied, make_loader, data, global_batch_size, world_size, epoch
):
    order = epoch_order(COUNT, 3, epoch)
    plan = Plan(order[: data.draw(st.integers(0, COUNT), label="planned")], None)
    rank = data.draw(st.integers(0, world_size - 1), label="rank")
    whole = list(make_loader(varied, RESIZED, rank, world_size).train_batches(plan, global_batch_size, 3, epoch))
    assert [batch.step for batch in whole] == list(range(plan.num_steps(global_batch_size)))
    start = data.draw(st.integers(0, len(whole)), label="start")
    resumed = make_loader(varied, replace(RESIZED, threads=1, prefetch_batches=1), rank, world_size)
    rest = list(resumed.train_batches(plan, global_batch_size, 3, epoch, start_step=start))
    assert len(rest) == len(whole) - start
    for batch, expected in zip(rest, whole[start:], strict=True):
        assert_equal(batch, expected)


def test_a_row_is_its_samples_label_weight_and_crop(varied, make_loader):
    """Against decoding and cutting each sample by itself."""
    ids = epoch_order(COUNT, 0, 2)[:40]
    plan = Plan(ids, np.linspace(0.5, 2.0, 40, dtype=np.float32))
    loader = make_loader(varied)
    batches = list(loader.train_batches(plan, 16, seed=5, epoch=2))
    assert [len(batch.ids) for batch in batches] == [16, 16, 8]
    rows = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "labels", "weights", "images")}
    assert rows["ids"].tolist() == ids.tolist()
    assert rows["labels"].tolist() == [i % 10 for i in ids]
    np.testing.assert_array_equal(rows["weights"], plan.weights)
    crops = train_crops(ids, varied.height[ids], varied.width[ids], 5, 2, RESIZED)
    out = torch.empty((3, SIZE, SIZE), dtype=torch.uint8)
    for row, sample_id in enumerate(ids.tolist()):
        image = decode(PHOTOS[sample_id], sample_id, "key")
        crop_resize(image, crops.boxes[row], bool(crops.flips[row]), SIZE, out)
        assert torch.equal(rows["images"][row], out)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_hold_the_batches_that_one_rank_holds(varied, make_loader, world_size):
    weights = np.linspace(1.0, 2.0, COUNT, dtype=np.float32)
    plan = Plan(epoch_order(COUNT, 0, 0), weights)
    alone = list(make_loader(varied).train_batches(plan, 17, 0, 0))
    ranks = [
        list(make_loader(varied, RESIZED, rank, world_size).train_batches(plan, 17, 0, 0)) for rank in range(world_size)
    ]
    for step, expected in enumerate(alone):
        for rank in range(world_size):
            batch = ranks[rank][step]
            assert batch.planned == expected.planned
            for name in ("ids", "images", "labels", "weights"):
                assert torch.equal(getattr(batch, name)[batch.is_active], getattr(expected, name)[rank::world_size])


def test_epochs_and_seeds_change_the_crops(varied, make_loader):
    plan, loader = Plan(np.arange(8)), make_loader(varied)
    first, again, epoch, seed = (
        next(loader.train_batches(plan, 8, seed, epoch)).images for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, epoch) and not torch.equal(first, seed)


def test_a_sample_that_the_plan_skips_is_not_read(varied, make_loader, samples_read):
    plan = Plan(epoch_order(COUNT, 0, 0)[::3].copy())
    loader = make_loader(varied)
    batches = list(loader.train_batches(plan, 7, 0, 0))
    assert sorted(samples_read) == sorted(plan.ids.tolist()) == sorted(active_ids(batches))
    assert loader.reader.samples_read == loader.samples_decoded == len(plan.ids)


def test_what_lies_before_the_start_is_not_read(varied, make_loader, samples_read):
    plan = Plan(epoch_order(COUNT, 0, 0))
    list(make_loader(varied).train_batches(plan, 8, 0, 0, start_step=5))
    assert sorted(samples_read) == sorted(plan.ids[40:].tolist())


def test_other_ranks_samples_are_not_read(varied, make_loader, samples_read):
    list(make_loader(varied, RESIZED, rank=1, world_size=3).train_batches(Plan(np.arange(COUNT)), 12, 0, 0))
    assert sorted(samples_read) == list(range(1, COUNT, 3))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_consumer_that_stops_early_has_read_no_more_than_the_prefetched_batches(
    varied, make_loader, samples_read, prefetch
):
    loader = make_loader(varied, replace(RESIZED, prefetch_batches=prefetch))
    batches = loader.train_batches(Plan(np.arange(COUNT)), 4, 0, 0)
    for _ in range(2):
        next(batches)
    batches.close()
    loader.close()  # waits for the threads
    assert {*range(8)} <= {*samples_read} <= {*range(4 * (2 + prefetch))}


def test_a_batch_ahead_is_read_before_it_is_asked_for(varied, make_loader, samples_read):
    loader = make_loader(varied, replace(RESIZED, prefetch_batches=1))
    batches = loader.train_batches(Plan(np.arange(COUNT)), 4, 0, 0)
    next(batches)
    loader._pool.shutdown(wait=True)  # what was started is done, and nothing else can be
    assert sorted(samples_read) == list(range(8))
    batches.close()


def test_what_waits_for_a_thread_when_the_consumer_stops_is_never_read(varied, make_loader, samples_read, monkeypatch):
    may_go_on, pread = threading.Event(), os.pread

    def pread_that_waits_in_the_second_batch(file, size, offset):
        if len(samples_read) == 4:
            may_go_on.wait()
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", pread_that_waits_in_the_second_batch)
    loader = make_loader(varied, replace(RESIZED, threads=1, prefetch_batches=3))
    batches = loader.train_batches(Plan(np.arange(COUNT)), 4, 0, 0)
    next(batches)
    batches.close()
    may_go_on.set()
    loader._pool.shutdown(wait=True)
    assert {*samples_read} <= {*range(8)}


def test_nothing_is_read_before_the_first_batch_is_asked_for(varied, make_loader, samples_read):
    loader = make_loader(varied)
    batches = loader.train_batches(Plan(np.arange(COUNT)), 4, 0, 0)
    loader.close()
    assert samples_read == []
    batches.close()


@pytest.mark.parametrize("config", [PADDED, replace(PADDED, crop="resized")], ids=["padded", "resized"])
def test_cached_images_give_the_same_pixels(equal, make_loader, config):
    cached, plain = (make_loader(equal, replace(config, cache=cache)) for cache in ("ram", "none"))
    assert cached.cache is not None and plain.cache is None
    for epoch in range(2):
        plan = Plan(epoch_order(COUNT, 0, epoch))
        pairs = zip(cached.train_batches(plan, 16, 0, epoch), plain.train_batches(plan, 16, 0, epoch), strict=True)
        for batch, expected in pairs:
            assert_equal(batch, expected)


def test_a_cached_sample_is_read_once(equal, make_loader, samples_read):
    loader = make_loader(equal, PADDED)
    half = Plan(np.arange(0, COUNT, 2))
    list(loader.train_batches(half, 16, 0, 0))
    list(loader.train_batches(half, 16, 0, 1))
    assert sorted(samples_read) == half.ids.tolist()
    list(loader.train_batches(Plan(np.arange(COUNT)), 16, 0, 2))
    assert sorted(samples_read) == list(range(COUNT))
    assert loader.samples_decoded == COUNT


def test_rows_that_pad_a_small_share_do_not_train(varied, make_loader):
    """A global batch of 3 on 4 ranks: three have one sample, the last has none."""
    for rank in range(4):
        (batch,) = make_loader(varied, RESIZED, rank, 4).train_batches(Plan(np.array([5, 6, 7])), 4, 0, 0)
        samples = [5 + rank] if rank < 3 else []
        assert batch.planned == 3
        assert batch.ids.tolist() == samples + [-1] * (2 - len(samples))
        assert batch.is_active.tolist() == [True] * len(samples) + [False] * (2 - len(samples))
        assert batch.weights.tolist() == [1.0] * len(samples) + [0.0] * (2 - len(samples))
        if samples:  # a black image would bend the batch statistics
            assert torch.equal(batch.images[0], batch.images[1]) and batch.images.any()


def test_every_rank_yields_the_same_number_of_batches(varied, make_loader):
    plan = Plan(np.arange(13))
    for rank in range(4):
        assert len(list(make_loader(varied, RESIZED, rank, 4).train_batches(plan, 4, 0, 0))) == 4


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_damaged_sample_is_masked_and_named_and_shifts_no_other(split, make_loader, cache):
    config = replace(PADDED, cache=cache)
    plan = Plan(epoch_order(24, 0, 0))
    whole = list(make_loader(split, config).train_batches(plan, 8, 0, 0))
    bad = int(plan.ids[10])
    overwrite(split, bad, b"damaged")
    loader = make_loader(split, config)
    for epoch in range(2):
        batches = list(loader.train_batches(plan, 8, 0, epoch))
        assert [len(batch.damaged) for batch in batches] == [0, 1, 0]
        assert f"sample {split.key(bad)} (id {bad})" in batches[1].damaged[0]
        assert batches[1].is_active.tolist() == [row != 2 for row in range(8)]
        assert batches[1].weights[2] == 0.0
        if epoch:
            continue
        for batch, expected in zip(batches, whole, strict=True):
            assert torch.equal(batch.ids, expected.ids)
            assert torch.equal(batch.images[batch.is_active], expected.images[batch.is_active])
            assert batch.planned == expected.planned


def test_a_damaged_row_repeats_a_sample_and_is_not_black(split, make_loader):
    overwrite(split, 0, b"damaged")
    (batch,) = make_loader(split, PADDED).train_batches(Plan(np.arange(4)), 4, 0, 0)
    assert torch.equal(batch.images[0], batch.images[1])


def test_a_rank_with_nothing_but_damaged_samples_still_yields_its_batch(split, make_loader):
    overwrite(split, 3, b"damaged")
    (batch,) = make_loader(split, PADDED).train_batches(Plan(np.array([3])), 4, 0, 0)
    assert not batch.is_active.any() and len(batch.damaged) == 1 and batch.images.shape[0] == 2


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_an_image_of_another_size_than_the_index_states_is_a_damaged_sample(tmp_path, make_loader, cache):
    images = squares(6)
    images[2] = squares(1, side=24)[0]
    index = write_split(tmp_path / "train", images)
    index = restate(restate(index, "height", 2, 16), "width", 2, 16)
    (batch,) = make_loader(index, replace(PADDED, cache=cache)).train_batches(Plan(np.arange(6)), 6, 0, 0)
    assert batch.is_active.tolist() == [True, True, False, True, True, True]
    assert "sample 0000002-x (id 2) has 24×24 pixels" in batch.damaged[0] and "16×16" in batch.damaged[0]


def test_what_is_no_damaged_sample_stops_the_training(split, make_loader):
    loader = make_loader(split, PADDED)
    split.shard_paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="000001"):
        list(loader.train_batches(Plan(np.arange(24)), 8, 0, 0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_validation_covers_every_sample_once_over_all_ranks(varied, make_loader, world_size):
    ranks = [list(make_loader(varied, RESIZED, rank, world_size).val_batches(7)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {9}
    assert sorted(i for batches in ranks for i in active_ids(batches)) == list(range(COUNT))
    assert sum(batch.planned for batch in ranks[0]) == COUNT


def test_validation_cuts_the_centre_and_never_mirrors(varied, make_loader):
    loader = make_loader(varied)
    crops = val_crops(varied.height, varied.width, RESIZED)
    images = torch.cat([batch.images for batch in loader.val_batches(16)])
    out = torch.empty((3, SIZE, SIZE), dtype=torch.uint8)
    for sample_id in range(COUNT):
        crop_resize(decode(PHOTOS[sample_id], 0, "key"), crops.boxes[sample_id], False, SIZE, out)
        assert torch.equal(images[sample_id], out)


def test_ranks_of_a_host_share_its_cores(varied, make_loader):
    cores = len(os.sched_getaffinity(0))
    automatic = replace(RESIZED, threads=0)
    assert make_loader(varied, automatic).threads == cores
    assert make_loader(varied, automatic, local_world_size=2).threads == max(1, cores // 2)
    assert make_loader(varied, automatic, local_world_size=10_000).threads == 1
    assert make_loader(varied, replace(RESIZED, threads=3)).threads == 3


def test_only_cores_that_the_process_may_use_count(varied, make_loader):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert make_loader(varied, replace(RESIZED, threads=0)).threads == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_closing_leaves_no_thread_and_no_open_shard(varied):
    loader = Loader(varied, RESIZED, 0, 1)
    before = threading.active_count()
    list(loader.train_batches(Plan(np.arange(COUNT)), 16, 0, 0))
    assert threading.active_count() > before
    assert open_shards(varied) == 3
    loader.close()
    assert threading.active_count() == before
    assert open_shards(varied) == 0
