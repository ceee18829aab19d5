"""CIFAR-10 on this machine's processes: `python -m benchmarks.cifar10 TRAIN VAL`.

Trains the preset cifar10 under torchrun, with and without the gate, and reads what the runs wrote to metrics.jsonl;
then measures the parts of the step alone. TRAIN and VAL are folders that data_prep.make_shards made of CIFAR-10.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ast_dist.arguments import parse_arguments
from ast_dist.data.index import Index
from ast_dist.errors import UserError, run_command
from benchmarks import tables
from benchmarks.result import RESULTS, ROOT, ResultFile


@dataclass(frozen=True)
class Arguments:
    """Measure training on CIFAR-10."""

    train: Positional[Path]
    """Folder of the training shards."""
    val: Positional[Path]
    """Folder of the validation shards."""
    epochs: int = 2
    """Epochs of full training; the first one decodes, later ones find images in memory. 0 leaves it out."""
    sundew_epochs: int = 4
    """Epochs of the run with the gate; 0 leaves it out."""
    processes: int = 2
    """Processes that train."""
    out: Path = RESULTS
    """Folder of the result file."""

    def __post_init__(self) -> None:
        for name in ("epochs", "sundew_epochs"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least 0.")
        if self.processes < 1:
            raise UserError(f"--processes is {self.processes}, but must be at least 1.")


def main(argv: list[str]) -> int:
    """Train, measure, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.cifar10")
    Index.open(arguments.train), Index.open(arguments.val)
    options = f"--epochs {arguments.epochs} --sundew-epochs {arguments.sundew_epochs} --processes {arguments.processes}"
    result = ResultFile(arguments.out / "cifar10.json", "cifar10", f"python -m benchmarks.cifar10 TRAIN VAL {options}")
    device = result.content["machine"]["gpu"] or "cpu"
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder) / "parts.json"
        _torchrun(arguments.processes, "benchmarks.cifar10_parts", str(parts), *_data(arguments))
        for row in json.loads(parts.read_text(encoding="utf-8")):
            _add(result, {"measure": "part", "device": device, **row})
        for policy, epochs in (("full", arguments.epochs), ("sundew", arguments.sundew_epochs)):
            if epochs:
                run = Path(folder) / policy
                _train(arguments, run, policy, epochs)
                for row in epoch_rows(run / "metrics.jsonl"):
                    about = {"device": device, "policy": policy, "processes": arguments.processes}
                    _add(result, {"measure": "epoch", **about, **row})
    print()
    print(tables.render_all(result.content))
    return 0


def epoch_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """What each epoch of a run did, from its metrics.jsonl.

    images_per_s and step_ms are medians over the intervals between step rows, data_wait is their mean: evaluation
    and checkpoints are in epoch_s alone. samples_read: images read from the shards and decoded, over all ranks.
    """
    intervals: list[dict[str, Any]] = []
    read_before = 0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "step":
            intervals.append(row)
            continue
        yield {
            "epoch": row["epoch"],
            "samples_trained": row["cost/samples_planned"],
            "samples_read": row["cost/session_samples_read"] - read_before,
            "images_per_s": statistics.median(interval["perf/images_per_s"] for interval in intervals),
            "step_ms": statistics.median(interval["perf/step_ms"] for interval in intervals),
            "data_wait": statistics.mean(interval["perf/data_wait"] for interval in intervals),
            "epoch_s": row["perf/epoch_s"],
            "total_s": row["time/total_s"],
            "acc1": row.get("val/acc1"),
            "flops_saved": row["cost/flops_saved"],
        }
        read_before = row["cost/session_samples_read"]
        intervals = []


def _train(arguments: Arguments, run_dir: Path, policy: str, epochs: int) -> None:
    train, val = _data(arguments)
    _torchrun(
        arguments.processes,
        "ast_dist.train",
        *("--preset", "cifar10", "--run-dir", str(run_dir), "--data.train", train, "--data.val", val),
        *("--gate.policy", policy, "--loop.epochs", str(epochs), "--track.no-dashboard"),
    )


def _data(arguments: Arguments) -> tuple[str, str]:
    return str(arguments.train.absolute()), str(arguments.val.absolute())


def _torchrun(processes: int, module: str, *arguments: str) -> None:
    """Run a module in processes of one host; its output goes to stderr, where it is seen and not taken for a result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-m", module, *arguments], cwd=ROOT, env=env, stdout=sys.stderr, check=True)


def _add(result: ResultFile, row: dict[str, Any]) -> None:
    # More than the processes measured here means that others were at work, too.
    result.add({**row, "load_1min": os.getloadavg()[0]})
    print("  ".join(f"{key}={value}" for key, value in result.rows[-1].items()), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
