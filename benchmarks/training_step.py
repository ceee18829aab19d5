"""The training step alone: images/s, MFU, memory and what the gate adds, on images that lie on the device already.

What is timed is what the training loop does at each step: ast_dist.step.TrainStep, the gate's observation, and the
read of the last step's votes. The batches hold random pixels and labels and are rotated, so that no cache serves
them twice.
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ast_dist.config import Config, DataConfig, GateConfig, LoopConfig, ModelConfig
from ast_dist.data.batch import Batch
from ast_dist.data.order import epoch_order
from ast_dist.distributed import LaggedRead, World
from ast_dist.gate.policy import Policy, PolicySetup
from ast_dist.gate.registry import make_policy
from ast_dist.gate.significance import significance
from ast_dist.model import build_model
from ast_dist.step import TrainStep
from benchmarks.timing import Marks, median_ms, synchronize

_ROTATED_BATCHES = 4
_WARMUP_STEPS = 5
_STEPS = range(10, 101)
_LR = 0.01


@dataclass(frozen=True)
class Workload:
    """What is trained: a model by name, the side of its images in pixels, the numbers of classes and of all samples.

    width: channels of small_cnn's first stage.
    """

    model: str
    image_px: int
    num_classes: int
    num_samples: int
    width: int = 64


@dataclass(frozen=True)
class Peak:
    """The arithmetic ceiling that MFU is a share of: dense bf16 TFLOP/s, and where the figure is from."""

    tflops: float
    source: str


def training_step(
    world: World, workload: Workload, batch_size: int, *, compiled: bool, peak: Peak, target_s: float
) -> dict[str, Any]:
    """Time the step at one batch size. Returns a row.

    target_s: about how long to measure. step_ms is a median over the steps; images_per_s follows from it.
    mfu: model FLOPs (torch's counter, forward and backward of the timed images, no recomputation) over the peak's.
    gate_ms: significance and observation timed alone, so gaps between launches, which training hides behind the
    model, count as theirs. host_syncs: places in a step where the host waits for the device, as CUDA's debug mode
    sees them.
    """
    device = world.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = make_step(world, workload, batch_size, compiled=compiled)
    policy = make_policy(PolicySetup(GateConfig(), workload.num_samples, epochs=10))
    batches = itertools.cycle(random_batches(workload, batch_size, device))
    lagged = LaggedRead()

    def train() -> None:
        batch = next(batches)
        scores, votes = step(batch, _LR)
        policy.observe(torch.where(batch.is_active, batch.ids, -1), scores)
        lagged.swap(votes)

    for _ in range(_WARMUP_STEPS):
        train()
    synchronize(device)
    warmup_s = time.perf_counter() - began
    began = time.perf_counter()
    train()
    synchronize(device)
    steps = min(max(int(target_s / (time.perf_counter() - began)), _STEPS.start), _STEPS.stop - 1)
    marks = Marks(device)
    marks.mark()
    for _ in range(steps):
        train()
        marks.mark()
    step_ms = sorted(marks.intervals_ms())
    median = statistics.median(step_ms)
    gate_ms = _gate_ms(workload, batch_size, device, policy)
    row: dict[str, Any] = {
        "model": workload.model,
        "image_px": workload.image_px,
        "batch_size": batch_size,
        "precision": "bf16",
        "compiled": compiled,
        "images_per_s": 1000.0 * batch_size / median,
        "step_ms": median,
        "step_p90_ms": step_ms[int(0.9 * (len(step_ms) - 1))],
        "steps": steps,
        "tflops": step.flops.step * batch_size / median / 1e9,
        "mfu": step.flops.step * batch_size / median / 1e9 / peak.tflops,
        "peak_tflops": peak.tflops,
        "peak_source": peak.source,
        "gate_ms": gate_ms,
        "gate_share": gate_ms / median,
        "warmup_s": warmup_s,
    }
    if device.type == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["host_syncs"] = _host_syncs(train)
    return row


def gate_per_epoch(num_samples: int, repetitions: int = 5) -> dict[str, Any]:
    """Time what the gate does once an epoch, on one rank's host, for a set of `num_samples`. Returns a row.

    order_ms is paid without a gate, too; plan_ms and merge_ms are the gate's.
    """
    policy = make_policy(PolicySetup(GateConfig(warmup_epochs=0, anneal_share=0.0), num_samples, epochs=10))
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"order_ms": [], "plan_ms": [], "merge_ms": []}
    ids = torch.arange(num_samples)
    for epoch in range(repetitions):
        policy.observe(ids, torch.rand(num_samples, generator=generator))
        began = time.perf_counter()
        policy.merge(epoch)
        times["merge_ms"].append(time.perf_counter() - began)
        began = time.perf_counter()
        order = epoch_order(num_samples, 0, epoch)
        times["order_ms"].append(time.perf_counter() - began)
        began = time.perf_counter()
        policy.plan(epoch, order)
        times["plan_ms"].append(time.perf_counter() - began)
    return {
        "samples": num_samples,
        **{key: 1000.0 * statistics.median(seconds) for key, seconds in times.items()},
    }


def make_step(world: World, workload: Workload, batch_size: int, *, compiled: bool = False) -> TrainStep:
    """A freshly initialised model with its optimizer: bf16, channels_last, SGD with momentum."""
    config = Config(
        run_dir="benchmark",
        data=DataConfig(train="synthetic", val="synthetic", image_size=workload.image_px),
        model=ModelConfig(name=workload.model, width=workload.width),
        loop=LoopConfig(global_batch_size=batch_size * world.size, precision="bf16", compile=compiled),
    )
    torch.manual_seed(0)
    return TrainStep(build_model(config.model, workload.num_classes), config, world)


def random_batches(workload: Workload, batch_size: int, device: torch.device) -> list[Batch]:
    """A few batches of random pixels and labels, on the device."""

    def batch(number: int) -> Batch:
        shape = (batch_size, 3, workload.image_px, workload.image_px)
        return Batch(
            step=number,
            ids=torch.randint(workload.num_samples, (batch_size,), device=device),
            images=torch.randint(256, shape, dtype=torch.uint8, device=device),
            labels=torch.randint(workload.num_classes, (batch_size,), device=device),
            weights=torch.ones(batch_size, device=device),
            is_active=torch.ones(batch_size, dtype=torch.bool, device=device),
            planned=batch_size,
        )

    torch.manual_seed(1)
    return [batch(number) for number in range(_ROTATED_BATCHES)]


def _gate_ms(workload: Workload, batch_size: int, device: torch.device, policy: Policy) -> float:
    logits = torch.randn(batch_size, workload.num_classes, device=device, dtype=torch.bfloat16)
    batch = random_batches(workload, batch_size, device)[0]

    def gate() -> None:
        scores = significance(logits, batch.labels)
        policy.observe(torch.where(batch.is_active, batch.ids, -1), scores)

    return median_ms(gate, device)


def _host_syncs(train: Callable[[], None]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
