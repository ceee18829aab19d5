"""What is judged before anything is written: configuration and data against each other."""

import dataclasses

import torch

from ast_dist.config import Config
from ast_dist.data.cache import make_cache
from ast_dist.data.decoder import make_decoder
from ast_dist.data.index import Index
from ast_dist.data.order import LARGEST_WHOLE_ORDER, Orders
from ast_dist.errors import UserError
from ast_dist.gate.policy import PolicySetup, checked_plan
from ast_dist.gate.registry import make_policy
from ast_dist.model import build_model
from ast_dist.track.callbacks import load

_BLOCK_SHARDS = 8


def with_block_shards(config: Config, train: Index) -> Config:
    """The configuration with `data.shuffle_block_shards` settled: a run's record must hold what it trains by."""
    if config.data.shuffle_block_shards >= 0:
        return config
    needs_blocks = train.is_remote or train.num_samples > LARGEST_WHOLE_ORDER
    data = dataclasses.replace(config.data, shuffle_block_shards=_BLOCK_SHARDS if needs_blocks else 0)
    return dataclasses.replace(config, data=data)


def check_data(config: Config, train: Index, val: Index, world_size: int) -> int:
    """Judge configuration and data against each other; return the number of classes.

    Raises UserError for a global batch smaller than the world, labels outside the model's classes, splits whose
    classes differ, a policy that cannot be imported or does not plan, or a model that does not exist or does not take
    images of this size.
    """
    if config.loop.global_batch_size < world_size:
        raise UserError(
            f"loop.global_batch_size is {config.loop.global_batch_size}, but there are {world_size} processes. "
            f"Raise it to at least {world_size} or start fewer processes."
        )
    num_classes = config.model.num_classes or train.num_classes
    for name, index in (("train", train), ("val", val)):
        if index.num_samples == 0:
            raise UserError(f"--data.{name} {index.location}: holds no samples.")
        lowest, highest = int(index.label.argmin()), int(index.label.argmax())
        worst = lowest if index.label[lowest] < 0 else highest
        label = int(index.label[worst])
        if not 0 <= label < num_classes:
            raise UserError(
                f"--data.{name} {index.location}: sample {index.key(worst)} has label {label}, but the model has "
                f"{num_classes} classes (0 … {num_classes - 1}). Set --model.num-classes {index.num_classes} or 0."
            )
        cache = make_cache(index, config.data)  # raises where the set does not fit; memory is reserved, not taken
        if config.data.decoder == "dali":
            make_decoder(config.data, torch.device("cpu"), 1, keeps_whole=cache is not None).close()
    if train.manifest["classes"] != val.manifest["classes"]:
        pairs = zip(train.manifest["classes"], val.manifest["classes"], strict=False)
        first = next((f"{a} and {b}" for a, b in pairs if a != b), "their numbers")
        raise UserError(
            f"--data.train has {train.num_classes} classes and --data.val {val.num_classes}, and they differ first in "
            f"{first}: the same label would mean different things. Convert both from one source."
        )
    if config.loop.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("loop.precision is fp16, which is for GPUs, and torch sees none. Use bf16 or fp32.")
    policy = make_policy(PolicySetup.of_run(config, train.num_samples, train.label))
    if ":" in config.gate.policy:  # ours are tested; one of the user's own is tried before anything is written
        checked_plan(policy, 0, Orders(train.shard_sizes, config.seed, config.data.shuffle_block_shards).of(0))
    _check_model(config, num_classes)
    return num_classes


def check_callbacks(config: Config, rank: int) -> None:
    """Run the user's file of callbacks where it will be called. Raises UserError where it has no such functions."""
    if config.track.callbacks and rank == 0:
        load(config.track.callbacks)


def _check_model(config: Config, num_classes: int) -> None:
    """Build the model and pass two images through it, both without memory or arithmetic (torch's meta device)."""
    kind = config.model
    sizes = {"data.image_size": config.data.image_size}
    if config.gate.scoring_px:
        sizes["gate.scoring_px"] = config.gate.scoring_px
    if kind.norm == "sync" and not torch.cuda.is_available():
        raise UserError("model.norm is sync, which works on GPUs only, and torch sees none. Use batch or group.")
    for name, size in sizes.items():
        try:
            with torch.device("meta"), torch.no_grad():
                build_model(kind, num_classes)(torch.empty(2, 3, size, size))
        except NotImplementedError:
            return  # a few models (regnet) cannot be built without memory; the first step will tell
        except UserError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"model.name is {kind.name}, which does not take images of {name} {size} "
                f"({str(error).splitlines()[0].rstrip('.!')}). Change one of the two."
            ) from None


def print_dry_run(config: Config, train: Index, val: Index) -> None:
    """Say what a run would do."""
    policy = make_policy(PolicySetup.of_run(config, train.num_samples, train.label))
    rates = [policy.target_rate(epoch) for epoch in range(policy.epochs)]
    trained = round(sum(rates) * train.num_samples)
    full = config.loop.epochs * train.num_samples
    print(f"train      {train.num_samples:,} samples, {train.num_classes} classes, {train.location}")
    print(f"val        {val.num_samples:,} samples, {val.location}")
    print(f"policy     {config.gate.policy}: about {trained:,} of {full:,} samples trained ({trained / full:.0%})")
    cost = sum(policy.cost(epoch) for epoch in range(policy.epochs))
    print(f"cost       about {cost:.2f} epochs of full training, in {policy.epochs} epochs")
    print(f"steps      about {trained // config.loop.global_batch_size:,} of {config.loop.global_batch_size} samples")
    print("dry run: nothing was written")


def check_decoders(wanted: str, names: list[str]) -> None:
    """Raise UserError where the processes would decode by different libraries. names: by rank; wanted: the setting."""
    if len(set(names)) > 1:
        raise UserError(
            f"data.decoder {wanted}: the processes would decode by {', '.join(names)} (in order of rank), whose pixels "
            "and damage may differ. Install DALI on every host, or use --data.decoder torch."
        )
