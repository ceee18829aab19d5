"""The run directory: whether this configuration may train here, and what stood here before."""

import json
import os
import platform
import socket
import sys
import uuid
import warnings
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ast_dist import outcome_file
from ast_dist.config import Config, differences, to_dict
from ast_dist.errors import UserError
from ast_dist.fault.commit import committed
from ast_dist.fault.lease import Lease, previous_launch
from ast_dist.track.history import read as read_rows
from ast_dist.track.progress import read_progress

CONFIG_NAME = "config.yaml"
CLASSES_NAME = "classes.json"
IDENTITY_NAME = "run_id"
_ASIDE = ".archived-"
# NFS gives a lost host's lock free after 90 s, and a watchdog ends a hung worker after 120 s.
_PREDECESSOR_PATIENCE_S = 180.0
_PACKAGES = ("ast-dist", "torch", "torchvision", "numpy", "webdataset", "wandb", "nvidia-dali-cuda130")


def checkpoints_path(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def fingerprint(config: Config, manifests: dict[str, str]) -> dict[str, Any]:
    """What a run must not change between its sessions, as nested plain values.

    manifests: SHA-256 of each split's manifest, by split.
    """
    return {**to_dict(config), "manifest": manifests}


def launch_id() -> str:
    """Who launched these processes: the same for all restarts by one torchrun, another for each start by a person.

    torchrun's count of restarts does not tell: a worker group that died before it took the run directory, or that
    was restarted because hosts came or went, has a count that says nothing about the directory.
    """
    env = os.environ
    if env.get(outcome_file.LAUNCH_VARIABLE):
        return env[outcome_file.LAUNCH_VARIABLE]  # said by who also restarts agents, or by a job of several hosts
    agent = agent_id()
    if agent is None:
        return uuid.uuid4().hex  # nobody restarts it: each start is a person's
    return agent if env.get("GROUP_WORLD_SIZE", "1") == "1" else f"torchrun {env['TORCHELASTIC_RUN_ID']}"


def agent_id() -> str | None:
    """The torchrun on this host that started this process, and no other one ever; None where none did."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{socket.gethostname()} {os.getppid()} {_started_at(os.getppid())}"


def _started_at(pid: int) -> str:
    """When a process started, in clock ticks since boot: process numbers are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return "?"


def check(config: Config, manifests: dict[str, str]) -> None:
    """Judge whether the run may start or go on in its directory. Changes nothing.

    A restart by the launcher that already took the directory goes on, whatever --resume says, unless the run ended by
    something that only a person can mend: torchrun restarts its processes after that, too.
    Raises UserError when the directory holds something else, another configuration, or nothing to resume from.
    """
    run_dir = Path(config.run_dir)
    is_restart = previous_launch(run_dir) == launch_id()
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
        if config.resume == "must" and not is_restart:
            raise UserError(f"--resume must: {run_dir} holds no run. Check --run-dir, or use --resume auto.")
        return
    if reason := _told_to_person(run_dir):
        raise UserError(reason)
    if config.resume == "never" and not is_restart:
        return
    if config.resume == "must" and not is_restart and not committed(checkpoints_path(run_dir)):
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


def _told_to_person(run_dir: Path) -> str | None:
    """Why the run ended under the agent that starts this process, where that was a UserError; None otherwise.

    Asked of the agent, not of the launch: a person who has mended it may use the job's name again.
    """
    try:
        progress = read_progress(run_dir)
    except UserError:
        return None
    agent = agent_id()
    is_same = agent is not None and progress.get("agent") == agent
    return str(progress["message"]) if progress.get("needs_person") and is_same else None


def rolled_back_epochs(run_dir: Path) -> set[int]:
    """Epochs in which the run went back to its last checkpoint because its loss was not finite."""
    rows = read_rows(run_dir / "sessions.jsonl")
    told = [row.get("epoch") for row in rows if row.get("event") == "rollback"]
    return {epoch for epoch in told if isinstance(epoch, int)}


def take(config: Config, manifests: dict[str, str], classes: list[str]) -> Lease:
    """Become the owner of the run directory, moving an old run aside where asked to, and describe this start there.

    Raises UserError when another process owns it, or when it cannot be written.
    """
    run_dir = Path(config.run_dir).resolve()  # a link stays, and `--run-dir .` gets a name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        is_restart = previous_launch(run_dir) == launch_id()
        # One that this one replaces may take a while to go: a worker that hangs, a host that a file server misses.
        lease = Lease(run_dir, launch_id(), patience_s=_PREDECESSOR_PATIENCE_S if is_restart else 0.5)
        if config.resume == "never" and not is_restart and (run_dir / CONFIG_NAME).is_file():
            aside = archive(run_dir)
            print(f"the run that stood in {run_dir} is now in {aside}", flush=True)
            lease.release()
            run_dir.mkdir()
            lease = Lease(run_dir, launch_id())
        describe(config, manifests, classes)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}). Name another folder.") from None
    return lease


def is_aside(name: str) -> bool:
    """Whether a folder of that name is a run that `archive` moved aside."""
    return _ASIDE in name


def archive(run_dir: Path) -> Path:
    """Move a run aside, whole, and return where it is now."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    target = run_dir.with_name(f"{run_dir.name}{_ASIDE}{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = run_dir.with_name(f"{run_dir.name}{_ASIDE}{stamp}-{number}")
    os.rename(run_dir, target)
    return target


def describe(config: Config, manifests: dict[str, str], classes: list[str]) -> None:
    """Write config.yaml, env.json and classes.json for this session, and run_id for all, each in one step.

    classes: names, by class number. They are kept with the run, since the shards may be gone when it is exported.
    """
    run_dir = Path(config.run_dir)
    changed = _changed_versions(run_dir / "env.json")
    if changed:
        message = f"{run_dir}: other versions than the run had before ({', '.join(changed)}): last bits may differ"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    text = yaml.safe_dump(fingerprint(config, manifests), sort_keys=False, allow_unicode=True)
    _replace(run_dir / CONFIG_NAME, text)
    _replace(run_dir / CLASSES_NAME, json.dumps(classes, indent=0, ensure_ascii=False) + "\n")
    _replace(run_dir / "env.json", json.dumps(environment(), indent=1) + "\n")
    if identity(run_dir) is None:
        _replace(run_dir / IDENTITY_NAME, f"{uuid.uuid4().hex}\n")


def identity(run_dir: Path) -> str | None:
    """What tells a run from others of the same configuration: copies have it, too, and a run begun anew has another.

    None where none was written.
    """
    try:
        return (run_dir / IDENTITY_NAME).read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def _changed_versions(env_path: Path) -> list[str]:
    """Packages whose version is not the one that env.json states; none where there is no such file."""
    try:
        before = json.loads(env_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    now = versions()
    return [f"{name} {before[name]} → {now[name]}" for name in now if name in before and before[name] != now[name]]


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
