"""Which samples are trained: one interface that a policy of one's own implements in one file.

    class EveryOther(Policy):
        def target_rate(self, epoch):
            return 0.5

        def plan(self, epoch, order):
            return Plan(order[epoch % 2 :: 2])

`--gate.policy mypackage.mymodule:EveryOther` trains with it; so does `Gate(..., policy=EveryOther)`.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ast_dist.config import Config, GateConfig
from ast_dist.data.order import BlockOrder, Plan
from ast_dist.errors import UserError, described
from ast_dist.gate.memory import GatherRows, SignificanceMemory
from ast_dist.gate.significance import significance
from ast_dist.gate.threshold import AllReduce

# A forward pass is a third of a training step: the backward pass takes twice its arithmetic.
FORWARD_COST = 1.0 / 3.0


@dataclass(frozen=True)
class PolicySetup:
    """What a policy is told of the run.

    num_samples: of the training set; ids are 0 … num_samples - 1. epochs: of full training. labels: (num_samples,)
    int64 or None where they are not known. all_reduce: sums an int64 tensor over the ranks; gather: concatenates
    rows of all ranks; both None where there is one rank. scoring_cost: of one sample's scoring pass, in samples
    trained. Every rank has its own rank, and the same of all else. A policy reads it where it needs it and copies
    nothing: `Gate` learns the number of ranks after the policy is made.
    """

    config: GateConfig
    num_samples: int
    epochs: int
    seed: int = 0
    labels: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    all_reduce: AllReduce | None = None
    gather: GatherRows | None = None
    scoring_cost: float = FORWARD_COST

    @classmethod
    def of_run(cls, config: Config, num_samples: int, labels: np.ndarray | None = None) -> "PolicySetup":
        """The setup of a configured run, on one rank. Scoring on fewer pixels costs their share of a forward pass."""
        share = (config.gate.scoring_px / config.data.image_size) ** 2 if config.gate.scoring_px else 1.0
        return cls(config.gate, num_samples, config.loop.epochs, config.seed, labels, scoring_cost=FORWARD_COST * share)


class Policy:
    """Selects the samples of each epoch. Subclass it and override `plan`.

    Every rank calls every method at the same moment, and `plan` must return the same on every rank: derive it from
    the arguments, the setup and the shared memory, never from a global random generator or from the rank.

    Most policies decide before an epoch, from what they remember: skipped samples are not even read. One that decides
    on batches just read, from a scoring forward pass, says so in `scores_epoch` and overrides `select`.
    """

    # Whether `plan` hands the order on or takes a slice of it: then no more of a huge set's order is held than that.
    takes_block_order = False

    def __init__(self, setup: PolicySetup) -> None:
        self.setup = setup
        self.config = setup.config
        self._planned: dict[str, float] = {"rate": 1.0, "rate_target": 1.0}
        self._report: dict[str, float] = {}

    @property
    def epochs(self) -> int:
        """Epochs that the run will have; the learning rate is fully decayed at the last one's end."""
        return self.setup.epochs

    def target_rate(self, epoch: int) -> float:
        """Share of the samples that an epoch is meant to train."""
        return 1.0

    def scores_epoch(self, epoch: int) -> bool:
        """Whether an epoch's samples are scored by a forward pass of their own, and thinned by `select`."""
        return False

    def cost(self, epoch: int) -> float:
        """Predicted cost of an epoch, in epochs of full training; a scoring forward pass counts as a third
        where it sees all pixels."""
        return self.target_rate(epoch) + (self.setup.scoring_cost if self.scores_epoch(epoch) else 0.0)

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        """What this epoch reads (and trains, unless it is scored first), at least one sample, in the order given.

        order: (num_samples,) int64, every sample id once, a random permutation that is the same on every rank.
        Chances that the plan states give `train/acc1_all`; a policy that knows none leaves it out.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement plan(epoch, order)")

    def note_planned(self, rate: float, target: float) -> None:
        """Take down the share of the samples that the present epoch's plan holds, and its target, for the report."""
        self._planned = {"rate": rate, "rate_target": target}

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Significance of samples from the model's answer. logits: (n, classes). labels: (n,) int64, hard.

        Returns (n,) float32, nats. Called without gradients, on the model's device.
        """
        return significance(logits, labels, self.config.loss_weight, self.config.entropy_weight)

    def select(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Loss weights of a scored batch's rows, 0 for those that are not trained; where `scores_epoch`.

        ids: (n,) int64 sample ids of this rank's rows (negative: padding). scores: (n,) float32, from `score`. Both
        on the model's device; do not wait for it. Returns (n,) float32 there.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement select(ids, scores)")

    def absorb(self, counts: Tensor) -> None:
        """Take in the histogram of all ranks' scores of the last batch; where `scores_epoch`.

        counts: (NUM_BINS + 1,) int64 on the CPU, as `threshold.histogram` makes it, summed over the ranks. One batch
        late, so that summing it overlaps with training.
        """

    def observe(self, ids: Tensor, significance: Tensor) -> None:
        """Note the significance of this rank's trained rows: (n,) int64 (negative: padding), (n,) float32."""

    def merge(self, epoch: int) -> None:
        """Share the observations between ranks: at each epoch's end and before each checkpoint."""

    def report(self) -> dict[str, float]:
        """Values of the present epoch for the metrics, by their key after `gate/`.

        The share that the plan holds and the target are known; set what else there is to tell in `_report`.
        """
        return {**self._planned, **self._report}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors that later plans depend on, the same on every rank."""
        return {"planned": self._planned, "report": self._report}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._planned, self._report = state["planned"], state["report"]


class RememberingPolicy(Policy):
    """A policy that remembers every sample's significance from when it was last trained, in `memory`."""

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.memory = SignificanceMemory(setup.num_samples, setup.config.memory_decay)

    def observe(self, ids: Tensor, significance: Tensor) -> None:
        self.memory.observe(ids, significance)

    def merge(self, epoch: int) -> None:
        self.memory.merge(epoch, self.setup.gather)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.memory.load_state_dict(state["memory"])


