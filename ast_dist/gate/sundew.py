"""The Sundew gate: one threshold, soft selection. From memory before an epoch, or on batches just scored."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.config import GateConfig
from ast_dist.counter_rng import STREAM_DITHER, STREAM_KEEP, uniform
from ast_dist.data.order import Plan, rank_share
from ast_dist.gate.draw import uniform_on_device
from ast_dist.gate.hard_tail import HardTail
from ast_dist.gate.policy import Policy, PolicySetup, RememberingPolicy, weights_of
from ast_dist.gate.threshold import FULL_WINDOW, Threshold, histogram


class TargetSchedule:
    """The target rate of every epoch: warm-up, a straight fall, annealing.

    The first `warmup_epochs` and the last `anneal_share` of the epochs train everything. Between them the rate falls
    by `rate_fall` in equal steps, with `target_rate` as its mean.
    """

    def __init__(self, config: GateConfig, epochs: int) -> None:
        self.config = config
        anneal_epochs = math.floor(config.anneal_share * epochs + 0.5)
        self._first = config.warmup_epochs
        self._last = epochs - anneal_epochs - 1

    def is_full(self, epoch: int) -> bool:
        """Whether an epoch trains on everything: warm-up, annealing, or a target of 1."""
        return not self._first <= epoch <= self._last or self.config.target_rate >= 1.0

    def target_rate(self, epoch: int) -> float:
        """Share of the samples that an epoch is meant to train."""
        if self.is_full(epoch):
            return 1.0
        done = (epoch - self._first) / (self._last - self._first) if self._last > self._first else 0.5
        return self.config.target_rate + self.config.rate_fall * (0.5 - done)


def rate_above(rate: float, p_min: float) -> float:
    """Share of the samples to keep for their score, so that a random share of the rest makes up `rate` in all."""
    return 1.0 if p_min >= 1.0 else max(0.0, (rate - p_min) / (1.0 - p_min))


class Sundew(RememberingPolicy):
    """Soft selection by remembered significance.

    Before an epoch every rank histograms its share of the remembered scores, the histograms are summed over the
    ranks, and one threshold follows. Samples at or above it are trained, and each sample below it with the chance
    `p_min`, so that nothing is forgotten for good. `TargetSchedule` says how much an epoch trains.

    The random share counts towards the target: with rate r and chance p the threshold lets (r - p) / (1 - p) pass.
    Samples never seen are kept with the rate as their chance, since nothing is known of them.

    Kept samples below the threshold weigh min(1 / p_min, `weight_cap`), the others 1. The default cap is 1:
    re-weighting by 1 / p_min in full was measured to cost 12 points of top-1 on CIFAR-10 (small CNN, 10 epochs, cost
    5.2: 67.6 against 79.5 without).

    `hard_tail_share` sets aside suspected wrong labels (see `HardTail`); `class_floor` keeps at least that share of
    the rate from every class, its most significant samples first.
    """

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.schedule = TargetSchedule(setup.config, setup.epochs)
        # A plan sees all that is remembered: there is no window to fill up with older scores.
        self.threshold = Threshold(min(1.0, setup.config.target_rate), ki=setup.config.ki, memory=0.0)
        self.hard_tail = HardTail(setup.num_samples, setup.config.hard_tail_share, setup.config.hard_tail_visits)

    def target_rate(self, epoch: int) -> float:
        return self.schedule.target_rate(epoch)

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        self.hard_tail.update(self.memory)
        if self.schedule.is_full(epoch):
            self._report = {"rate": 1.0, "rate_target": 1.0}
            return Plan(order)
        setup, config = self.setup, self.config
        rate = self.schedule.target_rate(epoch)
        scores = self.hard_tail.guarded(self.memory.significance)
        is_seen = np.isfinite(scores[order])
        chance = uniform(order, STREAM_KEEP, setup.seed, epoch)
        drawn_with = np.where(is_seen, config.p_min, rate)
        keep = chance < drawn_with
        is_hard = np.zeros(len(order), dtype=bool)
        report: dict[str, float] = {}
        # A target met by the random share alone leaves no room above the threshold.
        rate_hard = rate_above(rate, config.p_min)
        if rate_hard > 0 and is_seen.any():
            self.threshold.target_rate = rate_hard
            mine = rank_share(order[is_seen], setup.rank, setup.world_size)
            counts = histogram(torch.from_numpy(scores[mine]))
            self.threshold.update(setup.all_reduce(counts) if setup.all_reduce else counts)
            dither = torch.from_numpy(uniform(order, STREAM_DITHER, setup.seed, epoch))
            in_order = torch.from_numpy(scores[order])
            is_hard = is_seen & self.threshold.keep(in_order, dither).numpy()
            keep |= is_hard
            # Two draws that know nothing of each other: what neither keeps is left out.
            above = np.where(is_seen, self.threshold.chance(in_order).numpy(), 0.0)
            drawn_with = 1.0 - (1.0 - above) * (1.0 - drawn_with)
            self.threshold.integrate(float(is_hard[is_seen].mean()))
            report = {
                "threshold": self.threshold.threshold,
                "integral": self.threshold.integral,
                "error": self.threshold.error,
                "score_p50": self.threshold.median,
            }
        is_added = self._owed_to_classes(order, scores[order], keep, rate)
        if len(order) and not (keep | is_added).any():
            is_added[np.argmin(chance)] = True  # an epoch without a step would leave nothing to save or to resume from
        keep |= is_added
        self._report = {
            "rate": float(keep.mean()) if len(keep) else 0.0,
            "rate_target": rate,
            **report,
            "scores_non_finite": float(self.memory.non_finite),
            "hard_tail": float(self.hard_tail.num_suspects),
        }
        chances = None
        if len(order) and drawn_with.min() > 0.0:
            # Samples that the draws kept stand for the added ones, too.
            chances = np.where(is_added, 0.0, drawn_with).astype(np.float32)[keep]
        return Plan(order[keep], self._weights((is_hard | ~is_seen)[keep]), chances)

    def _weights(self, is_certain: np.ndarray) -> np.ndarray | None:
        """Loss weights of kept samples; None where all are 1. is_certain: those that chance did not decide."""
        if self.config.weight_cap <= 1.0 or self.config.p_min <= 0.0:
            return None
        weight = min(1.0 / self.config.p_min, self.config.weight_cap)
        return np.where(is_certain, np.float32(1.0), np.float32(weight))

    def _owed_to_classes(self, order: np.ndarray, scores: np.ndarray, keep: np.ndarray, rate: float) -> np.ndarray:
        """Samples to add so that no class falls below its floor. Returns (num_samples,) bool."""
        owed = np.zeros(len(order), dtype=bool)
        if self.config.class_floor <= 0.0 or self.setup.labels is None:
            return owed
        labels = self.setup.labels[order]
        sizes = np.bincount(labels)
        kept = np.bincount(labels[keep], minlength=len(sizes))
        missing = np.ceil(self.config.class_floor * rate * sizes - 1e-9).astype(np.int64) - kept
        for label in np.flatnonzero(missing > 0):
            left_out = np.flatnonzero((labels == label) & ~keep)
            hardest = np.argsort(-np.nan_to_num(scores[left_out], nan=0.0), kind="stable")
            owed[left_out[hardest[: missing[label]]]] = True
        return owed

    def state_dict(self) -> dict[str, Any]:
        parts = {"threshold": self.threshold.state_dict(), "hard_tail": self.hard_tail.state_dict()}
        return {**super().state_dict(), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.threshold.load_state_dict(state["threshold"])
        self.hard_tail.load_state_dict(state["hard_tail"])


# Share of the older scores that stay in the histogram online. A batch late, a batch's own chance can no longer be
# made up for, and the threshold should not add that of one other batch: with 0.5, the rate of a batch varies by a
# sixth less than with 0 (simulated: log-normal scores that fall by up to 5 % a batch, batches of 128 and 512, targets
# 0.1 and 0.4), and its mean stays within 0.8 % of the target; with 0.9 it lags, by 43 % at worst.
_MEMORY = 0.5


class Online(Policy):
    """Soft selection for streams that are seen once, by a scoring forward pass over each batch read.

    A batch's samples at or above the threshold are trained, and each below it with the chance `p_min`. The threshold
    follows from the histogram of the batches before, summed over the ranks while they trained. The scoring pass
    uses the model in evaluation mode, on `scoring_px` pixels where that is set: batch statistics stay as they are,
    and a sample's score does not depend on the rest of its batch, hence not on the number of ranks.

    Until the first histogram is there, samples are kept with the target rate as their chance.
    """

    takes_block_order = True

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.schedule = TargetSchedule(setup.config, setup.epochs)
        self.threshold = Threshold(min(1.0, setup.config.target_rate), ki=setup.config.ki)
        self._epoch = 0

    def target_rate(self, epoch: int) -> float:
        return self.schedule.target_rate(epoch)

    def scores_epoch(self, epoch: int) -> bool:
        return not self.schedule.is_full(epoch)

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        self._aim(epoch)
        if self.scores_epoch(epoch):
            self._report = {**self._report, "rate_target": self.schedule.target_rate(epoch)}
        else:
            self._report = {"rate": 1.0, "rate_target": 1.0}
        return Plan(order)

    def select(self, ids: Tensor, scores: Tensor) -> Tensor:
        chance = uniform_on_device(ids, STREAM_KEEP, self.setup.seed, self._epoch)
        if not self.threshold.steps:
            return weights_of(chance < self.schedule.target_rate(self._epoch))
        dither = uniform_on_device(ids, STREAM_DITHER, self.setup.seed, self._epoch)
        is_hard = self.threshold.keep(scores, dither)
        weights = weights_of(is_hard)
        if self.config.p_min <= 0.0:
            return weights
        easy = min(1.0 / self.config.p_min, max(1.0, self.config.weight_cap))
        return torch.where(is_hard | (chance >= self.config.p_min), weights, easy)

    def absorb(self, counts: Tensor) -> None:
        threshold, is_first = self.threshold, not self.threshold.steps
        # What these scores were selected with, not what they now lead to: the difference is what being late costs.
        rate = threshold.share_kept(counts)
        threshold.memory = max(_MEMORY, 1.0 - int(counts[:-1].sum()) / FULL_WINDOW)
        threshold.update(counts)
        if not is_first:
            threshold.integrate(rate)
        self._report = {
            **self._report,
            "threshold": threshold.threshold,
            "integral": threshold.integral,
            "error": threshold.error,
            "score_p50": threshold.median,
            "scores_non_finite": float(threshold.non_finite),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch": self._epoch, "threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._aim(state["epoch"])
        self.threshold.load_state_dict(state["threshold"])

    def _aim(self, epoch: int) -> None:
        """Set the threshold's target to an epoch's; a resume in mid-epoch does not plan it again."""
        self._epoch = epoch
        if self.scores_epoch(epoch):
            rate_hard = rate_above(self.schedule.target_rate(epoch), self.config.p_min)
            # A share of 0 has no quantile; the weakest gate that has one stands in for it.
            self.threshold.target_rate = max(rate_hard, 1e-6)
