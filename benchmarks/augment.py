"""What augmentation takes of an image on this machine's device: `python -m benchmarks.augment`.

Beside it stands torchvision's own class, called for each image as a Dataset does. Images are made up, the draws are
new in every repetition, and the time of ours includes drawing them.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ast_dist.allocator import keep_freed_memory
from ast_dist.arguments import parse_arguments
from ast_dist.augmenter import Augmenter
from ast_dist.data.batch import Batch
from ast_dist.data.pixel_kernels import erase
from ast_dist.data_config import DataConfig
from ast_dist.errors import run_command
from benchmarks.result import RESULTS, ResultFile
from benchmarks.timing import median_ms

_LINEAR = InterpolationMode.BILINEAR
_STRENGTHS = (0.4, 0.4, 0.4, 0.1)
# Option: its settings, and torchvision's class.
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "RandAugment": ({"auto_augment": "randaugment"}, v2.RandAugment(interpolation=_LINEAR)),
    "TrivialAugment": ({"auto_augment": "trivialaugment"}, v2.TrivialAugmentWide(interpolation=_LINEAR)),
    "colour jitter": ({"color_jitter": _STRENGTHS}, v2.ColorJitter(*_STRENGTHS)),
    "random erasing": ({"erase_share": 0.25}, v2.RandomErasing(0.25)),
}


@dataclass(frozen=True)
class Arguments:
    """Time each augmentation."""

    out: Path = RESULTS
    """Folder of the result file."""
    batch_size: int = 64
    """Images at once."""
    image_px: int = 224
    """Side of the images, pixels."""
    target_s: float = 3.0
    """Seconds for each figure."""


def main(argv: list[str]) -> int:
    """Measure, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.augment")
    result = ResultFile(arguments.out / "augment.json", "augment", "python -m benchmarks.augment")
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for option in OPTIONS:
        result.add(cost(option, device, arguments.batch_size, arguments.image_px, arguments.target_s))
        print(result.rows[-1], flush=True)
    return 0


def cost(option: str, device: torch.device, batch_size: int, image_px: int, target_s: float) -> dict[str, Any]:
    """Time one augmentation of a batch. Returns a row.

    ms_per_image: ours, the draws included; the upload, too, where the device is not the CPU.
    """
    settings, theirs = OPTIONS[option]
    augment = Augmenter(DataConfig(image_size=image_px, **settings), 0, device)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        step=0,
        ids=torch.arange(batch_size),
        images=torch.randint(256, (batch_size, 3, image_px, image_px), dtype=torch.uint8, generator=generator),
        labels=torch.zeros(batch_size, dtype=torch.int64),
        weights=torch.ones(batch_size),
        is_active=torch.ones(batch_size, dtype=torch.bool),
        planned=batch_size,
    )
    is_erasing = option == "random erasing"
    pixels = batch.images.to(device)
    # Erasing works on normalised images.
    images = pixels.float() if is_erasing else pixels
    epochs = itertools.count()

    def ours() -> None:
        augmented = augment(batch, next(epochs))
        if augmented.erased is not None:
            erase(images, augmented.erased)

    torch.manual_seed(0)
    ours_ms = median_ms(ours, device, target_s) / batch_size
    theirs_ms = median_ms(lambda: [theirs(image) for image in images], device, target_s) / batch_size
    return {
        "measure": "augment",
        "option": option,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "batch": batch_size,
        "image_px": image_px,
        "ms_per_image": ours_ms,
        "torchvision_ms_per_image": theirs_ms,
        "ratio_to_torchvision": theirs_ms / ours_ms,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
