"""Sundew in a process whose arithmetic fails: a rank's last layer gives NaN in chosen steps.

    POISON='{"rank": 1, "steps": [7, 8], "once": "FILE"}' … --gate.policy tests.faults.poisoned_policy:Poisoned

steps: numbers of the training steps of this process's model, from 0. epoch: all the steps of this epoch. once: with
it, the fault passes: after it has struck, that file exists, and nothing is struck any more.

Each rank appends the SHA-256 of its last layer's weights before each forward to weights-of-rank-R.txt in the folder
WEIGHTS, by which a test sees that the ranks agree.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Sundew


class Poisoned(Sundew):
    """Counts the training steps of its model by what it observes."""

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        Poison.current.step = 0

    def observe(self, ids: Tensor, scores: Tensor) -> None:
        super().observe(ids, scores)
        Poison.current.step += 1

    def scores_epoch(self, epoch: int) -> bool:
        Poison.current.epoch = epoch
        return super().scores_epoch(epoch)


class Poison:
    """Torch calls it after each forward of each module of this process."""

    current: "Poison"

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        self.step, self.epoch = 0, 0
        self._rank = int(os.environ.get("RANK", "0"))
        is_struck = plan["rank"] == self._rank
        self._steps = set(plan.get("steps", ())) if is_struck else set()
        self._epoch = plan.get("epoch") if is_struck else None
        self._once = Path(plan["once"]) if "once" in plan else None
        self._weights = folder / f"weights-of-rank-{self._rank}.txt"

    def __call__(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        is_training = isinstance(module, nn.Linear) and module.training and torch.is_grad_enabled()
        if not is_training or output.device.type == "meta":
            return None
        with self._weights.open("a", encoding="ascii") as file:
            file.write(hashlib.sha256(module.weight.detach().numpy().tobytes()).hexdigest() + "\n")
        is_due = self.step in self._steps or self.epoch == self._epoch
        if not is_due or (self._once and self._once.exists()):
            return None
        if self._once and self.step == max(self._steps):
            self._once.touch()
        return output * float("nan")


Poison.current = Poison(json.loads(os.environ["POISON"]), Path(os.environ["WEIGHTS"]))
nn.modules.module.register_module_forward_hook(Poison.current)
