"""What a policy must be told so that its run costs a given share of full training.

Cost is counted in epochs of full training: forward, backward, and whatever scoring a policy does. Every policy
predicts its own, epoch by epoch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ast_dist.config import Config, GateConfig
from ast_dist.errors import UserError
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.registry import make_policy

# Policies whose saving follows from a number of their paper, not from a target: they meet a budget by the length of
# the run. Selectivity 1/3 is what Jiang et al. 2019 (arXiv:1910.00762), section 4, recommend; InfoBatch's prune ratio
# of 1/2 (Qin et al. 2024, arXiv:2303.04947, section 4.1) is gate.prune_ratio's default.
_FIXED_RATE: dict[str, tuple[str, ...]] = {
    "infobatch": (),
    "selective_backprop": ("--gate.target-rate", "0.333333"),
}
_LOWEST_TARGET = 1e-4
_BISECTIONS = 40  # halvings of an interval of 1: far below the six digits that are passed on


@dataclass(frozen=True)
class Prediction:
    """What a run will be: its epochs, the lowest target rate of one of them, its cost in epochs of full training."""

    epochs: int
    target_rate: float
    cost: float


def predict(config: Config, num_samples: int = 1) -> Prediction:
    """Ask a run's policy what it will do. Raises UserError where the policy does not exist."""
    # Costs are asked for before any data is opened: labels that are all 0 stand in for the set's.
    setup = PolicySetup.of_run(config, num_samples, np.zeros(num_samples, dtype=np.int64))
    policy = make_policy(setup)
    cost = sum(policy.cost(epoch) for epoch in range(policy.epochs))
    # What short leaves out of its last epoch is the end of the run, not a selection.
    is_gated = config.gate.policy not in ("full", "short")
    lowest = min(policy.target_rate(epoch) for epoch in range(policy.epochs)) if is_gated else 1.0
    return Prediction(policy.epochs, lowest, cost)


def settings_at_cost(policy: str, share: float, config: Config, num_samples: int = 1) -> list[str]:
    """Arguments for the training command, so that a policy's run costs `share` of full training's.

    policy: a name, or pkg.mod:Class. share: in (0, 1]. config: of full training; its loop.epochs is what the share
    is of. num_samples: of the training set.

    short shortens the run itself. infobatch and selective_backprop keep their papers' numbers and get the number of
    epochs whose cost is nearest. random keeps the epochs, and its rate is the share. All others (sundew, online,
    your own) run for the number of epochs at which the gate.target_rate that meets the budget is nearest to the
    configuration's. A policy whose cost does not depend on gate.target_rate gets the nearest number of epochs.
    Raises UserError, with both numbers, when the budget cannot be met.
    """
    chosen = ["--gate.policy", policy]
    if policy == "full":
        return chosen
    if policy == "short":
        return [*chosen, "--gate.target-rate", f"{share:.6g}"]
    budget = share * config.loop.epochs
    if policy in _FIXED_RATE:
        fixed = _FIXED_RATE[policy]
        gate = {"target_rate": float(fixed[1])} if fixed else {}
        epochs = _nearest_epochs(_with_gate(config, policy=policy, **gate), budget, num_samples)
        return [*chosen, *fixed, "--loop.epochs", str(epochs)]
    if policy == "random":
        return [*chosen, "--gate.target-rate", f"{_target_at(config, policy, budget, num_samples):.6g}"]
    one_cost, other_cost = (
        predict(_with_gate(config, policy=policy, target_rate=rate, p_min=0.0, rate_fall=0.0), num_samples).cost
        for rate in (0.4, 0.6)
    )
    if one_cost == other_cost:  # a policy of the user's own that has its own rate
        own = _with_gate(config, policy=policy)
        return [*chosen, "--loop.epochs", str(_nearest_epochs(own, budget, num_samples))]
    epochs, target = _nearest_target(policy, config, budget, num_samples)
    return [*chosen, "--loop.epochs", str(epochs), "--gate.target-rate", f"{target:.6g}"]


def _with_gate(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, gate=dataclasses.replace(config.gate, **changes))


def _with_epochs(config: Config, epochs: int) -> Config:
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=epochs))


def _nearest_target(policy: str, config: Config, budget: float, num_samples: int) -> tuple[int, float]:
    """Epochs and target rate that meet the budget, the rate nearest to the configuration's."""
    found = []
    refusal: UserError | None = None
    for epochs in range(config.loop.epochs, 0, -1):
        try:
            found.append((epochs, _target_at(_with_epochs(config, epochs), policy, budget, num_samples)))
        except UserError as error:
            refusal = error  # the last is of the shortest run, the cheapest there is
    if not found:
        assert refusal is not None
        raise refusal
    return min(found, key=lambda pair: abs(pair[1] - config.gate.target_rate))


def _target_at(config: Config, policy: str, budget: float, num_samples: int) -> float:
    """The target rate at which a run of all epochs costs the budget, by bisection."""

    def cost(target: float) -> float:
        return predict(_with_gate(config, policy=policy, target_rate=target), num_samples).cost

    low, high = _target_bounds(policy, config.gate)
    for end, is_met in ((low, cost(low) <= budget + 1e-6), (high, cost(high) >= budget - 1e-6)):
        if not is_met:
            which = "lowest" if end == low else "highest"
            raise UserError(
                f"{policy}: a budget of {budget:g} of {config.loop.epochs} epochs cannot be met: at gate.target_rate "
                f"{end:g}, the {which} allowed, it costs {cost(end):.4g}. Choose other --rates, or change gate.p_min, "
                "gate.warmup_epochs or gate.anneal_share."
            )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _target_bounds(policy: str, gate: GateConfig) -> tuple[float, float]:
    """The lowest and the highest gate.target_rate that the configuration allows a policy."""
    fall = abs(gate.rate_fall) / 2
    has_random_share = policy in ("sundew", "online")
    return max(_LOWEST_TARGET, gate.p_min if has_random_share else 0.0) + fall, 1.0 - fall


def _nearest_epochs(config: Config, budget: float, num_samples: int) -> int:
    """The number of epochs whose predicted cost is nearest to the budget; of two as near the larger, which favours
    the opponent."""

    def cost(epochs: int) -> float:
        return predict(_with_epochs(config, epochs), num_samples).cost

    if cost(1) >= 2 * budget:  # not training at all would be as near
        raise UserError(
            f"{config.gate.policy}: a budget of {budget:g} epochs cannot be met: a single epoch costs {cost(1):.4g}. "
            "Raise --rates or --loop.epochs."
        )
    enough = 1
    while cost(enough) < budget:
        enough += 1
    return min(enough, max(1, enough - 1), key=lambda epochs: round(abs(cost(epochs) - budget), 6))
