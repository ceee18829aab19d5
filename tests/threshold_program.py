"""What each rank of test_threshold_world does: `torchrun … tests/threshold_program.py OUT` leaves OUT/rank-R.pt."""

import sys
from pathlib import Path

import torch

from ast_dist.distributed import World
from ast_dist.gate.threshold import Threshold

STEPS = 12
CLASSES = 4
SPREADS = ("dealt", "by label", "by significance", "all on the last rank")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and scores of a global batch: small ones between large ones, some scores damaged, one batch empty."""
    size = (600, 90, 2, 512, 0, 300)[step % 6]
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    scores = torch.rand(size, generator=generator) * 0.9**step * 4.0 ** -labels.float()
    if size > 2:
        scores[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    return torch.arange(size) + 1000 * step, labels, scores


def share(spread: str, labels: torch.Tensor, scores: torch.Tensor, world: World) -> torch.Tensor:
    """This rank's positions in the batch."""
    if spread == "dealt":
        return torch.arange(len(labels))[world.rank :: world.size]
    if spread == "all on the last rank":
        return torch.arange(len(labels) if world.rank == world.size - 1 else 0)
    order = (labels.float() if spread == "by label" else scores.nan_to_num(0.0)).argsort(stable=True)
    return order.tensor_split(world.size)[world.rank]


def run(world: World, spread: str) -> dict[str, list[object]]:
    """Step one threshold through all batches. Returns its bits, this rank's kept ids, and the bytes it sent."""
    threshold = Threshold(target_rate=0.3)
    bits: list[object] = []
    kept: list[object] = []
    sent: list[object] = []

    def all_reduce(counts: torch.Tensor) -> torch.Tensor:
        sent.append(counts.numel() * counts.element_size())
        return world.sum(counts)

    for step in range(STEPS):
        ids, labels, scores = batch(step)
        mine = share(spread, labels, scores, world)
        keep, value = threshold.step(scores[mine], all_reduce, ids=ids[mine])
        state = threshold.state_dict()
        counts = state.pop("counts").numpy().tobytes().hex()
        bits.append((value.hex(), counts, {name: float(number).hex() for name, number in state.items()}))
        kept.append(ids[mine][keep].tolist())
    return {"bits": bits, "kept": kept, "sent": sent}


def main() -> None:
    """Do all spreads and save what this rank saw."""
    world = World.start()
    torch.save({spread: run(world, spread) for spread in SPREADS}, Path(sys.argv[1]) / f"rank-{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main()
