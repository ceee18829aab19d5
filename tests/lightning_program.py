"""What each rank of test_lightning does: `torchrun … tests/lightning_program.py OUT` leaves OUT/rank-R.pt.

Also the LightningModule that both of them train: the gate inside Lightning's Trainer.
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from ast_dist import Gate

NUM_SAMPLES = 101
NUM_CLASSES = 3
GLOBAL_BATCH_SIZE = 8
EPOCHS = 4


class Points(Dataset):
    """Sample i is (features of i, i % NUM_CLASSES); notes what is fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        self.fetched.append(index)
        return torch.sin(index * torch.arange(1.0, 5.0)), index % NUM_CLASSES


class Classifier(lightning.LightningModule):
    """A small classifier that trains through a gate; `trained` holds the ids of every epoch, in order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
        self.dataset = Points()
        self.gate = Gate(num_samples=NUM_SAMPLES, target_rate=0.4, seed=3)
        self.trained: list[list[int]] = []

    def train_dataloader(self) -> Any:
        batch_size = GLOBAL_BATCH_SIZE // self.trainer.world_size
        return self.gate.loader(self.dataset, batch_size, epoch=self.current_epoch)

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, ids = batch
        self.trained[-1] += ids.tolist()
        return self.gate.loss(self.model(x), y, ids)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gate.merge()
        checkpoint["gate"] = self.gate.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gate.load_state_dict(checkpoint["gate"])


def make_trainer(root: str, max_epochs: int, **options: Any) -> lightning.Trainer:
    """A Trainer on the CPU that asks for a new loader before each epoch and prints nothing."""
    return lightning.Trainer(
        default_root_dir=root,
        max_epochs=max_epochs,
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def main() -> None:
    """Train and save what this rank saw."""
    model = Classifier()
    trainer = make_trainer(sys.argv[1], EPOCHS, devices=2, strategy="ddp")
    trainer.fit(model)
    trainer.save_checkpoint(Path(sys.argv[1]) / "whole.ckpt")
    results = {
        "world_size": dist.get_world_size(),
        "trained": model.trained,
        "report": model.gate.report(),
        "weights": {name: value.clone() for name, value in model.model.state_dict().items()},
    }
    torch.save(results, Path(sys.argv[1]) / f"rank-{trainer.global_rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
