"""The opponents: what anyone should compare a selection method with, behind the same interface and ledger.

`short` and `random` cost nothing to run and are hard to beat ("No Train No Gain", Kaddour et al. 2023,
arXiv:2307.06440: most speed-ups vanish against an equal budget with a fully decayed schedule).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.counter_rng import STREAM_DITHER, STREAM_KEEP, uniform
from ast_dist.data.batch import upload
from ast_dist.data.order import Plan
from ast_dist.gate.draw import uniform_on_device
from ast_dist.gate.policy import Policy, PolicySetup, RememberingPolicy, first_of, weights_of
from ast_dist.gate.significance import significance
from ast_dist.gate.threshold import NUM_BINS, bin_of

# Share of the samples that lie below the mean loss, for predictions before a run: losses are skewed to the right.
# Measured on CIFAR-10 with a small CNN: 0.64 after the first epoch, 0.72 at the end.
_SHARE_BELOW_MEAN = 2.0 / 3.0


class Short(Policy):
    """Full training with fewer epochs and a fully decayed schedule: `target_rate` of the samples in all.

    The last epoch is cut where the budget is spent.
    """

    takes_block_order = True

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self._passes = setup.config.target_rate * setup.epochs
        # A budget of 0.3 · 20 epochs must not become seven by its last bit.
        self._epochs = max(1, math.ceil(self._passes - 1e-9))

    @property
    def epochs(self) -> int:
        return self._epochs

    def target_rate(self, epoch: int) -> float:
        return min(1.0, max(0.0, self._passes - epoch))

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        ids = first_of(order, self.target_rate(epoch))
        self._report = {"rate": len(ids) / len(order), "rate_target": self.target_rate(epoch)}
        return Plan(ids, chances=None if ids is order else len(ids) / len(order))


class Random(Policy):
    """A random subset of exactly `target_rate`, drawn anew each epoch."""

    takes_block_order = True

    def target_rate(self, epoch: int) -> float:
        return self.config.target_rate

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        ids = first_of(order, self.config.target_rate)
        self._report = {"rate": len(ids) / len(order), "rate_target": self.config.target_rate}
        return Plan(ids, chances=None if ids is order else len(ids) / len(order))


class InfoBatch(RememberingPolicy):
    """InfoBatch (Qin et al., ICLR 2024, arXiv:2303.04947).

    Before each epoch, samples whose last loss lies below the mean of all losses are pruned with the chance
    r = `prune_ratio` (equation 2: soft pruning with the threshold H̄ₜ); those of them that are kept weigh 1 / (1 - r),
    which keeps the gradient's expectation (equation 7). The last `infobatch_anneal_share` of the epochs (the paper's
    1 - δ = 0.125) train everything, unweighted. The first epoch trains everything, since no loss is known.

    How much is saved follows from r and the losses, not from `target_rate`; more than r of it never is.
    """

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.memory.decay = 0.0  # the paper's score is the last loss, no average

    def target_rate(self, epoch: int) -> float:
        """The expected share: losses are skewed to the right, and about two in three lie below their mean."""
        return 1.0 if self._is_full(epoch) else 1.0 - self.config.prune_ratio * _SHARE_BELOW_MEAN

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        return significance(logits, labels, loss_weight=1.0, entropy_weight=0.0)

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        losses = self.memory.significance
        is_seen = np.isfinite(losses)
        if self._is_full(epoch) or not is_seen.any():
            self._report = {"rate": 1.0, "rate_target": self.target_rate(epoch)}
            return Plan(order)
        # fsum rounds once whatever the order of its terms; NumPy's sum depends on the processor.
        mean = math.fsum(losses[is_seen].tolist()) / int(is_seen.sum())
        is_below = is_seen & (losses < mean)
        ratio = self.config.prune_ratio
        keep = ~(is_below & (uniform(np.arange(len(losses)), STREAM_KEEP, self.setup.seed, epoch) < ratio))
        weights = np.where(is_below, np.float32(1.0 / (1.0 - ratio)), np.float32(1.0))
        ids = order[keep[order]]
        if not len(ids):
            ids = order[:1]
        self._report = {
            "rate": len(ids) / len(order),
            "rate_target": self.target_rate(epoch),
            "threshold": mean,
            "scores_non_finite": float(self.memory.non_finite),
        }
        chances = np.where(is_below, np.float32(1.0 - ratio), np.float32(1.0))
        return Plan(ids, weights[ids], chances[ids])

    def _is_full(self, epoch: int) -> bool:
        return epoch == 0 or epoch >= math.floor(self.setup.epochs * (1.0 - self.config.infobatch_anneal_share))


class SelectiveBackprop(Policy):
    """Selective-Backprop (Jiang et al. 2019, arXiv:1910.00762).

    Every sample is forwarded for its loss; it is trained with the chance CDF(loss)^β (equation 1), where the CDF is
    that of the last `loss_history` losses (the paper's R), and chosen samples wait until they fill a batch
    (algorithm 1). β = 1 / target_rate - 1, so that the expected share is the target: the paper's selectivity of 1/3
    is β = 2. Scoring costs a third of a training step for every sample, so targets below that save little.

    The CDF is taken from the histogram of whole global batches, the newest ones that make up at least `loss_history`
    losses, one batch late; within a bin (4.4 % wide) it is interpolated.
    """

    takes_block_order = True

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.beta = 1.0 / setup.config.target_rate - 1.0
        self._epoch = 0
        self._batches: list[np.ndarray] = []

    def scores_epoch(self, epoch: int) -> bool:
        return True

    def target_rate(self, epoch: int) -> float:
        return self.config.target_rate

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        return significance(logits, labels, loss_weight=1.0, entropy_weight=0.0)

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        self._epoch = epoch
        self._report = {"rate_target": self.config.target_rate}
        return Plan(order)

    def select(self, ids: Tensor, scores: Tensor) -> Tensor:
        position = uniform_on_device(ids, STREAM_DITHER, self.setup.seed, self._epoch)
        chance = uniform_on_device(ids, STREAM_KEEP, self.setup.seed, self._epoch)
        if not self._batches:
            return weights_of(chance < self.config.target_rate)
        counts = np.sum(self._batches, axis=0)
        up_to = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
        cdf_at = upload(torch.from_numpy(up_to), scores.device)
        bins = bin_of(scores.nan_to_num(0.0).clamp_min(0.0))
        cdf = cdf_at[bins] + position * (cdf_at[bins + 1] - cdf_at[bins])
        return weights_of((chance < cdf**self.beta) | ~torch.isfinite(scores))

    def absorb(self, counts: Tensor) -> None:
        self._batches.append(counts.numpy()[:NUM_BINS].copy())
        # Whole batches leave once the rest still makes up the history; an all-NaN batch has no losses to offer.
        while len(self._batches) > 1 and sum(map(np.sum, self._batches[1:])) >= self.config.loss_history:
            self._batches.pop(0)
        if not sum(map(np.sum, self._batches)):
            self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        # No tensor without elements: checkpoints do not keep those.
        batches = {"batches": torch.from_numpy(np.stack(self._batches))} if self._batches else {}
        return {**super().state_dict(), "epoch": self._epoch, **batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._epoch = state["epoch"]
        self._batches = list(state["batches"].numpy().copy()) if "batches" in state else []
