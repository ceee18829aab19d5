"""The parts of CIFAR-10's training, each alone, on all ranks at once: what benchmarks.cifar10 starts under torchrun.

    torchrun --nproc_per_node=2 -m benchmarks.cifar10_parts OUT.json TRAIN VAL

Every rank does its share of the global batch, so that ranks compete for cores and memory as they do in training. A
part is timed until the slowest rank is done.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ast_dist.command_line import parse
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.distributed import World
from ast_dist.gate.significance import significance
from ast_dist.model import build_model
from ast_dist.step import NUM_VOTES, TrainStep
from ast_dist.validation import evaluate
from benchmarks.timing import synchronize

_LR = 0.01
_PASS_BATCHES = 12
_PASSES = 5
_STEPS = 4


def main(argv: list[str]) -> int:
    """Measure every part and write the rows as JSON. Returns 0."""
    out, train_root, val_root = argv
    data = ["--run-dir", "benchmark", "--data.train", train_root, "--data.val", val_root]
    config = parse(["--preset", "cifar10", *data])
    train, val = Index.open(train_root), Index.open(val_root)
    world = World.start()
    batch_size, seed = config.loop.global_batch_size, config.seed
    loader = Loader(train, config.data, world.rank, world.size, world.local_size)
    val_loader = Loader(val, config.data, world.rank, world.size, world.local_size)
    step = TrainStep(build_model(config.model, train.num_classes), config, world)
    order = epoch_order(train.num_samples, seed, 0)
    pass_samples = min(batch_size * _PASS_BATCHES, train.num_samples // _PASSES)
    plans = [Plan(order[number * pass_samples :][:pass_samples]) for number in range(_PASSES)]
    rows: list[dict[str, object]] = []

    def add(part: str, action: Callable[[int], object], samples: int) -> None:
        seconds = statistics.median(_pass_s(world, action, number) for number in range(_PASSES))
        rows.append(
            {
                "part": part,
                "images_per_s": samples / seconds,
                "batch_ms": 1000.0 * seconds * batch_size / samples,
                "processes": world.size,
                "batch_size": batch_size,
            }
        )

    def load(number: int) -> None:
        for _ in loader.train_batches(plans[number], batch_size, seed, 0):
            pass

    # Each pass takes images that no pass before took, then the same ones again.
    add("read, decode, cache, crop", load, pass_samples)
    add("crop from the cache", load, pass_samples)
    whole = loader.train_batches(Plan(plans[0].ids[: batch_size * _STEPS]), batch_size, seed, 0)
    batches = [batch.to(world.device) for batch in whole]
    trained = sum(batch.planned for batch in batches)

    def train_pass(_: int) -> None:
        for batch in batches:
            step(batch, _LR)

    train_pass(0)
    add("training step", train_pass, trained)
    gradients = torch.zeros(sum(parameter.numel() for parameter in step.module.parameters()), device=world.device)
    votes = torch.zeros(NUM_VOTES, dtype=torch.int64, device=world.device)
    add("of it: summing gradients, nothing hidden", lambda _: world.sum(gradients), batch_size)
    add("of it: votes", lambda _: [world.sum(votes) for _ in range(20)], 20 * batch_size)
    logits = torch.randn(len(batches[0].labels), train.num_classes, device=world.device)
    add("of it: significance", lambda _: [significance(logits, batches[0].labels) for _ in range(20)], 20 * batch_size)

    def validate(_: int) -> None:
        evaluate(step.module, val_loader, world, step.normalize, batch_size, step.autocast)

    validate(0)
    add("evaluation, from the cache", validate, val.num_samples)
    if world.is_main:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    loader.close()
    val_loader.close()
    world.close()
    return 0


def _pass_s(world: World, action: Callable[[int], object], number: int) -> float:
    """Seconds until every rank has done its share."""
    world.barrier()
    began = time.perf_counter()
    action(number)
    synchronize(world.device)
    world.barrier()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
