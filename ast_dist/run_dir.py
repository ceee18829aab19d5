"""The run directory: whether this configuration may train here, and what stood here before."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ast_dist.config import Config, differences, to_dict
from ast_dist.errors import UserError
from ast_dist.fault.commit import committed

CONFIG_NAME = "config.yaml"
_PACKAGES = ("ast-dist", "torch", "torchvision", "numpy", "webdataset", "wandb", "nvidia-dali-cuda130")


def checkpoints_path(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def fingerprint(config: Config, manifests: dict[str, str]) -> dict[str, Any]:
    """What a run must not change between its sessions, as nested plain values.

    manifests: SHA-256 of each split's manifest, by split.
    """
    return {**to_dict(config), "manifest": manifests}


def check(config: Config, manifests: dict[str, str], restart: int) -> None:
    """Judge whether the run may start or go on in its directory. Changes nothing.

    restart: how often torchrun has restarted this job: a restarted worker goes on whatever --resume says.
    Raises UserError when the directory holds something else, another configuration, or nothing to resume from.
    """
    run_dir = Path(config.run_dir)
    config_path = run_dir / CONFIG_NAME
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: this is a file. Name a folder.")
    if not config_path.is_file():
        others = sorted(p.name for p in run_dir.iterdir() if not p.name.startswith(".")) if run_dir.is_dir() else []
        if others:
            raise UserError(
                f"--run-dir {run_dir}: holds {len(others)} other files or folders ({', '.join(others[:3])} …) and no "
                f"{CONFIG_NAME}. Name a new or an empty folder."
            )
        if config.resume == "must" and restart == 0:
            raise UserError(f"--resume must: {run_dir} holds no run. Check --run-dir, or use --resume auto.")
        return
    if config.resume == "never" and restart == 0:
        return
    if config.resume == "must" and restart == 0 and not committed(checkpoints_path(run_dir)):
        raise UserError(f"--resume must: {run_dir} holds no checkpoint. Use --resume auto to start from the beginning.")
    try:
        old = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{config_path}: cannot be read ({' '.join(str(error).split())}).") from None
    if not isinstance(old, dict):
        raise UserError(f"{config_path}: holds no configuration. Use another --run-dir, or --resume never.")
    changed = differences(old, fingerprint(config, manifests))
    if changed:
        raise UserError(
            f"{run_dir}: this run was made with another configuration ({'; '.join(changed)}). Use the old values to go "
            "on with it, another --run-dir for a new run, or --resume never to move it aside."
        )


def archive(run_dir: Path) -> Path:
    """Move a run aside, whole, and return where it is now."""
    run_dir = run_dir.resolve()  # `--run-dir .` has no name of its own
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    target = run_dir.with_name(f"{run_dir.name}.archived-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = run_dir.with_name(f"{run_dir.name}.archived-{stamp}-{number}")
    os.rename(run_dir, target)
    return target


def describe(config: Config, manifests: dict[str, str]) -> None:
    """Write config.yaml and env.json for this session, each in one step."""
    run_dir = Path(config.run_dir)
    text = yaml.safe_dump(fingerprint(config, manifests), sort_keys=False, allow_unicode=True)
    _replace(run_dir / CONFIG_NAME, text)
    _replace(run_dir / "env.json", json.dumps(environment(), indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Machine, Python and package versions, and the command line."""
    return {"machine": platform.platform(), "python": platform.python_version(), "argv": sys.argv, **versions()}


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
