"""What a run spent, counted: samples and floating-point operations. Energy is measured elsewhere, never computed."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Ledger:
    """Cumulative counts over all ranks and sessions of a run.

    forwarded, backwarded: samples that went through the model in training. scored: samples that went through it
    forward only, for their score. full_equivalent: samples that training everything would have taken to the same
    point. damaged: samples that failed to decode. steps_nonfinite: steps that were computed and left without effect,
    because their loss or gradient was NaN or infinite.
    """

    forwarded: int = 0
    backwarded: int = 0
    full_equivalent: int = 0
    damaged: int = 0
    scored: int = 0
    steps_nonfinite: int = 0

    @property
    def samples_skipped(self) -> int:
        """Samples that full training would have trained up to here and this run did not."""
        return self.full_equivalent - self.backwarded

    def flops_saved(self, flops: "SampleFlops") -> float:
        """Share of full training's FLOPs that were not spent; negative where scoring cost more than it saved."""
        full = self.full_equivalent * flops.step
        training = self.forwarded * flops.forward + self.backwarded * flops.backward
        return 1.0 - (training + self.scored * flops.scoring) / full if full else 0.0

    def to_dict(self) -> dict[str, int]:
        """As plain numbers, for the checkpoint."""
        return asdict(self)

    def load(self, counts: dict[str, int]) -> None:
        """Go on from what `to_dict` gave."""
        for name, count in counts.items():
            setattr(self, name, count)


@dataclass(frozen=True)
class SampleFlops:
    """Floating-point operations of one sample: its forward pass, its backward pass, a forward pass for its score."""

    forward: float
    backward: float
    scoring: float = 0.0

    @property
    def step(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


def count_flops(model: nn.Module, images: Tensor, labels: Tensor, scoring_images: Tensor | None = None) -> SampleFlops:
    """Count one sample's FLOPs by running the model forward and backward once under torch's FLOP counter.

    images: (n, 3, H, W) as the model takes them, n ≥ 2 for batch statistics. scoring_images: (n, 3, h, w), of the
    size at which samples are scored; None where they are not. Gradients are left behind, and batch statistics are
    updated: call it where both are reset afterwards.
    """
    with FlopCounterMode(display=False) as counter:
        loss = nn.functional.cross_entropy(model(images).float(), labels)
        forward = counter.get_total_flops()
        loss.backward()
    total = counter.get_total_flops()
    scoring = 0
    if scoring_images is not None:
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(scoring_images)
        model.train()
        scoring = counter.get_total_flops()
    n = len(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return SampleFlops(forward / n, (total - forward) / n, scoring / n)
