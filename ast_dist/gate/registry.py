"""Policies by name, and policies of the user's own by `module:Class`."""

import importlib

from ast_dist.errors import UserError, described
from ast_dist.gate.baselines import InfoBatch, Random, SelectiveBackprop, Short
from ast_dist.gate.policy import Full, Policy, PolicySetup
from ast_dist.gate.sundew import Online, Sundew

POLICIES: dict[str, type[Policy]] = {
    "sundew": Sundew,
    "online": Online,
    "full": Full,
    "short": Short,
    "random": Random,
    "infobatch": InfoBatch,
    "selective_backprop": SelectiveBackprop,
}


def policy_class(name: str) -> type[Policy]:
    """The class that `gate.policy` names.

    name: one of POLICIES or `module:Class`, the module importable from here. Raises UserError where the module or
    the class is not there or is no Policy.
    """
    if ":" not in name:
        return POLICIES[name]
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise UserError(
            f"gate.policy is {name}, but {module_name} cannot be imported ({described(error)}). Run where "
            f"`python -c 'import {module_name}'` works, for instance with its folder in PYTHONPATH."
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"gate.policy is {name}, but {module_name} has no {class_name}.")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UserError(f"gate.policy is {name}, which is no subclass of ast_dist.gate.policy.Policy. Make it one.")
    return found


def make_policy(setup: PolicySetup) -> Policy:
    """Build the policy that `gate.policy` names.

    Raises UserError where there is no such policy, or where one of the user's own cannot be built or states a number
    of epochs that is none.
    """
    kind = policy_class(setup.config.policy)
    try:
        policy = kind(setup)
        epochs = policy.epochs
    except Exception as error:
        if isinstance(error, UserError) or kind.__module__.startswith("ast_dist."):
            raise
        raise UserError(f"gate.policy is {setup.config.policy}, which cannot be built ({described(error)}).") from error
    if type(epochs) is not int or epochs < 1:
        raise UserError(f"gate.policy is {setup.config.policy}, whose epochs is {epochs!r}: give a whole number ≥ 1.")
    return policy
