"""Result files: what was measured, with what, where. Written in one step, so that a reader never sees a half.

    {"benchmark", "command", "commit", "date", "machine", "versions", "rows": […]}

One row is one line of a table; units stand in the keys.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ast_dist
from ast_dist.data.index import replaced_file
from ast_dist.run_dir import versions

CHECKOUT = Path(__file__).resolve().parents[1]
_MEASURED_CODE = ("ast_dist", "data_prep", "benchmarks/*.py")
_SIGNIFICANT_DIGITS = 4


def describe_result(benchmark: str, command: str, commit: str | None = None) -> dict[str, Any]:
    """A result file's content before its first row.

    command: what was run, with words such as TRAIN in the place of folders. commit: what was measured; None asks git.
    """
    return {
        "benchmark": benchmark,
        "command": command,
        "commit": commit or git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": software(),
        "rows": [],
    }


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a result file in one step. content: `describe_result`'s, with its rows; one row stands on one line."""
    head = json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in content["rows"])
    text = head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'
    with replaced_file(path) as file:
        file.write(text.encode())


def rounded(value: Any) -> Any:
    """A float, or a list of them, to four significant digits; anything else as it is."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(item) for item in value]
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """What the figures depend on: CPU model, cores this process may use, memory, GPUs. No names of hosts."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        }
    return found


def software() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, CUDA's among them where there is a GPU."""
    found = {"python": platform.python_version(), **versions(), "ast-dist": ast_dist.__version__}
    # The package's own metadata leaves out the local part that tells a CPU build from a CUDA one.
    found["torch"] = str(torch.__version__)
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" where the measured code differs from it; None outside a checkout.

    A package that is installed into somebody's own repository is not a checkout of this one.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != CHECKOUT:
            return None
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *_MEASURED_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
