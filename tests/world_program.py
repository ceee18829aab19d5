"""What each rank of test_world does: `torchrun … tests/world_program.py OUT` leaves OUT/rank-R.pt."""

import sys
from pathlib import Path

import torch

from ast_dist.config import Config, DataConfig, GateConfig, LoopConfig, ModelConfig, OptimConfig
from ast_dist.data.batch import Batch
from ast_dist.data.order import epoch_order, rank_share
from ast_dist.distributed import LaggedRead, World
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Sundew
from ast_dist.gate.threshold import Threshold
from ast_dist.model import build_model
from ast_dist.step import VOTE_DAMAGED, VOTE_STOP, TrainStep

NUM_SAMPLES = 1000
# Rank 1 holds no sample at W = 2, and ranks 1 and 2 hold few at W = 3.
SPREADS = {1: [6], 2: [6, 0], 3: [4, 1, 1]}


def significance_of(ids: torch.Tensor, epoch: int) -> torch.Tensor:
    """A made-up score that depends on the sample alone."""
    return (torch.sin(ids.double() * (1.7 + epoch)) + 1.001).float()


def thresholds(world: World) -> list[str]:
    """Step one threshold on unequal shares, rank 1's being empty now and then; return its exact bits."""
    threshold = Threshold(target_rate=0.3)
    bits = []
    for step in range(6):
        count = 0 if world.rank == 1 and step % 2 else 40 + 17 * world.rank
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        _, value = threshold.step(torch.rand(count, generator=generator) * (step + 1), world.sum)
        bits.append(value.hex())
    return bits


def plans(world: World) -> list[str]:
    """Run the policy through a warm-up and three gated epochs, each rank observing its share; return the plans' ids."""
    config = GateConfig(target_rate=0.4, p_min=0.2, anneal_share=0.0)
    policy = Sundew(PolicySetup(config, NUM_SAMPLES, 4, 3, None, world.rank, world.size, world.sum, world.gather_rows))
    ids = []
    for epoch in range(4):
        plan = policy.plan(epoch, epoch_order(NUM_SAMPLES, 3, epoch))
        mine = torch.from_numpy(rank_share(plan.ids, world.rank, world.size).copy())
        policy.observe(mine, significance_of(mine, epoch))
        policy.merge(epoch)
        ids.append(plan.id)
    return ids


def step_with(world: World, spread: list[int], damaged: int, micro_batch_size: int = 0) -> dict[str, torch.Tensor]:
    """Train the same six samples, spread over the ranks, for one step of plain SGD; return all weights."""
    config = Config(
        run_dir="x",
        data=DataConfig(train="x", val="x", image_size=8),
        model=ModelConfig(name="small_cnn", width=8, norm="group"),
        optim=OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, label_smoothing=0.1),
        loop=LoopConfig(micro_batch_size=micro_batch_size),
    )
    torch.manual_seed(0)
    step = TrainStep(build_model(config.model, 10), config, world)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    first = sum(spread[: world.rank])
    mine = list(range(first, first + spread[world.rank]))
    rows = max(len(mine), 2)
    batch = Batch(
        step=0,
        ids=torch.full((rows,), -1),
        images=torch.zeros((rows, 3, 8, 8), dtype=torch.uint8),
        labels=torch.zeros(rows, dtype=torch.int64),
        weights=torch.zeros(rows),
        is_active=torch.zeros(rows, dtype=torch.bool),
        planned=6,
    )
    for row, sample in enumerate(mine):
        batch.ids[row], batch.images[row], batch.labels[row] = sample, images[sample], sample
        batch.weights[row], batch.is_active[row] = 1.0 + sample, sample >= damaged
        if sample < damaged:
            batch.damaged.append(f"sample {sample}")
    _, votes = step(batch, lr=1.0)
    assert votes.tolist()[VOTE_DAMAGED] == damaged
    return {name: value.clone() for name, value in step.module.state_dict().items()}


def votes(world: World) -> list[list[int] | None]:
    """The last rank alone asks to stop at the second of three steps; return what this rank reads at each."""
    lagged = LaggedRead()
    read: list[list[int] | None] = []
    for step in range(3):
        vote = torch.zeros(4, dtype=torch.int64)
        vote[VOTE_STOP] = int(step == 1 and world.rank == world.size - 1)
        read.append(lagged.swap(world.sum(vote)))
    return [*read, lagged.flush()]


def main() -> None:
    """Do all of it and save what this rank saw."""
    world = World.start()
    rows = torch.arange(world.rank, dtype=torch.int64) + (1 << 40) * world.rank
    results = {
        "thresholds": thresholds(world),
        "plans": plans(world),
        "votes": votes(world),
        "gathered": world.gather_rows(rows, rows.float()),
        "summed_in_place": int(world.sum(torch.tensor([world.rank + 1]))),
    }
    if world.size in SPREADS:
        results["weights"] = step_with(world, SPREADS[world.size], damaged=0)
        # In passes of two: a rank with one sample or none must take as many as the others.
        results["weights_micro"] = step_with(world, SPREADS[world.size], damaged=0, micro_batch_size=2)
        results["weights_damaged"] = step_with(world, SPREADS[world.size], damaged=2)
    torch.save(results, Path(sys.argv[1]) / f"rank-{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main()
