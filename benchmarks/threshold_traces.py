"""Traces of significance: recorded from a small real training, or read from files.

    python -m benchmarks.threshold_traces OUT [--data TRAIN]

trains small_cnn a few times, from random initialisation through a drop of the learning rate to 1/10, and writes what
every sample scored at every step to OUT/NAME.npz. The same trainings, with a rule that decides at each step which
samples are trained, are the closed loop of benchmarks.threshold.
"""

import itertools
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import Positional

from ast_dist.arguments import parse_arguments
from ast_dist.config import DataConfig, ModelConfig, OptimConfig
from ast_dist.data.decode_torch import decode
from ast_dist.data.index import Index, replaced_file
from ast_dist.data.order import epoch_order, step_ids
from ast_dist.data.read import Reader
from ast_dist.errors import UserError, run_command
from ast_dist.gate.significance import significance
from ast_dist.gate.threshold import Threshold
from ast_dist.model import Normalize, build_model, build_optimizer

WIDTH = 8
LR_PER_SAMPLE = 0.1 / 128
LR_AFTER_DROP = 0.1
DROP_AT = 2 / 3
GATED_RATE = 0.2

# Takes the scores and ids of a global batch, (N,) float32 and (N,) int64; returns which to train, (N,) bool.
Select = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trace:
    """What every sample scored at every step of a training.

    significance: (steps, batch) float32, nats. label: (steps, batch) int16, or None where it was not recorded.
    """

    name: str
    significance: np.ndarray
    steps_per_epoch: int
    drop_step: int
    label: np.ndarray | None = None

    @property
    def batch(self) -> int:
        return self.significance.shape[1]

    def save(self, folder: Path) -> Path:
        """Write folder/NAME.npz: `sig`, `spe`, `drop`, and `label` where there is one."""
        fields = {"sig": self.significance, "spe": np.array(self.steps_per_epoch), "drop": np.array(self.drop_step)}
        if self.label is not None:
            fields["label"] = self.label
        folder.mkdir(parents=True, exist_ok=True)
        with replaced_file(folder / f"{self.name}.npz") as file:
            np.savez_compressed(file, allow_pickle=False, **fields)
        return folder / f"{self.name}.npz"


@dataclass(frozen=True)
class Images:
    """A set of labelled images in memory. pixels: (N, 3, H, W) uint8. labels: (N,) int64."""

    name: str
    pixels: Tensor
    labels: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def first(self, count: int) -> "Images":
        """The first `count` images (shards are shuffled); all when there are fewer."""
        return Images(self.name, self.pixels[:count], self.labels[:count])


def load_trace(path: Path) -> Trace:
    """Read a trace. Raises UserError when the file is none."""
    try:
        # NumPy leaves a file open that it opened itself and that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as fields:
            scores, spe, drop = fields["sig"], int(fields["spe"]), int(fields["drop"])
            label = fields.get("label")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a trace ({error}). A trace is a .npz file with sig (steps × batch), spe and drop."
        ) from None
    if scores.ndim != 2 or 0 in scores.shape or scores.dtype != np.float32 or not 1 <= spe <= len(scores):
        raise UserError(
            f"{path}: sig is {scores.dtype} {scores.shape} with {spe} steps an epoch, not float32 (steps, batch) with "
            "at least one whole epoch. Record it again."
        )
    return Trace(path.stem, scores, spe, drop, label)


