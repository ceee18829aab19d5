"""What is read, how it is decoded and augmented: the settings below `data`."""

import math
from dataclasses import dataclass
from typing import Literal

from ast_dist.errors import require, require_share


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    """Folder or URL (s3://, gs://, hf://, https://) of the training shards (it holds manifest.json)."""
    val: str = ""
    """Folder or URL of the validation shards."""
    decoder: Literal["auto", "dali", "torch"] = "auto"
    """What decodes images: NVIDIA DALI or torchvision; auto takes the best that works here and says which."""
    shuffle_block_shards: int = -1
    """Shards that are shuffled at a time, 0 for all; -1 takes 8 behind a URL or above 16 million samples, else 0."""
    cache: Literal["auto", "ram", "none"] = "auto"
    """Keep decoded uint8 images in memory after the first pass: auto does so when they fit in cache_mb."""
    cache_mb: int = 2048
    """Memory that the cache may take, MB, per rank and split."""
    image_size: int = 224
    """Side of the square images that the model sees, pixels."""
    crop: Literal["resized", "padded", "none"] = "resized"
    """Training crop: random resized crop (ImageNet), shift by up to crop_pad_px (CIFAR), or the centre."""
    crop_scale_min: float = 0.08
    """Smallest share of the image's area that a resized crop takes."""
    crop_pad_px: int = 4
    """Largest shift of a padded crop, in pixels of the stored image."""
    flip: bool = True
    """Mirror half of the training images."""
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Operations drawn for each training image from a list of 14, as in torchvision: RandAugment or TrivialAugment."""
    randaugment_ops: int = 2
    """randaugment: operations on each image, one after another."""
    randaugment_magnitude: int = 9
    """randaugment: strength of all its operations, 0 to 30."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest change of brightness, contrast, saturation (about a factor of 1) and hue (in turns, up to 0.5)."""
    erase_share: float = 0.0
    """Chance that a box of a training image is set to data.mean (random erasing); 0 is off."""
    erase_scale: tuple[float, float] = (0.02, 0.33)
    """Least and largest share of the image's area that the erased box takes."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Least and largest height / width of the erased box."""
    val_crop_ratio: float = 0.875
    """Share of the short side that the central validation crop takes."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means subtracted on the device, for pixels in 0 … 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations divided by on the device."""
    threads: int = 0
    """Decoding threads per rank; 0 shares the host's cores among its ranks."""
    prefetch_batches: int = 4
    """Batches read and decoded ahead of the step."""
    shard_cache_gb: float = 20.0
    """Disk space that fetched shards may take on each host, GB; the least recently used ones make room."""
    shard_cache_dir: str = ""
    """Folder of fetched shards, on a local disk; unless given, ast_dist in the user's cache folder."""
    damaged_limit: float = 0.0001
    """Share of an epoch's samples (and at least one) that may fail to decode before the run stops with their list."""

    def __post_init__(self) -> None:
        require(self.image_size >= 1, f"data.image_size is {self.image_size}, but must be at least 1 pixel.")
        require(0.0 < self.crop_scale_min <= 1.0, f"data.crop_scale_min is {self.crop_scale_min:g}, not in (0, 1].")
        require(0.0 < self.val_crop_ratio <= 1.0, f"data.val_crop_ratio is {self.val_crop_ratio:g}, not in (0, 1].")
        require(
            self.shuffle_block_shards >= -1,
            f"data.shuffle_block_shards is {self.shuffle_block_shards}, but must be at least -1 (-1 = automatic).",
        )
        require(self.crop_pad_px >= 0, f"data.crop_pad_px is {self.crop_pad_px}, but must be at least 0.")
        require(self.threads >= 0, f"data.threads is {self.threads}, but must be at least 0 (0 = automatic).")
        require(self.prefetch_batches >= 1, f"data.prefetch_batches is {self.prefetch_batches}, must be at least 1.")
        require(
            0.0 < self.shard_cache_gb < math.inf, f"data.shard_cache_gb is {self.shard_cache_gb:g}, must be above 0."
        )
        require(all(s > 0 for s in self.std), f"data.std is {self.std}, but every value must be above 0.")
        require_share("data.damaged_limit", self.damaged_limit)
        self._require_augmentation()

    def _require_augmentation(self) -> None:
        require(self.randaugment_ops >= 1, f"data.randaugment_ops is {self.randaugment_ops}, must be at least 1.")
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 30, f"data.randaugment_magnitude is {magnitude}, not in 0 … 30.")
        for name, strength in zip(("brightness", "contrast", "saturation", "hue"), self.color_jitter, strict=True):
            most = 0.5 if name == "hue" else math.inf
            require(
                0.0 <= strength <= most and math.isfinite(strength),
                f"data.color_jitter is {self.color_jitter}: {name} is {strength:g}, but must be "
                + ("in 0 … 0.5." if name == "hue" else "at least 0 and finite."),
            )
        require_share("data.erase_share", self.erase_share)
        low, high = self.erase_scale
        require(0.0 <= low <= high <= 1.0, f"data.erase_scale is {self.erase_scale}: needs 0 ≤ least ≤ largest ≤ 1.")
        low, high = self.erase_ratio
        require(
            0.0 < low <= high < math.inf, f"data.erase_ratio is {self.erase_ratio}: needs 0 < least ≤ largest, finite."
        )
