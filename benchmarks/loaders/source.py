"""What is measured (a job), and what every loader gives back (a source of batches)."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

Batches = Iterator[tuple[Tensor, Tensor]]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SEED = 0


@dataclass(frozen=True)
class Job:
    """One measurement, the same for every loader.

    mode: a key of `benchmarks.loaders.run.MODES`. module: the loader's module. decoder: pil, torchvision, torch, dali,
    or a limit's name. output: float32 (normalised) or uint8. paths: folders of the data by format. image_px: side of
    the crops. epoch_images: samples of the whole set. cpus: the process and its workers are held to these.
    seconds, warmup_s: of the timed part, and of what is dropped before it. start_batch: batches of the epoch that a
    resumed run has behind it. keep_rate: share of the samples that a gate keeps. state: what the loader itself saved
    at start_batch, or None.
    """

    mode: str
    module: str
    decoder: str
    output: str
    paths: dict[str, str]
    batch_size: int
    workers: int
    image_px: int
    epoch_images: int
    cpus: list[int]
    seconds: float = 0.0
    warmup_s: float = 0.0
    start_batch: int = 0
    keep_rate: float = 1.0
    state: Any = None


@dataclass(frozen=True)
class Source:
    """An opened loader.

    epoch: the batches of an epoch, images (n, 3, px, px) and labels, from the job's start_batch on the first time.
    resume_method: how this loader comes to the middle of an epoch. state: what it saves for that, where it can.
    close: end its threads and processes.
    """

    epoch: Callable[[], Batches]
    resume_method: str
    state: Callable[[], Any] | None = None
    close: Callable[[], None] = field(default=lambda: None)


def is_installed(package: str) -> bool:
    """Whether a package, or one below another, can be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def shard_names(job: Job) -> list[str]:
    """The shards' files, in order, for loaders that know nothing of the index."""
    return [str(path) for path in sorted(Path(job.paths["shards"]).glob("*.tar"))]
