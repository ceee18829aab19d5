"""Policies by name, and policies of the user's own by `module:Class`."""

import importlib

from ast_dist.errors import UserError
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
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise UserError(
            f"gate.policy is {name}, but {module_name} cannot be imported ({error}). Run where `python -c 'import "
            f"{module_name}'` works, for instance with its folder in PYTHONPATH."
        ) from None
    except AttributeError:
        raise UserError(f"gate.policy is {name}, but {module_name} has no {class_name}.") from None
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UserError(f"gate.policy is {name}, which is no subclass of ast_dist.gate.policy.Policy. Make it one.")
    return found


def make_policy(setup: PolicySetup) -> Policy:
    """Build the policy that `gate.policy` names. Raises UserError where there is no such policy."""
    return policy_class(setup.config.policy)(setup)
