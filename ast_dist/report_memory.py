"""The gate's memory in a run's newest checkpoint that verifies. The one part of the report that needs torch."""

from typing import Any

import numpy as np
import torch

from ast_dist.fault import contents
from ast_dist.fault.commit import DamagedCheckpointError, committed
from ast_dist.report_run import Run, as_number
from ast_dist.report_samples import Memory

_KEYS = ("significance", "visits", "last_epoch")


def read_memory(run: Run) -> tuple[Memory | None, int | None, list[str]]:
    """What the gate remembers, how many samples failed to decode so far, and what is to be said of the checkpoints.

    The newest checkpoint counts that verifies; nothing is quarantined. Both are None where no checkpoint does. The
    memory is None, too, where the policy keeps none.
    """
    said: list[str] = []
    for checkpoint in reversed(committed(run.folder / "checkpoints")):
        try:
            state, _ = contents.read(checkpoint)
        except (DamagedCheckpointError, OSError) as error:
            said.append(f"Checkpoint {checkpoint.name} cannot be read: {error}.")
            continue
        counts = state.get("counts")
        damaged = as_number(counts.get("damaged")) if isinstance(counts, dict) else None
        memory, why = _memory(run, checkpoint.name, state.get("gate"))
        return memory, None if damaged is None else int(damaged), [*said, *([why] if why else [])]
    said.append("There is no checkpoint that can be read, and so nothing is known of single samples.")
    return None, None, said


def _memory(run: Run, name: str, gate: Any) -> tuple[Memory | None, str]:
    """The memory in a gate's state, or None and why there is none."""
    if not isinstance(gate, dict) or not isinstance(gate.get("memory"), dict):
        policy = run.progress.get("policy") or run.setting("gate.policy") or "of this run"
        return None, f"The policy {policy} remembers nothing of single samples."
    significance, visits, last_epoch = (_array(gate["memory"].get(key)) for key in _KEYS)
    if significance is None or visits is None or last_epoch is None:
        return None, f"Checkpoint {name} holds a memory that lacks {', '.join(_KEYS)}."
    if not significance.size == visits.size == last_epoch.size:
        return (
            None,
            f"Checkpoint {name} holds {significance.size:,} scores, {visits.size:,} visits, {last_epoch.size:,} epochs",
        )
    tail = gate.get("hard_tail")
    streak = _array(tail.get("streak")) if isinstance(tail, dict) else None
    needed = as_number(run.setting("gate.hard_tail_visits"))
    if streak is None or needed is None or streak.size != significance.size:
        return Memory(name, significance, visits, last_epoch), ""
    return Memory(name, significance, visits, last_epoch, streak, streak >= needed), ""


def _array(value: Any) -> np.ndarray | None:
    """A tensor of one dimension as an array; None for anything else."""
    return value.numpy() if isinstance(value, torch.Tensor) and value.ndim == 1 and not value.is_complex() else None
