"""Measure what a run trained: top-1, top-5 and loss on a split, exactly as training measures them.

Usage: `[torchrun --nproc_per_node=N -m | python -m] ast_dist.evaluate RUN [--data.val DIR]`
"""

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from ast_dist.config import Config
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.remote import open_index
from ast_dist.distributed import World
from ast_dist.errors import UserError, run_command
from ast_dist.model import Normalize, build_model
from ast_dist.step import TRAINING_DTYPES
from ast_dist.validation import evaluate
from ast_dist.weights import Weights, described, load_weights, weights_parser

PROG = "python -m ast_dist.evaluate"


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError, in one line, for what the user can mend."""
    parser = weights_parser(PROG, "Measure a run's weights on a split.")
    parser.add_argument("--data.val", dest="val", metavar="DIR", help="the split's shards (default: the run's own)")
    parser.add_argument(
        "--data.decoder", dest="decoder", choices=("auto", "dali", "torch"), default="auto", help="default: auto"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    found = parser.parse_args(list(argv))
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    weights = load_weights(found.run, found.checkpoint, found.weights)
    own = weights.config
    data = dataclasses.replace(own.data, val=found.val or own.data.val, decoder=found.decoder, cache="none")
    config = dataclasses.replace(own, data=data)
    val = open_index(data.val, data)
    check_split(val, weights)
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")  # rank 0 says the same
    world = World.start()
    try:
        if len(read := sorted(set(world.gather(weights.about["checkpoint"])))) > 1:
            raise UserError(f"{found.run}: processes read {' and '.join(read)}, since it is being trained. Try again.")
        scores, damaged = measure(config, weights, val, world)
    except BaseException:
        world.abandon()
        raise
    world.close()
    if world.is_main:
        for text in damaged:
            print(f"damaged sample left out: {text}", file=sys.stderr)
        show(scores, weights, val, as_json=found.json)
    return 0


def check_split(val: Index, weights: Weights) -> None:
    """Judge whether the split's labels mean what the model's outputs mean. Raises UserError where they do not."""
    ours, theirs = weights.about["classes"], [str(name) for name in val.manifest["classes"]]
    if val.num_samples == 0:
        raise UserError(f"--data.val {val.location}: holds no samples.")
    num_classes = weights.about["architecture"]["num_classes"]
    lowest, highest = int(val.label.min()), int(val.label.max())
    if lowest < 0 or highest >= num_classes:
        raise UserError(
            f"--data.val {val.location}: has labels {lowest} … {highest}, but the model has {num_classes} classes (0 … "
            f"{num_classes - 1}). Convert it with the training data's classes."
        )
    if ours != theirs:
        first = next((f"{a} and {b}" for a, b in zip(ours, theirs, strict=False) if a != b), "their numbers")
        raise UserError(
            f"--data.val {val.location}: has {len(theirs)} classes and the run {len(ours)}, and they differ first in "
            f"{first}: the same label would mean different things. Convert it with the training data's classes."
        )


def measure(config: Config, weights: Weights, val: Index, world: World) -> tuple[dict[str, float], list[str]]:
    """Evaluate on every sample of the split; all ranks must call. Returns what `validation.evaluate` does."""
    model = build_model(config.model, weights.about["architecture"]["num_classes"])
    model.load_state_dict(weights.tensors)
    loader = Loader(val, config.data, world.rank, world.size, world.local_size, world.device)
    try:
        dtype = TRAINING_DTYPES[config.loop.precision]
        return evaluate(
            model.to(world.device),
            loader,
            world,
            Normalize(config.data, world.device, config.model.channels_last),
            config.loop.global_batch_size,
            torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32),
        )
    finally:
        loader.close()


def show(scores: dict[str, float], weights: Weights, val: Index, as_json: bool) -> None:
    """Print the scores in one line."""
    if as_json:
        named = {key: weights.about[key] for key in ("weights", "checkpoint", "step", "epoch")}
        values = {key.removeprefix("val/"): value for key, value in scores.items()}
        print(json.dumps({**named, "samples": val.num_samples, **values}))
        return
    print(
        f"{described(weights.about)}: top-1 {scores['val/acc1']:.2f} %, top-5 {scores['val/acc5']:.2f} %, loss "
        f"{scores['val/loss']:.4f} on {val.num_samples:,} samples"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