class Full(Policy):
    """Trains on everything: the reference that every saving is measured against."""

    takes_block_order = True

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        return Plan(order)


def checked_plan(policy: Policy, epoch: int, order: np.ndarray | BlockOrder) -> Plan:
    """A policy's plan of an epoch, judged before anything is trained by it.

    Raises UserError where it is none: no samples, others than those of `order` or in another order, weights that are
    not one finite number ≥ 0 a sample, chances that are no numbers in 0 … 1. A policy of one's own may get that wrong,
    and a resume could not mend it.
    """
    name = f"{type(policy).__name__}.plan of epoch {epoch}"
    if not policy.takes_block_order:
        order = np.asarray(order)
    try:
        # A slice of a block order is an array; what else these policies do with it is hand it on.
        plan = policy.plan(epoch, cast(np.ndarray, order))
        target = float(policy.target_rate(epoch))
    except UserError:
        raise
    except Exception as error:
        # One of ours is a defect of ours, and its traceback is wanted.
        if type(policy).__module__.startswith("ast_dist."):
            raise
        raise UserError(f"{name} raises {described(error)}.") from error
    if not isinstance(plan, Plan):
        raise UserError(f"{name} gives {type(plan).__name__}: give an ast_dist.data.order.Plan.")
    if plan.ids is order and plan.weights is None and plan.chances is None:
        policy.note_planned(1.0, target)
        return plan
    ids = np.asarray(plan.ids)
    if ids.ndim != 1 or not len(ids):
        raise UserError(f"{name} gives ids of shape {ids.shape}: give one row of at least one sample id.")
    if ids.dtype != np.int64 or ids.min() < 0 or ids.max() >= len(order):
        raise UserError(
            f"{name} gives {ids.dtype} ids from {ids.min()} to {ids.max()}: give int64 ids in 0 … {len(order) - 1}."
        )
    weights = None if plan.weights is None else np.asarray(plan.weights, dtype=np.float32)
    chances = None if plan.chances is None else np.asarray(plan.chances, dtype=np.float32)
    plan = Plan(ids, weights, float(chances) if chances is not None and not chances.ndim else chances)
    if not np.array_equal(Plan.from_bits(plan.bits(len(order)), order).ids, ids):
        raise UserError(f"{name} changes the order or repeats samples: thin the order it is given, as order[keep].")
    if weights is not None and not (weights.shape == ids.shape and np.isfinite(weights).all() and weights.min() >= 0):
        raise UserError(f"{name}: {ids.shape} ids, weights of shape {weights.shape}; give one finite weight ≥ 0 an id.")
    if chances is not None and not (chances.shape in ((), ids.shape) and ((chances >= 0) & (chances <= 1)).all()):
        raise UserError(f"{name}: {ids.shape} ids, chances of shape {chances.shape}; give a number in 0 … 1 an id.")
    policy.note_planned(len(ids) / len(order), target)
    return plan


def nearest_count(share: float, num_samples: int) -> int:
    """Number of samples nearest to a share of them, at least one."""
    return max(1, math.floor(share * num_samples + 0.5))


def first_of(order: np.ndarray, rate: float) -> np.ndarray:
    """The first `rate` of a random order: a random subset of exactly that size, at least one sample."""
    count = nearest_count(rate, len(order))
    return order if count == len(order) else order[:count]


def weights_of(keep: Tensor) -> Tensor:
    """Loss weights of a mask: 1 where it holds, 0 elsewhere. keep: (n,) bool. Returns (n,) float32."""
    return keep.to(torch.float32)
