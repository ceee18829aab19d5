"""An exponential moving average of a model's weights, by torch.optim.swa_utils, that advances with the data.

Its time is data passes, as the learning rate's is: where a gated epoch reads a third of the samples, each of its steps
stands for three, and the average forgets in it as much as in a full epoch. Per step, it would reach back over three
times as many passes whenever samples are skipped, into weights that were learned at another learning rate.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


class Average:
    """The average of the weights and of the batch statistics that `model` has after each optimizer step.

    model: the bare module (a copy of a DDP wrapper would hold a copy of its process group). decay: share of the old
    average that a step of a full epoch leaves; less in the first steps, min(decay, (1 + t) / (10 + t)) after t of
    them, as in TensorFlow's ExponentialMovingAverage, so that the initial weights do not outlive their use.

    Batch statistics are averaged as the weights are, as torchvision's references do: the newest ones belong to newer
    weights than the average's. Each rank averages its own; rank 0's count, so broadcast them before each use.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=True).requires_grad_(False)
        self._seen = 0.0
        self._unread = 0.0

    @property
    def module(self) -> nn.Module:
        """The averaged model; before the first step, a copy of the model as it was given."""
        return self._averaged.module

    def advance(self, steps: float) -> None:
        """Count data that passes, trained or skipped. steps: as many as a full epoch takes for it."""
        self._unread += steps

    def update(self) -> None:
        """Take the model's weights in, for the data counted since the last time; call it after each optimizer step.

        A step that is skipped (fp16 overflow, a loss that is not finite) has left weights and statistics as they were,
        and its data passed nevertheless: they count for the old weights, and the host need not ask a GPU which it was.
        """
        self._seen += self._unread
        self._averaged.update_parameters(self._model)
        self._unread = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's state and the counts, as tensors and plain values."""
        counts = {"updates": int(self._averaged.n_averaged), "seen": self._seen, "unread": self._unread}
        return {"model": self.module.state_dict(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.module.load_state_dict(state["model"])
        self._averaged.n_averaged.fill_(state["updates"])
        self._seen, self._unread = state["seen"], state["unread"]

    def _blend(self, averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        decay = min(self._decay, (1.0 + self._seen) / (10.0 + self._seen)) ** self._unread
        get_ema_multi_avg_fn(decay)(averaged, current, updates)
