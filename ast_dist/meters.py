"""What the training steps tell of themselves: sums on each rank's device, read where a row is due."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ast_dist.distributed import World

# One sample in the sums of AccuracyOfAll, which are integers: they come out alike whatever the number of ranks, and
# wherever a run was interrupted. A chance is rounded by a millionth at most.
_SAMPLE = 2**20


@dataclass
class Meters:
    """Sums over the samples trained since the last reset, on this rank's device.

    loss: float64, nats. correct, active: int64. A mixed row is correct where it has the label of its larger share.
    Steps that were skipped because they were not finite are left out.
    """

    loss: Tensor
    correct: Tensor
    active: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "Meters":
        """Meters that have seen nothing."""
        integers = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), integers[0], integers[1])

    def read(self, world: World, peak_bytes: int) -> tuple[tuple[float, float] | None, int]:
        """Mean loss (nats) and top-1 (percent) over all ranks; None where nothing was trained. Waits for the device.

        peak_bytes: memory that this rank has used. Returns the busiest rank's beside the means: the ranks' own are
        places of the vector that is summed anyway.
        """
        own = [peak_bytes if rank == world.rank else 0 for rank in range(world.size)]
        integers = torch.stack([self.correct, self.active])
        correct, active, *peaks = world.sum(torch.cat([integers, torch.tensor(own, device=integers.device)])).tolist()
        loss = world.sum(self.loss.clone()).item()
        return ((loss / active, 100.0 * correct / active) if active else None), max(peaks)


class AccuracyOfAll:
    """Top-1 of an epoch's samples in training, had all been trained, estimated from those that were.

    A sample that was selected with the chance π stands for 1 / π samples (Horvitz and Thompson 1952, "A generalization
    of sampling without replacement from a finite universe", JASA 47); the sum of what is correct is divided by the sum
    of what is stood for, and not by the number of samples, which varies less (Hájek 1971, in "Foundations of
    Statistical Inference", p. 236): Σ correct / π ÷ Σ 1 / π.

    A sample's answer is the one it gave when it was trained, as for `Meters`; where batches are scored before they are
    trained, it is the scoring pass's, of every sample, so that nothing is estimated. Samples that failed to decode are
    left out on both sides, as are steps without effect.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, is_correct: Tensor, counts: Tensor, chances: Tensor | None) -> None:
        """Take in rows, without waiting for the device.

        is_correct: (n,) bool. counts: (n,) bool, False for rows that are no sample. chances: (n,) float32 with which
        their samples were selected, 0 for those that no estimate counts (see `Plan`); None for the same for all.
        """
        if chances is None:
            rows = counts.to(torch.int64) * _SAMPLE
        else:
            stood_for = (_SAMPLE / chances.double()).round()
            rows = torch.where(counts & (chances > 0), stood_for, 0.0).to(torch.int64)
        self._sums += torch.stack([(rows * is_correct).sum(), rows.sum()])

    def totals(self, world: World) -> list[int]:
        """The two sums over all ranks, for the checkpoint. All ranks must call."""
        totals: list[int] = world.sum(self._sums.clone()).tolist()
        return totals

    def load(self, totals: list[int], world: World) -> None:
        """Go on from what `totals` gave, at any world size."""
        self._sums.zero_()
        if world.is_main:
            self._sums += torch.tensor(totals, device=self._sums.device)

    def read(self, world: World) -> float | None:
        """The estimate, percent, and begin anew; None where nothing was trained. All ranks must call."""
        correct, stood_for = self.totals(world)
        self._sums.zero_()
        return 100.0 * correct / stood_for if stood_for else None
