"""A small training state, for the tests of checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ast_dist.config import GateConfig
from ast_dist.data.order import Orders
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.state import TrainState
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Sundew

NUM_SAMPLES = 100
ORDERS = Orders(np.array([NUM_SAMPLES]), seed=0)


def fresh_state(optimizer: str = "sgd", seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    kinds: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }
    gate = Sundew(PolicySetup(GateConfig(), NUM_SAMPLES, epochs=10))
    return TrainState(model, kinds[optimizer](), torch.amp.GradScaler("cpu", enabled=False), gate, ORDERS)


def train(state: TrainState, steps: int) -> None:
    """Steps on random data that the process's random state draws, dropout included."""
    for _ in range(steps):
        loss = nn.functional.cross_entropy(state.model(torch.randn(8, 6)), torch.randint(0, 3, (8,)))
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.global_step += 1


def saved(checkpoints: Checkpoints, state: TrainState, val_acc1: float | None = None) -> Path | None:
    """Save, and wait until it is committed."""
    checkpoints.save(state, val_acc1)
    return checkpoints.wait()
