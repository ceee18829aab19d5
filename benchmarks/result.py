"""Result files, benchmarks/results/NAME.json: written after every row, so that a run cut short leaves what it has.

    {"benchmark", "command", "commit", "date", "machine", "versions", "rows": […]}

One row is one line of a table; units stand in the keys. A row that was not measured says why under "skipped", one
that failed under "error".
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ast_dist
from ast_dist.data.index import replaced_file
from ast_dist.run_dir import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_MEASURED_CODE = ("ast_dist", "data_prep", "benchmarks/*.py")
_SIGNIFICANT_DIGITS = 4


class ResultFile:
    """One benchmark's result file.

    path: where it lands; its folder is made. benchmark: NAME. command: what was run, with words such as TRAIN in the
    place of folders. commit: what was measured; None asks git.
    """

    def __init__(self, path: Path, benchmark: str, command: str, commit: str | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "command": command,
            "commit": commit or git_commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": software(),
            "rows": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and replace the file in one step. Floats are kept to four significant digits."""
        self.rows.append({key: _rounded(value) for key, value in row.items()})
        self._write()

    def _write(self) -> None:
        head = json.dumps({key: value for key, value in self.content.items() if key != "rows"}, indent=1)
        rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in self.rows)
        text = head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'
        with replaced_file(self.path) as file:
            file.write(text.encode())


def load(path: Path) -> dict[str, Any]:
    """Read a result file. Raises OSError or ValueError when it cannot be read."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def measured(rows: Iterable[Mapping[str, Any]], measure: str) -> list[Mapping[str, Any]]:
    """The rows of one measure that hold figures: neither skipped nor failed."""
    return [row for row in rows if row["measure"] == measure and not {"skipped", "error"} & row.keys()]


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
    """The checkout's commit, with "+changes" where the measured code differs from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *_MEASURED_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
