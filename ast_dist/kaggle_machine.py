"""What a Kaggle session offers: its GPUs, its time, its folders and its secrets."""

import contextlib
import importlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ast_dist import doctor
from ast_dist.config import Config
from ast_dist.data.index import Index
from ast_dist.doctor_folders import Check
from ast_dist.errors import UserError
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.fault.processes import age_s
from ast_dist.kaggle_state import LONGEST_H

GPU_SETTING = "Settings → Accelerator → GPU T4 x2"
_SECRET_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Places:
    """The folders of a session. root: /kaggle, or a tree like it."""

    root: Path

    @property
    def inputs(self) -> Path:
        """What is attached, read-only."""
        return self.root / "input"

    @property
    def working(self) -> Path:
        """What a saved version keeps, up to 20 GB."""
        return self.root / "working"

    @property
    def temp(self) -> Path:
        """What ends with the session."""
        return self.root / "temp" / "ast_dist"

    @property
    def session_began(self) -> Path:
        """The file that remembers when the session began."""
        return self.temp / "session_began"

    def run_dir(self, name: str) -> Path:
        """The folder of a run."""
        return self.working / "runs" / name


def session_began(places: Places) -> float:
    """When this session began, seconds since 1970: AST_DIST_SESSION_BEGAN, else when its first kernel was started.

    A kernel that is restarted does not begin another session. The file that remembers the first one ends with the
    session; one that another machine, another boot or another day left is not believed. Raises UserError when the
    variable is no number.
    """
    stated = os.environ.get(BEGAN_VARIABLE)
    if stated is not None:
        try:
            return float(stated)
        except ValueError:
            raise UserError(f"{BEGAN_VARIABLE} is {stated!r}, but must be seconds since 1970, as `date +%s`.") from None
    began = time.time() - (age_s(os.getpid()) or 0.0)
    with contextlib.suppress(OSError, ValueError):
        noted, boot = places.session_began.read_text(encoding="utf-8").split()
        if boot == _boot() and time.time() - float(noted) < LONGEST_H * 3600:
            return min(began, float(noted))
    with contextlib.suppress(OSError):
        places.session_began.parent.mkdir(parents=True, exist_ok=True)
        places.session_began.write_text(f"{began:.3f} {_boot()}\n", encoding="utf-8")
    return began


def _boot() -> str:
    """This machine since it was started, in one word."""
    boot_id = "?"
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}/{boot_id}"


def probe_gpus() -> list[Check]:
    """Train a convolution on each GPU, in a process of its own; no findings where the machine has no NVIDIA driver."""
    signs = ("/proc/driver/nvidia/version", "/dev/nvidiactl")
    if not (shutil.which("nvidia-smi") or any(Path(sign).exists() for sign in signs)):
        return []
    checks = doctor.run_probe("cuda")
    if any(check.detail == doctor.NO_ANSWER for check in checks):
        checks = doctor.run_probe("cuda")  # the first import of torch on a new machine may take that long
    return checks


def usable_gpus(checks: Sequence[Check]) -> int:
    """How many GPUs can train. checks: as `probe_gpus` found them. Raises UserError where one is there and cannot."""
    for check in checks:
        if check.status == "ok":
            continue
        remedy = check.remedy[:1].upper() + check.remedy[1:] or "Run ast-dist doctor"
        if _is_gpu(check):
            remedy = f"Set {GPU_SETTING}, and run the cell again; or {check.remedy}"
        raise UserError(f"{check.detail}. {remedy}.")
    return sum(_is_gpu(check) for check in checks)


def _is_gpu(check: Check) -> bool:
    """Whether a finding is of one GPU, on which something was computed."""
    return check.name == "CUDA" and check.detail.startswith("GPU ")


def checkpoint_bytes(config: Config, train: Index) -> int:
    """About how large a checkpoint of a run will be: weights, optimizer, their average, and the gate's memory."""
    import torch  # the one thing here that needs it, where no checkpoint says its size

    from ast_dist.model import build_model

    num_classes = config.model.num_classes or train.num_classes
    try:
        with torch.device("meta"):
            model = build_model(config.model, num_classes)
    except NotImplementedError:
        model = build_model(config.model, num_classes)  # a few models (regnet) cannot be built without memory
    copies = {"sgd": 2, "adamw": 3}[config.optim.name] + (config.optim.ema_decay > 0)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return copies * weights + 16 * train.num_samples


def kaggle_secret(name: str, patience_s: float = _SECRET_PATIENCE_S) -> str | None:
    """A secret that is attached to this notebook; None without one, outside of Kaggle, or when nobody answers."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # no such secret, no internet: the training goes on without
            found.append(str(importlib.import_module("kaggle_secrets").UserSecretsClient().get_secret(name)))

    thread = threading.Thread(target=ask, name="secret", daemon=True)
    thread.start()
    thread.join(patience_s)
    return found[0] if found else None
