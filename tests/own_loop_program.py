"""What each rank of test_own_loop_ddp does: `torchrun … tests/own_loop_program.py OUT` leaves OUT/rank-R.pt."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_dist import Gate
from ast_dist.distributed import World
from ast_dist.errors import UserError

# The last global batch of a full epoch holds one sample: three of four ranks have none of it.
NUM_SAMPLES = 201
NUM_CLASSES = 3
GLOBAL_BATCH_SIZE = 8
STOPPED_AT = 4


class Points:
    """Sample i is (features of i, i % NUM_CLASSES)."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.sin(index * torch.arange(1.0, 5.0)), index % NUM_CLASSES


def logits_of(ids: Tensor, epoch: int) -> Tensor:
    """A made-up answer of a model that depends on the sample alone."""
    return 2 * torch.sin(ids[:, None].float() * (1.7 + epoch + torch.arange(NUM_CLASSES)))


def make_gate(**options: Any) -> Gate:
    return Gate(NUM_SAMPLES, 0.5, seed=2, weight_cap=3.0, **options)


def watched(world_size: int) -> tuple[list[Any], list[dict[str, float]], Gate]:
    """Three epochs in which the gate sees made-up answers: batches as (ids, losses' weights), and reports."""
    gate, epochs, reports = make_gate(), [], []
    for epoch in range(3):
        batches = []
        for _, y, ids in gate.loader(Points(), GLOBAL_BATCH_SIZE // world_size, epoch):
            losses = torch.ones(len(ids), requires_grad=True)
            gate.reduce(losses, ids).backward()
            gate.observe(logits_of(ids, epoch), y, ids)
            batches.append((ids.tolist(), losses.grad.tolist()))
        epochs.append(batches)
        reports.append(gate.report())
    return epochs, reports, gate


def trained(world_size: int) -> dict[str, Tensor]:
    """Weights after two epochs of plain SGD under DDP."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    model = DistributedDataParallel(module) if world_size > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    gate = make_gate()
    for epoch in range(2):
        for x, y, ids in gate.loader(Points(), GLOBAL_BATCH_SIZE // world_size, epoch):
            gate.loss(model(x), y, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in module.state_dict().items()}


def stopped(world_size: int) -> tuple[str, dict[str, Any]]:
    """Stop in the middle of a gated epoch: what state_dict says before and gives after the merge."""
    gate = make_gate()
    for epoch in range(2):
        for batch, (_, y, ids) in enumerate(gate.loader(Points(), GLOBAL_BATCH_SIZE // world_size, epoch)):
            target = torch.full((len(ids), NUM_CLASSES), 1 / NUM_CLASSES) if batch == 1 else y
            gate.loss(logits_of(ids, epoch), target, ids)
            if (epoch, batch + 1) == (1, STOPPED_AT):
                break
    refusal = ""
    try:
        gate.state_dict()
    except RuntimeError as error:
        refusal = str(error)
    gate.merge()
    return refusal, gate.state_dict()


def disagreement(rank: int) -> str:
    """What is said when every rank has a seed of its own."""
    try:
        Gate(NUM_SAMPLES, seed=rank).loader(Points(), 2, 0)
    except UserError as error:
        return str(error)
    return ""


def results(world: World) -> dict[str, Any]:
    """All that this rank sees."""
    epochs, reports, gate = watched(world.size)
    refusal, state = stopped(world.size)
    return {
        "world": (world.rank, world.size, str(world.device)),
        "epochs": epochs,
        "reports": reports,
        "state": gate.state_dict(),
        "trained": trained(world.size),
        "refusal": refusal,
        "stopped": state,
        "disagreement": disagreement(world.rank),
    }


def main() -> None:
    """Do all of it and save what this rank saw."""
    gate = make_gate()
    early = gate.loader(Points(), 2, 0)
    dist.init_process_group("gloo")
    world = World.current()
    said = ""
    try:
        next(iter(early))
    except UserError as error:
        said = str(error)
    seen = {"early": said, "late": len(gate.loader(Points(), 2, 0)), **results(world)}
    torch.save(seen, Path(sys.argv[1]) / f"rank-{world.rank}.pt")
    world.close()
    # Gloo has been seen to abort while the interpreter ends ("terminate called without an active exception"), after
    # everything was done and saved; what is tested here ends above.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
