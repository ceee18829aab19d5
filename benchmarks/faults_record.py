"""What a training leaves for the benchmark of faults to read: steps done, starts, first steps, saves.

The files and their rows are those that ast_dist.train writes, so that all tools are measured by the same eyes.
"""

import hashlib
import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ast_dist import startup
from ast_dist.fault.lease import LEASE_NAME

SESSIONS_NAME = "sessions.jsonl"
END_NAME = "end.json"
_BEAT = struct.Struct("<qd")


class Record:
    """A peer's record; rank 0 keeps one. run_dir: made if it is not there."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._steps_before = read_beat(run_dir / LEASE_NAME)
        self._beat = os.open(run_dir / LEASE_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        self._is_first = True

    def started(self, step: int) -> None:
        """Note a start, once the state is loaded. step: steps done by it."""
        startup.note("loaded_s")
        repeated = max(0, self._steps_before - step)
        self._append({"resumed_from_step": step, "steps_repeated": repeated, "started": startup.parts()})

    def step_done(self, step: int) -> None:
        """Note that `step` steps are done."""
        os.pwrite(self._beat, _BEAT.pack(step, time.time()), 0)
        if self._is_first and self._steps_before:
            self._append({"event": "first_step", "first_step_s": round(startup.age_s(), 3)})
        self._is_first = False

    def saved(self, seconds: float) -> None:
        """Note a save that held up the training for so long."""
        self._append({"event": "save", "stall_s": seconds})

    def ended(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Note the end, and the SHA-256 of the final tensors."""
        content = {"steps": step, "sha256": hash_tensors(tensors)}
        (self._run_dir / END_NAME).write_text(json.dumps(content), encoding="utf-8")

    def _append(self, row: Mapping[str, Any]) -> None:
        with (self._run_dir / SESSIONS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_beat(path: Path) -> int:
    """Steps that a heartbeat states; 0 where there is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(_BEAT.size)
    except FileNotFoundError:
        return 0
    return int(_BEAT.unpack(raw)[0]) if len(raw) == _BEAT.size else 0


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
