"""The last words of a session: how it ended, what was saved and spent, where everything is, what to type next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_dist.track.command import typed_command
from ast_dist.track.progress import duration, sessions_left_text, time_left_text

_FILES = ("metrics.jsonl", "STATUS.txt", "dashboard.png", "checkpoints")


def summary(run_dir: Path, progress: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, str]:
    """What the console shows at the end, by name.

    progress: as in progress.json. costs: the run's last row, for what it skipped, saved and spent: three figures that
    stand apart, and what was not measured is said to be so.
    """
    state, message, run = str(progress["state"]), progress.get("message"), shlex.quote(str(run_dir))
    scores = ((name, progress.get(f"{name}_acc1")) for name in ("best", "last"))
    left = ", ".join(filter(None, (time_left_text(progress), sessions_left_text(progress))))
    told = {
        "state": f"{state} after {duration(progress.get('total_s'))}" + (f": {message}" if message else ""),
        "left": left if state != "finished" else "",
        "val top-1": ", ".join(f"{name} {acc1:.2f} %" for name, acc1 in scores if acc1 is not None) or "not measured",
        "samples skipped": _figure(costs, "cost/samples_skipped", "{:,.0f}"),
        "FLOPs saved": _figure(costs, "cost/flops_saved", "{:.1%}").replace("%", " %"),
        "GPU joules": _figure(costs, "cost/gpu_joules", "{:,.0f}"),
        "files": ", ".join(f"{run_dir / name}" for name in _FILES if (run_dir / name).exists()),
        "look": f"python -m ast_dist.status {run}",
        "report": f"python -m ast_dist.report {run}",
    }
    if progress.get("checkpoint"):
        told["evaluate"] = f"python -m ast_dist.evaluate {run}"
        told["export"] = f"python -m ast_dist.export {run} --to {shlex.quote(str(run_dir / 'model.safetensors'))}"
    if state != "finished":
        first = "mend it, then " if progress.get("needs_person") else ""
        told["go on"] = first + (typed_command() or "the same call again")
    return {name: text for name, text in told.items() if text}


def _figure(costs: Mapping[str, Any], key: str, form: str) -> str:
    value = costs.get(key)
    return "not measured" if value is None else form.format(value)
