"""What a run trained, read from its checkpoints: weights, labels, preprocessing. Nothing in the run is changed."""

import argparse
import contextlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ast_dist import __version__
from ast_dist import run_dir as run_folder
from ast_dist.command_line import parse
from ast_dist.config import Config
from ast_dist.data.index import read_manifest
from ast_dist.errors import UserError
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import read

# A checkpoint that is pruned while it is read is no fault; one that is so this often in a row is.
_TRIES = 20


@dataclass(frozen=True)
class Weights:
    """What a run trained, and how: tensors by name, in the layout that a fresh model has, and what describes them.

    config: of the run. about: plain values: format_version, ast_dist (its version), architecture (name, norm,
    num_classes, …), classes, preprocessing, weights ("model" or "ema"), checkpoint, step, epoch, val_acc1 (percent, of
    these weights; None where they were not evaluated).
    """

    config: Config
    tensors: dict[str, Tensor]
    about: dict[str, Any]


def load_weights(run_dir: Path, checkpoint: str = "best", weights: str = "auto", train: Path | None = None) -> Weights:
    """Read what a run trained.

    checkpoint: best (by the accuracy of its better weights), last, or a name. A damaged one is passed over with a
    warning, in favour of the next best or the one before, unless it was named. weights: model, ema, or auto for the
    better of the two by that checkpoint's evaluation, and the average where they were not evaluated. train: folder of
    the training shards, for runs that have no classes.json.
    Raises UserError where there is no run, no such checkpoint, no sound one, or no average.
    """
    config, manifests = _read_config(run_dir)
    classes = _read_classes(run_dir, config, manifests["train"], train)
    state, path, manifest = _read_checkpoint(run_folder.checkpoints_path(run_dir), checkpoint)
    kept = {"model": state["model"], **({"ema": state["ema"]["model"]} if state.get("ema") else {})}
    scores: dict[str, float | None] = {"model": manifest.get("val_acc1"), "ema": manifest.get("val_ema_acc1")}
    if weights == "auto":
        known = {kind: score for kind, score in scores.items() if score is not None}
        # Reversed: of equals, and where neither was evaluated, the average.
        weights = max(reversed(kept), key=lambda kind: known.get(kind, -1.0))
    elif weights not in kept:
        raise UserError(f"--weights {weights}: {run_dir} keeps no average of its weights (optim.ema_decay is 0).")
    num_classes = config.model.num_classes or len(classes)
    model = {key: getattr(config.model, key) for key in ("name", "norm", "width", "stem_stride")}
    if config.model.name != "small_cnn":
        del model["width"], model["stem_stride"]
    about = {
        "format_version": 1,
        "ast_dist": __version__,
        "architecture": {**model, "num_classes": num_classes},
        "classes": classes,
        "preprocessing": preprocessing(config),
        "weights": weights,
        "checkpoint": path.name,
        "step": state["global_step"],
        "epoch": state["epoch"],
        "val_acc1": scores[weights],
    }
    return Weights(config, {name: tensor.contiguous() for name, tensor in kept[weights].items()}, about)


def preprocessing(config: Config) -> dict[str, Any]:
    """How an image becomes the model's input, as in validation: steps in this order, and their values."""
    data = config.data
    return {
        "steps": "decode to RGB, 8 bits; cut the central square of round(crop_ratio * short side) pixels, its top and "
        "left rounded down; resize it to image_size; divide by 255; subtract mean; divide by std",
        "image_size": data.image_size,
        "crop_ratio": data.val_crop_ratio,
        "interpolation": "bilinear",
        "antialias": True,
        "mean": list(data.mean),
        "std": list(data.std),
    }


def _read_config(run_dir: Path) -> tuple[Config, dict[str, str]]:
    """The run's configuration, and its splits' SHA-256."""
    path = run_dir / run_folder.CONFIG_NAME
    if not path.is_file():
        what = "holds no config.yaml, so it is no run" if run_dir.is_dir() else "no such folder"
        raise UserError(f"{run_dir}: {what}. Name the folder that --run-dir named.")
    config = parse(["--config", str(path)], "the run's configuration")
    return config, yaml.safe_load(path.read_text(encoding="utf-8")).get("manifest") or {"train": ""}


def _read_classes(run_dir: Path, config: Config, digest: str, train: Path | None) -> list[str]:
    """Names of the classes by number: from the run, or from the training shards, which must be the run's own."""
    path = run_dir / run_folder.CLASSES_NAME
    if path.is_file() and train is None:
        try:
            return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Remove it and add --data.train DIR.") from None
    if train is None:
        with contextlib.suppress(UserError):
            manifest, found = read_manifest(Path(config.data.train))
            if found == digest:
                return [str(name) for name in manifest["classes"]]
        raise UserError(
            f"{run_dir}: holds no {run_folder.CLASSES_NAME}, and {config.data.train} is not there or has changed. Add "
            "--data.train DIR, the folder of the shards that the run was trained on."
        )
    manifest, found = read_manifest(train)
    if found != digest:
        raise UserError(
            f"--data.train {train}: its manifest's SHA-256 is {found[:12]}…, but the run was trained on "
            f"{digest[:12]}…. Name the shards of that run."
        )
    return [str(name) for name in manifest["classes"]]


def _read_checkpoint(folder: Path, wanted: str) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """The state, path and manifest of the checkpoint that is wanted, or of the next sound one."""
    passed_over: set[str] = set()
    for _ in range(_TRIES):
        path = _choose(folder, wanted, passed_over)
        try:
            manifest = json.loads((path / commit.MANIFEST_NAME).read_text(encoding="utf-8"))
            return read(path)[0], path, manifest
        except (commit.DamagedCheckpointError, CheckpointException, OSError, ValueError, KeyError) as error:
            if not path.is_dir():
                continue  # the training pruned it meanwhile, and has newer ones
            reason = " ".join(str(error).split())
            if wanted not in ("best", "last"):
                raise UserError(f"{reason}. Use --checkpoint last, or another one.") from None
            passed_over.add(path.name)
            warnings.warn(f"{reason}; passed over, it stays where it is", RuntimeWarning, stacklevel=2)
    raise UserError(f"{folder}: {_TRIES} checkpoints could not be read. Try again, or --checkpoint last.")


def _choose(folder: Path, wanted: str, passed_over: set[str]) -> Path:
    """The checkpoint to read now. Raises UserError where there is none."""
    there = [path for path in commit.committed(folder) if path.name not in passed_over]
    if wanted not in ("best", "last"):
        if wanted not in [path.name for path in there]:
            names = ", ".join(path.name for path in there) or "none"
            raise UserError(f"--checkpoint {wanted}: {folder} has no such checkpoint. There are: {names}.")
        return folder / wanted
    if not there:
        why = f"none of {len(passed_over)} checkpoints is sound" if passed_over else "holds no checkpoint yet"
        raise UserError(f"{folder}: {why}. Train, or go on, until the first is saved.")
    best = commit.best(folder, passed_over) if wanted == "best" else None
    return folder / best if best else there[-1]


def described(about: dict[str, Any]) -> str:
    """Which weights these are, for a person."""
    kind = {"model": "weights", "ema": "averaged weights"}[about["weights"]]
    return f"{kind} of {about['checkpoint']} (epoch {about['epoch']})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def weights_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of command lines that say which weights of which run; it raises UserError."""
    parser = _Parser(prog=prog, allow_abbrev=False, description=description)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, as --run-dir named it")
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="the last step's weights, their moving average, or the better of the two on validation (default: auto)",
    )
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|last|NAME", help="of which checkpoint (default: best)"
    )
    return parser
