"""One optimizer step over a global batch, whatever share of it each rank holds."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_dist.config import Config
from ast_dist.data.batch import Batch, upload
from ast_dist.data.pixel_kernels import erase
from ast_dist.distributed import World
from ast_dist.gate.cost import SampleFlops, count_flops
from ast_dist.gate.significance import significance
from ast_dist.mixing import Mix, pair
from ast_dist.model import Normalize, build_optimizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Significance of samples from logits (n, classes) and hard labels (n,).
Score = Callable[[Tensor, Tensor], Tensor]
# Votes that the ranks sum at each step, beside the number of active samples.
VOTE_STOP = 1
VOTE_SAVE = 2
VOTE_DAMAGED = 3
NUM_VOTES = 4


@dataclass
class Meters:
    """Sums over the samples trained since the last reset, on this rank's device.

    loss: float64, nats. correct, active: int64. A mixed row is correct where it has the label of its larger share.
    """

    loss: Tensor
    correct: Tensor
    active: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "Meters":
        """Meters that have seen nothing."""
        integers = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), integers[0], integers[1])

    def read(self, world: World) -> tuple[float, float] | None:
        """Mean loss (nats) and top-1 (percent) over all ranks; None where nothing was trained. Waits for the device."""
        correct, active = world.sum(torch.stack([self.correct, self.active])).tolist()
        loss = world.sum(self.loss.clone()).item()
        return (loss / active, 100.0 * correct / active) if active else None


class TrainStep:
    """The model, its optimizer, and the step that trains them.

    score: gives the significance of a batch's rows.

    Attributes: module (the bare model), optimizer, scaler, normalize, flops (of one sample), meters.
    """

    def __init__(self, module: nn.Module, config: Config, world: World, score: Score = significance) -> None:
        self.config = config
        self.score = score
        self.world = world
        self.module = module.to(world.device)
        self.normalize = Normalize(config.data, world.device, config.model.channels_last)
        self.optimizer = build_optimizer(self.module, config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.loop.precision == "fp16")
        self.meters = Meters.zero(world.device)
        self._model: nn.Module = self.module
        with self._unchanged():
            self.flops = self._count_flops()
        if config.loop.compile:
            self._model.compile()
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            self._model = DistributedDataParallel(self.module, device_ids=devices, gradient_as_bucket_view=True)
            # DDP orders its buckets anew after the first backward, which changes the sums' last bits. One pass over
            # an empty batch puts that behind us, so that a resumed run reduces as the uninterrupted one does.
            with self._unchanged():
                self._model(self._empty_images()).sum().backward()

    @property
    def autocast(self) -> torch.autocast:
        """Mixed precision as configured, a context for forward passes."""
        dtype = _DTYPES[self.config.loop.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def __call__(
        self, batch: Batch, lr: float, *, mix: Mix | None = None, stop: bool = False, save: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Vote, and train one global batch. All ranks must call it, with their own share, which may be empty.

        batch: on this rank's device. lr: learning rate of this step. mix: how its images are mixed, None for not at
        all; the scores of a mixed step say nothing about samples. stop, save: this rank's votes.

        Returns the significance of the batch's rows, (n,) float32, and the votes summed over the ranks, (NUM_VOTES,)
        int64: active samples, then ranks that voted to stop, ranks that voted to save, and damaged samples.
        """
        votes = self.world.sum(self.votes(batch, stop=stop, save=save))
        return self.train(batch, lr, votes[0], mix), votes

    def votes(self, batch: Batch, *, stop: bool, save: bool) -> Tensor:
        """This rank's votes and counts, (NUM_VOTES,) int64 on the batch's device, for the ranks to sum."""
        cast = upload(torch.tensor([0, int(stop), int(save), len(batch.damaged)]), batch.images.device)
        cast[0] = batch.is_active.sum()
        return cast

    def train(self, batch: Batch, lr: float, active: Tensor, mix: Mix | None = None) -> Tensor:
        """Train one global batch. All ranks must call it, with their own share, which may be empty.

        batch, lr, mix: as for a call. active: int64, active samples of the whole batch, G.

        The loss on a rank is W · Σ wᵢ·ℓᵢ / G, with W the world size, so that DDP's mean over the ranks is the mean
        over the samples however they are spread.

        Returns the significance of the batch's rows, (n,) float32.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Autocast would round the same numbers at the first convolution; blends are made in full precision before it.
        dtype = torch.float32 if mix else _DTYPES[self.config.loop.precision]
        images, other_labels = self._inputs(batch, dtype), batch.labels
        if mix:
            partners = pair(batch.is_active)
            images, other_labels = mix.images(images, partners), batch.labels[partners]
        with self.autocast:
            output = self._model(images)
        logits = output.float()
        losses = self._losses(logits, batch.labels)
        if mix:
            losses = mix.losses(losses, self._losses(logits, other_labels))
        weighted = torch.where(batch.is_active, losses * batch.weights, 0.0)
        loss = weighted.sum() * (self.world.size / active.clamp_min(1))
        self.scaler.scale(loss).backward()
        if self.config.optim.clip_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optim.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self._measure(logits, other_labels if mix and mix.own_share < 0.5 else batch.labels, batch, losses)
            return self.score(logits, batch.labels)

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> Tensor:
        """Significance of a batch's rows before they are trained, by a forward pass alone. All ranks must call it.

        The model is in evaluation mode: batch statistics are used and not changed, nothing is dropped, and a row's
        score does not depend on the others'. Every rank uses rank 0's statistics. Images are first brought to
        `gate.scoring_px` where that is set.

        batch: on this rank's device. Returns (n,) float32 there; the host does not wait for it.
        """
        self.world.broadcast_buffers(self.module)
        self.module.eval()
        try:
            with self.autocast:
                output = self.module(self._for_scoring(self._inputs(batch)))
        finally:
            self.module.train()
        return self.score(output.float(), batch.labels).float()

    def _inputs(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
        images = self.normalize(batch.images, dtype)
        return images if batch.erased is None else erase(images, batch.erased)

    def _for_scoring(self, images: Tensor) -> Tensor:
        side = self.config.gate.scoring_px
        if side in (0, self.config.data.image_size):
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The training loss of every row, (n,) float32."""
        smoothing = self.config.optim.label_smoothing
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def _measure(self, logits: Tensor, labels: Tensor, batch: Batch, losses: Tensor) -> None:
        is_correct = logits.argmax(dim=1) == labels
        self.meters.loss += torch.where(batch.is_active, losses, 0.0).sum(dtype=torch.float64)
        self.meters.correct += (is_correct & batch.is_active).sum()
        self.meters.active += batch.is_active.sum()

    def _empty_images(self) -> Tensor:
        size = self.config.data.image_size
        return self.normalize(torch.zeros((2, 3, size, size), dtype=torch.uint8, device=self.world.device))

    def _count_flops(self) -> SampleFlops:
        images, labels = self._empty_images(), torch.zeros(2, dtype=torch.int64, device=self.world.device)
        return count_flops(self.module, images, labels, self._for_scoring(images))

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Undo what a trial pass does to buffers, gradients and random states."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        cuda = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            yield
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])
        self.optimizer.zero_grad()
