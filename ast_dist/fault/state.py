"""The state of a run: everything that the next step depends on, as tensors and plain JSON values.

Two parts, so that nothing has to be unpickled: tensors go to torch.distributed.checkpoint under flat names, the rest
goes to state.json. Times, counts of sessions and the length of the metrics file are kept apart from it, since two
runs with the same weights may differ there.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ast_dist.data.order import Orders, Plan

_RNG = "rng"


class Stateful(Protocol):
    """Anything with a state of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Averaged(Stateful, Protocol):
    """An average of the model's weights, held in a module of its own."""

    module: nn.Module


@dataclass
class TrainState:
    """What a run is at a step boundary.

    orders: of the training set. epoch: epochs done. step_in_epoch: steps done of the present epoch's plan.
    global_step: steps done in all. plan: what the present epoch trains, None between epochs. candidates: samples
    selected and not yet trained, None where none ever wait. average: of the weights, None where none is kept. counts:
    the cost ledger's numbers. best_acc1, last_acc1: percent, None before the first evaluation. session: what is about
    the run's life, not its weights (number of sessions, seconds, length of the metrics file).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    gate: Stateful
    orders: Orders
    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    plan: Plan | None = None
    candidates: Stateful | None = None
    average: Averaged | None = None
    counts: dict[str, int] = field(default_factory=dict)
    best_acc1: float | None = None
    last_acc1: float | None = None
    session: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return self.orders.num_samples

    @property
    def seed(self) -> int:
        return self.orders.seed

    _PLAIN = ("epoch", "step_in_epoch", "global_step", "counts", "best_acc1", "last_acc1")

    def state_dict(self, rank: int) -> dict[str, Any]:
        """Nested dicts of tensors and plain values. Random states are keyed by rank: ranks must not share them."""
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict() if self.average else {},
            "optimizer": {str(key): value for key, value in self.optimizer.state_dict()["state"].items()},
            "scaler": self.scaler.state_dict(),
            "gate": self.gate.state_dict(),
            "plan": self._plan_state(),
            "candidates": self.candidates.state_dict() if self.candidates else {},
            _RNG: {str(rank): rng},
            **{name: getattr(self, name) for name in self._PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Restore what `state_dict` gave, at any world size. A rank that did not exist keeps its random state."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        # Learning rate and decay follow from the configuration, so the groups stay as they were built.
        groups = self.optimizer.state_dict()["param_groups"]
        slots = {int(key): value for key, value in state["optimizer"].items()}
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.gate.load_state_dict(state["gate"])
        if self.candidates:
            self.candidates.load_state_dict(state["candidates"])
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.plan = self._restore_plan(state["plan"])
        rng = state[_RNG].get(str(rank))
        if rng is not None:
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng["cuda"])

    def _plan_state(self) -> dict[str, Any]:
        """One bit a sample: the order itself follows from seed and epoch."""
        if self.plan is None:
            return {}
        state: dict[str, Any] = {"id": self.plan.id, "keep": torch.from_numpy(self.plan.bits(self.num_samples))}
        if self.plan.weights is not None:
            state["weights"] = torch.from_numpy(self.plan.weights)
        chances = self.plan.chances
        if chances is not None:
            state["chances"] = torch.from_numpy(chances) if isinstance(chances, np.ndarray) else chances
        return state

    def _restore_plan(self, state: dict[str, Any]) -> Plan | None:
        if not state:
            return None
        order = self.orders.of(self.epoch)
        weights = state["weights"].numpy() if "weights" in state else None
        chances = state.get("chances")  # older checkpoints have none
        chances = chances.numpy() if isinstance(chances, Tensor) else chances
        plan = Plan.from_bits(state["keep"].numpy(), order, weights, chances)
        if plan.id != state["id"]:
            raise RuntimeError(f"the plan of epoch {self.epoch} is {plan.id}, but the checkpoint trained {state['id']}")
        return plan


def split(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate tensors, under flat names like `model/0.weight`, from the nested plain values around them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            inner_tensors, plain[key] = split(value, f"{name}/")
            tensors.update(inner_tensors)
        else:
            plain[key] = value
    return tensors, plain


def join(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """Undo `split`."""
    state = json.loads(json.dumps(plain))
    for name, tensor in tensors.items():
        *folders, leaf = name.split("/")
        place = state
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = tensor
    return state


def hash_state(state: dict[str, Any], *, with_rng: bool = True) -> str:
    """SHA-256 (hex) over every tensor's name, dtype, shape and bytes and over every plain value of a state.

    with_rng: False leaves out the random states, which differ between ranks.
    """
    tensors, plain = split({key: value for key, value in state.items() if with_rng or key != _RNG})
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # an empty one that came through NumPy has no stride to be viewed by
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
