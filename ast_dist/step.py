"""One optimizer step over a global batch, whatever share of it each rank holds."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_dist.average import Average
from ast_dist.config import Config
from ast_dist.data.batch import Batch, upload
from ast_dist.data.pixel_kernels import erase
from ast_dist.distributed import World
from ast_dist.gate.cost import SampleFlops, count_flops
from ast_dist.gate.significance import significance
from ast_dist.meters import AccuracyOfAll, Meters
from ast_dist.micro_batches import micro_batches
from ast_dist.mixing import Mix, pair
from ast_dist.model import Normalize, build_optimizer

TRAINING_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Significance of samples from logits (n, classes) and hard labels (n,).
Score = Callable[[Tensor, Tensor], Tensor]
# Votes that the ranks sum at each step, beside the number of active samples.
VOTE_STOP = 1
VOTE_SAVE = 2
VOTE_DAMAGED = 3
VOTE_NONFINITE = 4
NUM_VOTES = 5
# GradScaler's first scale, 2^16, is down to 1 after 16.
_MOST_OVERFLOWS = 20


class TrainStep:
    """The model, its optimizer, and the step that trains them.

    score: gives the significance of a batch's rows.

    A step whose gradient is not finite (NaN or infinite) is skipped: weights, optimizer and batch statistics stay as
    they were before it, on every rank alike, since the gradient is the same on all.

    Attributes: module (the bare model), optimizer, average (of its weights, or None), scaler, normalize, flops (of one
    sample), meters, accuracy (on all of an epoch's samples), nonfinite (steps that were not finite since this rank last
    voted, int64 scalar on the device).
    """

    def __init__(self, module: nn.Module, config: Config, world: World, score: Score = significance) -> None:
        self.config = config
        self.score = score
        self.world = world
        self.module = module.to(world.device)
        self.normalize = Normalize(config.data, world.device, config.model.channels_last)
        self.optimizer = build_optimizer(self.module, config.optim)
        self.average = Average(self.module, config.optim.ema_decay) if config.optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.loop.precision == "fp16")
        self.meters = Meters.zero(world.device)
        self.accuracy = AccuracyOfAll(world.device)
        self._overflows = torch.zeros((), dtype=torch.int64, device=world.device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=world.device)
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
        dtype = TRAINING_DTYPES[self.config.loop.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def __call__(
        self, batch: Batch, lr: float, *, mix: Mix | None = None, stop: bool = False, save: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Vote, and train one global batch. All ranks must call it, with their own share, which may be empty.

        batch: on this rank's device. lr: learning rate of this step. mix: how its images are mixed, None for not at
        all; the scores of a mixed step say nothing about samples. stop, save: this rank's votes.

        Returns the significance of the batch's rows, (n,) float32, and the votes summed over the ranks, (NUM_VOTES,)
        int64: active samples, then ranks that voted to stop, ranks that voted to save, damaged samples, and steps
        before this one that were not finite, each counted by the ranks that saw it.
        """
        votes = self.world.sum(self.votes(batch, stop=stop, save=save))
        return self.train(batch, lr, votes[0], mix), votes

    def votes(self, batch: Batch, *, stop: bool, save: bool) -> Tensor:
        """This rank's votes and counts, (NUM_VOTES,) int64 on the batch's device, for the ranks to sum."""
        cast = upload(torch.tensor([0, int(stop), int(save), len(batch.damaged), 0]), batch.images.device)
        cast[0] = batch.is_active.sum()
        cast[VOTE_NONFINITE], self.nonfinite = self.nonfinite, torch.zeros_like(self.nonfinite)
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
        dtype = torch.float32 if mix else TRAINING_DTYPES[self.config.loop.precision]
        images, other_labels, partners = self._inputs(batch, dtype), batch.labels, None
        if mix:
            partners = pair(batch.is_active)
            images, other_labels = mix.images(images, partners), batch.labels[partners]
        buffers = [buffer for buffer in self.module.buffers() if buffer.numel()]
        before = _flattened(buffers)
        logits, losses = [], []
        loss_sum = torch.zeros((), device=images.device)
        parts = self._parts(len(images), batch.planned)
        for number, (rows, is_own) in enumerate(parts):
            with self._unsynchronised(number < len(parts) - 1):
                with self.autocast:
                    output = self._model(images[rows])
                logits.append(output.detach().float())
                part_losses = self._losses(output.float(), batch.labels[rows])
                if mix:
                    part_losses = mix.losses(part_losses, self._losses(output.float(), other_labels[rows]))
                losses.append(part_losses.detach())
                weighted = torch.where(batch.is_active[rows] & is_own, part_losses * batch.weights[rows], 0.0)
                loss = weighted.sum() * (self.world.size / active.clamp_min(1))
                loss_sum += loss.detach()
                self.scaler.scale(loss).backward()
        is_finite = self._update(loss_sum)
        with torch.no_grad():
            _put_back(buffers, before, is_finite)
            if self.average:
                self.average.update()
            own_logits, own_losses = torch.cat(logits)[: len(images)], torch.cat(losses)[: len(images)]
            labels, chances = batch.labels, batch.chances
            if mix and mix.own_share < 0.5:
                labels, chances = other_labels, chances if chances is None else chances[partners]
            self._measure(own_logits, labels, batch.is_active & is_finite, own_losses, chances)
            return self.score(own_logits, batch.labels)

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
            images = self._for_scoring(self._inputs(batch))
            with self.autocast:
                output = torch.cat(
                    [self.module(part) for part in images.split(self.config.loop.micro_batch_size or len(images))]
                )
        finally:
            self.module.train()
        self.accuracy.add(output.argmax(dim=1) == batch.labels, batch.is_active, None)
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

    def _parts(self, num_rows: int, planned: int) -> list[tuple[Any, Any]]:
        """What goes through the model at once: rows, and which of them count. One part where no limit is set."""
        limit = self.config.loop.micro_batch_size
        share = -(-planned // self.world.size)
        if limit == 0 or max(share, num_rows) <= limit:
            return [(slice(None), True)]
        device = self.world.device
        return [
            (upload(torch.from_numpy(part.rows), device), upload(torch.from_numpy(part.is_own), device))
            for part in micro_batches(num_rows, share, limit)
        ]

    @contextlib.contextmanager
    def _unsynchronised(self, is_wanted: bool) -> Iterator[None]:
        """Keep gradients to this rank: those of all micro-batches are summed over the ranks with the last one's."""
        if is_wanted and isinstance(self._model, DistributedDataParallel):
            with self._model.no_sync():
                yield
        else:
            yield

    def _update(self, loss: Tensor) -> Tensor:
        """Step the optimizer where the gradient is finite, and return whether it is, a bool scalar on the device.

        loss: of this rank. The host of a GPU does not wait to learn the answer.
        """
        optimizer, scaler = self.optimizer, self.scaler
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        is_finite = torch.isfinite(norm)
        if self.config.optim.clip_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.config.optim.clip_grad_norm, norm)
        if scaler.is_enabled():
            # In half precision a scaled gradient overflows now and then, and the scaler halves its scale: a fault shows
            # in the loss itself, or goes on when there is nothing left to halve.
            self._overflows = torch.where(is_finite, 0, self._overflows + 1)
            self.nonfinite += ~torch.isfinite(loss) | (self._overflows > _MOST_OVERFLOWS)
            scaler.step(optimizer)
            scaler.update()
        else:
            self.nonfinite += ~is_finite
            if norm.device.type == "cuda":
                # As GradScaler does it: fused optimizers read this, and their kernels leave everything as it is.
                optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
                optimizer.step()
            elif known_to_host(is_finite):
                optimizer.step()
        optimizer.zero_grad()
        return is_finite

    def _measure(self, logits: Tensor, labels: Tensor, counts: Tensor, losses: Tensor, chances: Tensor | None) -> None:
        is_correct = logits.argmax(dim=1) == labels
        self.meters.loss += torch.where(counts, losses, 0.0).sum(dtype=torch.float64)
        self.meters.correct += (is_correct & counts).sum()
        self.meters.active += counts.sum()
        self.accuracy.add(is_correct, counts, chances)

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


def known_to_host(flag: Tensor) -> bool:
    """A flag's value, where the tensors are the host's own: it waits for nobody."""
    return bool(flag)


def _flattened(buffers: list[Tensor]) -> dict[torch.dtype, Tensor]:
    """A copy of buffers, one tensor a dtype: a ResNet-50 has 159 of them."""
    dtypes = {buffer.dtype for buffer in buffers}
    return {dtype: torch.cat([b.detach().reshape(-1) for b in buffers if b.dtype == dtype]) for dtype in dtypes}


def _put_back(buffers: list[Tensor], before: dict[torch.dtype, Tensor], is_finite: Tensor) -> None:
    """Undo what a skipped step did to the buffers, without asking the device whether it was skipped."""
    if is_finite.device.type == "cpu" and known_to_host(is_finite):
        return
    for dtype, old in before.items():
        own = [buffer for buffer in buffers if buffer.dtype == dtype]
        kept = torch.where(is_finite, torch.cat([buffer.detach().reshape(-1) for buffer in own]), old)
        parts = kept.split([buffer.numel() for buffer in own])
        torch._foreach_copy_(own, [part.view_as(buffer) for part, buffer in zip(parts, own, strict=True)])