def load_images(data: Path | None, count: int) -> Images:
    """The first `count` images of a shard folder (all of one size), or scikit-learn's 1,797 digits."""
    if data is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "the digits come with scikit-learn, which is not installed. Install it, or give --data TRAIN."
            ) from None
        digits = load_digits()
        pixels = torch.from_numpy((digits.images * (255.0 / 16.0)).astype(np.uint8))
        return Images("digits", pixels[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()).first(count)
    index = Index.open(data)
    sizes = np.unique(np.stack([index.height[:count], index.width[:count]]), axis=1)
    if sizes.shape[1] != 1:
        raise UserError(f"{data}: images of {sizes.shape[1]} different sizes, but this needs one size, say CIFAR-10's.")
    reader = Reader(index)
    try:
        taken = range(min(count, index.num_samples))
        pixels = torch.stack([decode(reader.read(number), number, index.key(number)) for number in taken])
    finally:
        reader.close()
    return Images(data.resolve().parent.name, pixels, torch.from_numpy(index.label[:count].astype(np.int64)))


def train(images: Images, batch: int, epochs: int, select: Select | None = None, seed: int = 0) -> Iterator[np.ndarray]:
    """Train small_cnn and yield each step's scores, (batch,) float32, from the forward pass that trains.

    select: which samples enter the loss; None takes all. Epochs consist of whole batches; images are mirrored at
    random. SGD, the learning rate constant until two thirds of the steps are done and a tenth from there on.
    """
    torch.manual_seed(seed)
    model = build_model(ModelConfig(name="small_cnn", width=WIDTH), images.num_classes)
    # One rate for all batch sizes from 512 up: in so few steps a larger one does not settle.
    optimizer = build_optimizer(model, OptimConfig(lr=LR_PER_SAMPLE * min(batch, 512), weight_decay=5e-4))
    normalize = Normalize(DataConfig(), torch.device("cpu"), channels_last=True)
    generator = torch.Generator().manual_seed(seed)
    spe = len(images.labels) // batch
    for epoch, step in itertools.product(range(epochs), range(spe)):
        if epoch * spe + step == drop_step(spe, epochs):
            for group in optimizer.param_groups:
                group["lr"] *= LR_AFTER_DROP
        ids = torch.from_numpy(step_ids(epoch_order(len(images.labels), seed, epoch), step, batch).copy())
        is_mirrored = torch.rand(batch, generator=generator) < 0.5
        pixels = images.pixels[ids]
        pixels = torch.where(is_mirrored[:, None, None, None], pixels.flip(-1), pixels)
        logits, labels = model(normalize(pixels)), images.labels[ids]
        scores = significance(logits, labels)
        keep = torch.ones(batch, dtype=torch.bool) if select is None else select(scores, ids)
        losses = F.cross_entropy(logits, labels, reduction="none")
        (torch.where(keep, losses, 0.0).sum() / keep.sum().clamp_min(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield scores.numpy()


def drop_step(steps_per_epoch: int, epochs: int) -> int:
    """The step from which on the learning rate is a tenth."""
    return int(DROP_AT * steps_per_epoch * epochs)


def record(images: Images, batch: int, epochs: int, gated_rate: float | None = None) -> Trace:
    """Train once and keep every step's scores. gated_rate: target of a Threshold in closed loop; None trains all."""
    spe = len(images.labels) // batch
    if spe < 1 or epochs < 1:
        raise UserError(
            f"{images.name}: {len(images.labels)} images and {epochs} epochs give no step of {batch}. Take more."
        )
    threshold = None if gated_rate is None else Threshold(gated_rate)
    select: Select | None = None if threshold is None else lambda scores, ids: threshold.step(scores, ids=ids)[0]
    scores = np.stack(list(train(images, batch, epochs, select)))
    orders = [epoch_order(len(images.labels), 0, epoch)[: spe * batch] for epoch in range(epochs)]
    label = images.labels.numpy()[np.concatenate(orders)].reshape(scores.shape).astype(np.int16)
    kind = "full" if gated_rate is None else f"gated-{gated_rate:g}"
    return Trace(f"{images.name}-{batch}-{kind}", scores, spe, drop_step(spe, epochs), label)


# Batch size and epochs of each training: about as many steps at 1,024 as settling and 50-step means need.
PLAN = ((128, 8), (512, 8), (1024, 10))


def record_all(images: Images, epoch_share: float = 1.0) -> Iterator[Trace]:
    """Record the batch sizes of PLAN, with and without the gate. epoch_share: shortens all trainings."""
    for batch, epochs in PLAN:
        if batch <= len(images.labels):
            # The largest batch once: what the gate changes shows at the others.
            for gated_rate in (None,) if batch == PLAN[-1][0] else (None, GATED_RATE):
                yield record(images, batch, max(1, round(epochs * epoch_share)), gated_rate)


@dataclass(frozen=True)
class Arguments:
    """Record traces of significance."""

    out: Positional[Path]
    """Folder for the .npz files."""
    data: Path | None = None
    """Folder of training shards with images of one size; scikit-learn's digits unless given."""
    images: int = 8192
    """Images that are trained on."""


def main(argv: list[str]) -> int:
    """Record and write. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.threshold_traces")
    for trace in record_all(load_images(arguments.data, arguments.images)):
        path = trace.save(arguments.out)
        steps, batch = trace.significance.shape
        print(f"{path}: {steps:,} steps of {batch}, learning rate dropped at {trace.drop_step:,}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
