"""How long a checkpoint holds up training, and how long it takes beside it until it is committed."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ast_dist.config import GateConfig
from ast_dist.data.order import Orders
from ast_dist.distributed import World
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.state import TrainState
from ast_dist.gate.policy import PolicySetup, checked_plan
from ast_dist.gate.registry import make_policy
from benchmarks.timing import synchronize
from benchmarks.training_step import Workload, make_step, random_batches

_LR = 0.01


class _TimedCheckpoints(Checkpoints):
    """Checkpoints that note how long their two long parts took."""

    write_s = commit_s = 0.0

    def _write(self, stage: Path, tensors: dict[str, Tensor]) -> None:
        began = time.perf_counter()
        try:
            super()._write(stage, tensors)
        finally:
            self.write_s = time.perf_counter() - began

    def _commit(self, *arguments: Any) -> None:
        began = time.perf_counter()
        try:
            super()._commit(*arguments)
        finally:
            self.commit_s = time.perf_counter() - began


def checkpoint_stall(
    world: World, workload: Workload, folder: Path, batch_size: int, *, observed_steps: int, saves: int
) -> dict[str, Any]:
    """Save a trained state several times. Returns a row of medians.

    The state is what a run in mid-epoch holds: the model, SGD's momentum, the gate's memory of all samples, the plan.
    merge_ms: sharing the gate's observations of `observed_steps` steps. stall_ms: merging, and copying the state; for
    so long the training's thread is held up. copy_ms: for how long the copies hold up the GPU, 0 on a CPU. save_ms:
    from the beginning until the checkpoint is committed, with nothing else to do; of this write_ms into files, and
    commit_ms for fsync, SHA-256 and rename.
    """
    step = make_step(world, workload, batch_size)
    policy = make_policy(PolicySetup(GateConfig(warmup_epochs=0, anneal_share=0.0), workload.num_samples, epochs=10))
    orders = Orders(np.array([workload.num_samples]), seed=0)
    state = TrainState(step.module, step.optimizer, step.scaler, policy, orders)
    state.plan = checked_plan(policy, 0, orders.of(0))
    batches = random_batches(workload, batch_size, world.device)
    checkpoints = _TimedCheckpoints(folder, world, keep_last=2)
    names = ("stall_ms", "merge_ms", "copy_ms", "save_ms", "write_ms", "commit_ms")
    times: dict[str, list[float]] = {name: [] for name in names}
    size_bytes = 0
    # The first save makes buffers and pages that the next ones find.
    for save in range(saves + 1):
        scores, _ = step(batches[save % len(batches)], _LR)
        for _ in range(observed_steps):
            policy.observe(batches[save % len(batches)].ids, scores)
        state.global_step += 1
        state.step_in_epoch += 1
        synchronize(world.device)
        began = time.perf_counter()
        policy.merge(0)
        merged = time.perf_counter()
        checkpoints.save(state)
        resumed = time.perf_counter()
        path = checkpoints.wait()
        committed = time.perf_counter()
        told = checkpoints.poll()
        if path is None or told is None:
            raise RuntimeError("the disk refused a checkpoint")
        size_bytes = sum(file.stat().st_size for file in path.iterdir())
        if save:
            times["stall_ms"].append(resumed - began)
            times["copy_ms"].append(told.copy_s)
            times["save_ms"].append(committed - began)
            times["merge_ms"].append(merged - began)
            times["write_ms"].append(checkpoints.write_s)
            times["commit_ms"].append(checkpoints.commit_s)
    parameters = sum(parameter.numel() for parameter in step.module.parameters())
    return {
        "model": workload.model,
        "parameters": parameters,
        "optimizer": "sgd",
        "samples": workload.num_samples,
        **{key: 1000.0 * statistics.median(seconds) for key, seconds in times.items()},
        "stall_max_ms": 1000.0 * max(times["stall_ms"]),
        "checkpoint_mb": size_bytes / 1e6,
        "saves": saves,
    }
