"""Made-up JPEGs in shards: as many bytes and pixels as photographs have, and nothing to download."""

import contextlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_jpeg

from ast_dist.data.index import Index
from data_prep import make_shards

# Amplitudes (of 255) of noise at 1/16 of the resolution and at full resolution. At 500 × 375 pixels they give about
# 110 kB a JPEG, which is ImageNet's mean: what a decoder takes depends on the bytes.
_COARSE, _FINE = 90.0, 21.0
_JPEG_QUALITY = 90
_VAL_SHARE = 8
_OFFSETS_PX = 64


def make_images(folder: Path, count: int, height: int, width: int, num_classes: int) -> None:
    """Write `count` training and count / 8 validation JPEGs, folder/{train,val}/CLASS/NAME.jpg, the same each time."""
    generator = torch.Generator().manual_seed(0)
    # Drawing noise takes longer than encoding it: every image cuts its own piece out of one field.
    noise = torch.randn(3, height + _OFFSETS_PX, width + _OFFSETS_PX, generator=generator)
    for split, images in (("train", count), ("val", max(count // _VAL_SHARE, num_classes))):
        for number in range(images):
            label = number % num_classes
            target = folder / split / f"class-{label:03d}" / f"{number:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = _image(label / num_classes, height, width, noise, generator)
            target.write_bytes(encode_jpeg(pixels, quality=_JPEG_QUALITY).numpy().tobytes())


def make_shard_set(folder: Path, count: int, height: int, width: int, num_classes: int) -> tuple[Index, Index]:
    """Make images and convert them with data_prep.make_shards. Returns the indexes of train and val."""
    make_images(folder / "images", count, height, width, num_classes)
    for split in ("train", "val"):
        with contextlib.redirect_stdout(io.StringIO()):
            make_shards.main([str(folder / "images"), str(folder / "shards"), "--split", split, "--no-decode-check"])
    return Index.open(folder / "shards" / "train"), Index.open(folder / "shards" / "val")


def _image(tint: float, height: int, width: int, noise: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient under coarse and fine noise, tinted by class. Returns (3, height, width) uint8."""
    coarse = torch.randn(1, 3, height // 16 + 1, width // 16 + 1, generator=generator)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    top, left = torch.randint(_OFFSETS_PX, (2,), generator=generator).tolist()
    gradient = torch.linspace(-1.0, 1.0, width) * torch.linspace(-1.0, 1.0, height)[:, None]
    base = 128.0 + 60.0 * gradient + 40.0 * (tint - 0.5) * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    fine = noise[:, top : top + height, left : left + width]
    return (base + _COARSE * coarse + _FINE * fine).clamp(0, 255).to(torch.uint8)
