"""Lightning's way to train and to go on: `torchrun … -m benchmarks.faults_lightning …`.

ModelCheckpoint(save_last=True) and `fit(ckpt_path="last")`, as its documentation of checkpoints tells, either at its
default (once an epoch) or every so many seconds (train_time_interval).
"""

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from ast_dist import startup
from benchmarks.faults_peers import PeerArguments, argv, augmented, parse_peer, peer_images, peer_model, peer_optimizer
from benchmarks.faults_record import Record


class Module(lightning.LightningModule):
    """The classifier; rank 0 records what it does."""

    def __init__(self, arguments: PeerArguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.model = peer_model(arguments)
        self.record: Record | None = None

    def on_train_start(self) -> None:
        if self.trainer.is_global_zero:
            self.record = Record(self.arguments.run_dir)
            self.record.started(self.trainer.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(augmented(images)).float(), labels)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.record:
            self.record.step_done(self.trainer.global_step)

    def on_train_end(self) -> None:
        if self.record:
            self.record.ended(self.trainer.global_step, self.model.state_dict())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return peer_optimizer(self.model)


class Trainer(lightning.Trainer):
    """Lightning's, which notes how long its saves take."""

    def save_checkpoint(self, filepath: str | Path, *more: Any, **options: Any) -> None:
        began = time.perf_counter()
        super().save_checkpoint(filepath, *more, **options)
        record = self.lightning_module.record
        if isinstance(record, Record):
            record.saved(time.perf_counter() - began)


def main() -> None:
    """Train to the end, from the newest checkpoint where there is one."""
    startup.note("imported_s")
    warnings.simplefilter("ignore")
    arguments = parse_peer(argv())
    dataset = peer_images(arguments.images)
    interval = timedelta(seconds=arguments.every_s) if arguments.every_s else None
    saving = ModelCheckpoint(arguments.run_dir / "checkpoints", save_last=True, train_time_interval=interval)
    module = Module(arguments)
    trainer = Trainer(
        default_root_dir=arguments.run_dir,
        max_epochs=arguments.epochs,
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=DDPStrategy(process_group_backend="gloo"),
        precision="bf16-mixed",
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(arguments.seed + 1 + trainer.global_rank)
    loader = DataLoader(dataset, batch_size=arguments.batch_size // trainer.world_size, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last")


if __name__ == "__main__":
    main()
