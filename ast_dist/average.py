"""An exponential moving average of a model's weights that advances with the data.

Its time is data passes, as the learning rate's is: where a gated epoch reads a third of the samples, each of its steps
stands for three, and the average forgets in it as much as in a full epoch. Per step, it would reach back over three
times as many passes whenever samples are skipped, into weights that were learned at another learning rate.

The arithmetic is torch.optim.swa_utils', but not its AveragedModel, whose update copies a count to the GPU and waits.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of the weights and of the batch statistics that `model` has after each optimizer step.

    model: the bare module (a copy of a DDP wrapper would hold a copy of its process group). decay: share of the old
    average that a step of a full epoch leaves; less in the first steps, min(decay, (1 + t) / (10 + t)) after t of
    them, as in TensorFlow's ExponentialMovingAverage, so that the initial weights do not outlive their use.

    Batch statistics are averaged as the weights are, as torchvision's references do: the newest ones belong to newer
    weights than the average's. Each rank averages its own; rank 0's count, so broadcast them before each use.

    module: the averaged model; before the first step, a copy of the model as it was given.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._model = model
        self._decay = decay
        self._updates = 0
        self._seen = 0.0
        self._unread = 0.0

    def advance(self, steps: float) -> None:
        """Count data that passes, trained or skipped. steps: as many as a full epoch takes for it."""
        self._unread += steps

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights in, for the data counted since the last time; call it after each optimizer step.

        A step that is skipped (fp16 overflow, a loss that is not finite) has left weights and statistics as they were,
        and its data passed nevertheless: they count for the old weights, and the host need not ask a GPU which it was.
        """
        self._seen += self._unread
        decay = min(self._decay, (1.0 + self._seen) / (10.0 + self._seen)) ** self._unread if self._updates else 0.0
        pairs = list(zip(_tensors(self.module), _tensors(self._model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)([old for old, _ in floats], [new for _, new in floats], self._updates)
        for old, new in pairs:
            if not old.is_floating_point():  # counts of batches
                old.copy_(new)
        self._updates += 1
        self._unread = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's state and the counts, as tensors and plain values."""
        counts = {"updates": self._updates, "seen": self._seen, "unread": self._unread}
        return {"model": self.module.state_dict(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.module.load_state_dict(state["model"])
        self._updates, self._seen, self._unread = state["updates"], state["seen"], state["unread"]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
