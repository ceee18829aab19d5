"""What a save costs: how long training waits for it, and what it takes from the throughput in the background, too."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from ast_dist.config import ModelConfig
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import read
from ast_dist.model import build_model
from benchmarks.faults_peers import peer_optimizer
from benchmarks.faults_runs import Job, Training, our_tool, torchrun
from benchmarks.faults_torchvision import save_epoch

_FOREVER = 1_000_000
_EVERY_S = (120.0, 10.0)


def measure_saving(
    training: Training, folder: Path, *, epoch_steps: int, segment_s: float, pairs: int
) -> dict[str, Any]:
    """Train in segments of about segment_s, every other one of which begins with a save. Returns a row.

    stall_ms: how long the loop of rank 0 waits. total_ms: by how much the segment with a save takes longer than the
    mean of its neighbours without one; what threads do in the background is in it, as is the machine's noise, whose
    standard error is total_sem_ms. commit_s: from the stage folder's making to the rename. verify_s: hashing every
    file. load_s: verifying and reading all of it. epoch_steps: steps of an epoch. pairs: about so many saves.
    """

    def tool(save_steps: int, row_steps: int) -> Any:
        more = ("--checkpoint.every-steps", str(save_steps), "--track.every-steps", str(row_steps))
        return our_tool("ast_dist", lambda processes: torchrun(processes, 0), 0.0, *more, by_hand=False)

    with Job(tool(0, 1_000_000), training, folder / "pace", _FOREVER) as job:
        job.wait_for(lambda: job.steps_done() >= 3, "step 3")
        before, began = job.steps_done(), time.monotonic()
        job.let_run(max(segment_s, 2.0))
        steps_per_s = (job.steps_done() - before) / (time.monotonic() - began)
    # An epoch's end cuts into two segments, and some must be left.
    steps = max(1, min(round(segment_s * steps_per_s), epoch_steps // 6))
    with Job(tool(2 * steps, steps), training, folder / "run", _FOREVER) as job:
        # The first segment holds the start, and the last save needs a segment after it.
        commits = _watch_commits(job, round((2 * pairs + 2) * steps / (1.0 - 2.0 * steps / epoch_steps)))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    costs_ms, plain_ms = paired_costs_ms(rows, steps)
    stalls_ms = [row["perf/ckpt_stall_ms"] for row in rows if "perf/ckpt_stall_ms" in row]
    newest = commit.committed(folder / "run" / "checkpoints")[-1]
    if not costs_ms:
        raise RuntimeError(f"no segment of {steps} steps is whole, in epochs of {epoch_steps} steps")
    stall_ms, total_ms = statistics.median(stalls_ms), statistics.median(costs_ms)
    return {
        "tool": "ast_dist",
        "model": training.model,
        "checkpoint_mb": sum(file.stat().st_size for file in newest.iterdir()) / 1e6,
        "saves": len(costs_ms),
        "stall_ms": stall_ms,
        "stall_max_ms": max(stalls_ms),
        "total_ms": total_ms,
        "total_sem_ms": statistics.stdev(costs_ms) / len(costs_ms) ** 0.5 if len(costs_ms) > 1 else None,
        **_shares("stall_share", stall_ms),
        **_shares("total_share", total_ms),
        "commit_s": statistics.median(commits) if commits else None,
        "commit_max_s": max(commits) if commits else None,
        "verify_s": _median_s(lambda: commit.verify(newest)),
        "load_s": _median_s(lambda: read(newest)),
        "step_ms": statistics.median(plain_ms),
        "segment_steps": steps,
    }


def paired_costs_ms(rows: Sequence[dict[str, Any]], steps: int) -> tuple[list[float], list[float]]:
    """From a run's metrics: the extra milliseconds of each segment with a save, and a step's in those without.

    rows: of metrics.jsonl, a step row every `steps` steps, with a save after every second one. Segments that an epoch's
    end cuts into, and the ones after them, are left out: the epoch's own save is in those.
    """
    segment_ms: dict[int, float] = {}
    is_cut = False
    for row in rows:
        if row["kind"] == "epoch":
            is_cut = True
        elif is_cut:
            is_cut = False
        elif row["global_step"] > steps:
            segment_ms[row["global_step"]] = steps * row["perf/step_ms"]
    costs_ms = []
    for step, milliseconds in segment_ms.items():
        neighbours = [segment_ms[other] for other in (step - steps, step + steps) if other in segment_ms]
        if step % (2 * steps) == steps and neighbours:
            costs_ms.append(milliseconds - statistics.mean(neighbours))
    return costs_ms, [value / steps for step, value in segment_ms.items() if step % (2 * steps) == 0]


def peer_saving(model: str, width: int, num_classes: int, folder: Path, saves: int) -> list[dict[str, Any]]:
    """Rows of what the peers' saves take: training waits for all of it.

    torchvision's reference writes two files an epoch, Lightning's ModelCheckpoint its best one and last.ckpt.
    """
    network = build_model(ModelConfig(name=model, width=width), num_classes)
    optimizer = peer_optimizer(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0}
    plugin = TorchCheckpointIO()

    def save_lightning(_: int) -> None:
        for name in ("epoch=0-step=0.ckpt", "last.ckpt"):
            plugin.save_checkpoint(state, folder / name)

    ways = {
        "torchvision reference": (lambda number: save_epoch(state, folder, number % 2), "checkpoint.pth"),
        "Lightning": (save_lightning, "last.ckpt"),
    }
    rows = []
    for name, (save, file) in ways.items():
        seconds = []
        for number in range(saves + 1):
            began = time.perf_counter()
            save(number)
            seconds.append(time.perf_counter() - began)
        stall_ms = 1000.0 * statistics.median(seconds[1:])
        path = folder / file
        rows.append(
            {
                "tool": name,
                "model": model,
                "checkpoint_mb": path.stat().st_size / 1e6,
                "saves": saves,
                "stall_ms": stall_ms,
                "stall_max_ms": 1000.0 * max(seconds[1:]),
                "total_ms": stall_ms,
                **_shares("stall_share", stall_ms),
                **_shares("total_share", stall_ms),
                "commit_s": stall_ms / 1000.0,
                "load_s": _median_s(lambda path=path: torch.load(path, weights_only=True)),
            }
        )
    return rows


def _shares(name: str, milliseconds: float) -> dict[str, float]:
    return {f"{name}_{every_s:.0f}s": max(milliseconds, 0.0) / 1000.0 / every_s for every_s in _EVERY_S}


def _median_s(call: Any, times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _watch_commits(job: Job, last_step: int) -> list[float]:
    """Seconds from the making of each stage folder to the rename that commits it, until a step is done."""
    seconds: list[float] = []
    staged: dict[str, float] = {}
    checkpoints = job.run_dir / "checkpoints"

    def look() -> bool:
        now = time.monotonic()
        try:
            names = {path.name for path in checkpoints.iterdir()}
        except FileNotFoundError:
            names = set()
        for name in names:
            if name.startswith("stage-"):
                staged.setdefault(name.removeprefix("stage-"), now)
        for name in [name for name in staged if name in names]:
            seconds.append(now - staged.pop(name))
        return job.steps_done() > last_step

    job.wait_for(look, f"step {last_step}", 0.01)
    return seconds
