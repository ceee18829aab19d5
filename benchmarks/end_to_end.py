"""Training from shards: images/s with reading and decoding, and what the loader gives with nobody to train."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch

from ast_dist.clock import Clock
from ast_dist.config import DataConfig, GateConfig
from ast_dist.data.batch import Batch
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan
from ast_dist.distributed import LaggedRead, World
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.registry import make_policy
from benchmarks.timing import synchronize
from benchmarks.training_step import Workload, make_step

_LR = 0.01


def end_to_end(world: World, workload: Workload, index: Index, batch_size: int, target_s: float) -> dict[str, Any]:
    """Train from shards and measure. Returns a row.

    The few images are read over and over, each time from the file and decoded anew (no cache): reading comes from
    the page cache, so the figure stands for a set that fits in memory or a disk that keeps up.
    data_wait: share of the time that the loop waits for the loader. decode_images_per_s: the loader alone;
    decode_1_images_per_s: the same while torch may not split one image's work over further threads.
    """
    config = DataConfig(train=str(index.root), val=str(index.root), image_size=workload.image_px, cache="none")
    workload = dataclasses.replace(workload, num_samples=index.num_samples)
    with _opened(index, config, world) as loader:
        threads = loader.threads
        decode_rate = _decode_rate(loader, batch_size, target_s / 2)
        trained = _train(world, workload, loader, batch_size, target_s)
    intra_op_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Threads that have computed before keep their setting, so this takes a loader with new ones.
    with _opened(index, config, world) as loader:
        decode_rate_1 = _decode_rate(loader, batch_size, target_s / 2)
    torch.set_num_threads(intra_op_threads)
    return {
        "model": workload.model,
        "image_px": workload.image_px,
        "batch_size": batch_size,
        "precision": "bf16",
        **trained,
        "decode_images_per_s": decode_rate,
        "decode_1_images_per_s": decode_rate_1,
        "decoder": "torch",
        "threads": threads,
        "intra_op_threads": intra_op_threads,
        "jpeg_kb": float(index.size.mean()) / 1000.0,
        "jpeg_px": f"{int(index.width[0])}×{int(index.height[0])}",
    }


@contextlib.contextmanager
def _opened(index: Index, config: DataConfig, world: World) -> Iterator[Loader]:
    loader = Loader(index, config, world.rank, world.size, world.local_size)
    try:
        yield loader
    finally:
        loader.close()


def endless_batches(loader: Loader, batch_size: int) -> Generator[Batch, None, None]:
    """Batches of the whole set, again and again, with fresh crops each time; close it to stop the prefetching."""
    epoch = 0
    while True:
        ids = np.arange(loader.index.num_samples, dtype=np.int64)
        # A short last batch would make each pass over a small set a hiccup: repeat the ids up to whole batches.
        plan = Plan(np.tile(ids, batch_size))
        yield from loader.train_batches(plan, batch_size, seed=0, epoch=epoch)
        epoch += 1


def _decode_rate(loader: Loader, batch_size: int, target_s: float) -> float:
    batches = endless_batches(loader, batch_size)
    # The first ones were waited for while the prefetch filled up; from here on the pace is the decoders'.
    for _ in range(loader.config.prefetch_batches):
        next(batches)
    began = time.perf_counter()
    images = 0
    while time.perf_counter() - began < target_s or not images:
        images += len(next(batches).ids)
    rate = images / (time.perf_counter() - began)
    batches.close()
    return rate


def _train(world: World, workload: Workload, loader: Loader, batch_size: int, target_s: float) -> dict[str, float]:
    step = make_step(world, workload, batch_size)
    policy = make_policy(PolicySetup(GateConfig(), workload.num_samples, epochs=10))
    lagged, clock = LaggedRead(), Clock()
    batches = endless_batches(loader, batch_size)
    warmup_steps = 2 * loader.config.prefetch_batches
    done = 0
    began = time.perf_counter()
    for host_batch in clock.waiting(batches):
        batch = host_batch.to(world.device)
        scores, votes = step(batch, _LR)
        policy.observe(torch.where(batch.is_active, batch.ids, -1), scores)
        lagged.swap(votes)
        clock.step_done(batch.planned)
        done += 1
        if done == warmup_steps:
            synchronize(world.device)
            clock.interval_row()
            began = time.perf_counter()
        if done > warmup_steps and time.perf_counter() - began >= target_s:
            break
    synchronize(world.device)
    row = clock.interval_row()
    batches.close()
    return {key: row[f"perf/{key}"] for key in ("images_per_s", "step_ms", "data_wait")} | {
        "steps": done - warmup_steps
    }
