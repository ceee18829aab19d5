"""What the gate takes of a training step on this machine: `python -m benchmarks.gate_cost`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ast_dist.allocator import keep_freed_memory
from ast_dist.arguments import parse_arguments
from ast_dist.distributed import World
from ast_dist.errors import run_command
from ast_dist.gate.significance import significance
from ast_dist.gate.threshold import Threshold, histogram
from benchmarks import tables
from benchmarks.result import RESULTS, ResultFile
from benchmarks.timing import median_ms
from benchmarks.training_step import Workload, make_step, random_batches

BATCH_SIZES = (128, 256, 512)


@dataclass(frozen=True)
class Arguments:
    """Time the gate beside a training step."""

    out: Path = RESULTS
    """Folder of the result file."""


def main(argv: list[str]) -> int:
    """Measure, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.gate_cost")
    result = ResultFile(arguments.out / "gate_cost.json", "gate_cost", "python -m benchmarks.gate_cost")
    keep_freed_memory()
    world = World.start()
    for batch_size in BATCH_SIZES:
        result.add(cost(world, batch_size))
    world.close()
    print(tables.render_all(result.content))
    return 0


def cost(world: World, batch_size: int, image_px: int = 32) -> dict[str, Any]:
    """Time the gate beside a bf16 training step of small_cnn (width 64) on this machine. Returns a row.

    gate_share: significance, histogram, update and keep over the whole step. all_reduce_bytes: what a rank sends.
    """
    workload = Workload("small_cnn", image_px, 10, 50_000)
    step, batch = make_step(world, workload, batch_size), random_batches(workload, batch_size, world.device)[0]
    logits = torch.randn(batch_size, 10, device=world.device)
    scores, threshold = significance(logits, batch.labels), Threshold(0.4)
    threshold.step(scores, ids=batch.ids)
    dither = torch.rand(batch_size, device=world.device)
    bins = threshold.bins
    counts = histogram(scores, bins)
    parts = {
        "significance_ms": median_ms(lambda: significance(logits, batch.labels), world.device),
        "histogram_ms": median_ms(lambda: histogram(scores, bins), world.device),
        "update_ms": median_ms(lambda: threshold.update(counts, bins), world.device),
        "keep_ms": median_ms(lambda: threshold.keep(scores, dither), world.device),
    }
    step_ms = median_ms(lambda: step(batch, 0.01), world.device, target_s=3.0)
    return {
        "measure": "cost",
        "device": world.device.type,
        "model": "small_cnn",
        "batch": batch_size,
        "image_px": image_px,
        **parts,
        "gate_ms": sum(parts.values()),
        "step_ms": step_ms,
        "gate_share": sum(parts.values()) / step_ms,
        "all_reduce_bytes": counts.numel() * counts.element_size(),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
