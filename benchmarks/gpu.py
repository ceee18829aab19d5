"""What a machine with a GPU does with this package: `python -m benchmarks.gpu`.

Measures at world size 1 under NCCL, most worth knowing first, and leaves out what no longer fits into the budget:
the training step alone, exact resume, a checkpoint's stall, training from shards, decoding on the GPU, other batch
sizes, compiled, the gate's work per epoch. Needs no network and no data. Rows land in DIR/gpu.json as they are
measured; tables come last.

On a CPU, or with --toy, the same runs at toy size as a test of itself, into DIR/gpu-toy.json: its figures mean nothing.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ast_dist.arguments import parse_arguments
from ast_dist.data.index import Index
from ast_dist.distributed import World
from ast_dist.errors import UserError, run_command
from benchmarks import tables
from benchmarks.checkpoint_stall import checkpoint_stall
from benchmarks.end_to_end import end_to_end
from benchmarks.exact_resume import exact_resume
from benchmarks.gpu_loader import WAYS, Way, gpu_loader
from benchmarks.images import make_shard_set
from benchmarks.result import RESULTS, ResultFile, measured
from benchmarks.timing import copy_gb_per_s, datasheet_tflops, matmul_tflops
from benchmarks.training_step import Peak, Workload, gate_per_epoch, training_step

# A task is begun when its expected time fits so many times into what is left.
_MARGIN = 1.3


@dataclass(frozen=True)
class Arguments:
    """Measure what a GPU does with this package."""

    budget_minutes: float = 0.0
    """Minutes in all; what does not fit is left out. 0 takes 9, or 1 at toy size."""
    out: Path = RESULTS
    """Folder of the result file."""
    toy: bool = False
    """Toy size, as on a CPU."""
    compiled: bool = True
    """Measure the compiled step, too."""
    commit: str | None = None
    """What is measured, where this folder is no git checkout."""

    def __post_init__(self) -> None:
        if self.budget_minutes < 0:
            raise UserError(f"--budget-minutes is {self.budget_minutes:g}, but must be at least 0 (0 = the default).")


@dataclass(frozen=True)
class Scale:
    """Sizes, and how many seconds each task takes at most, until one of its kind was measured.

    batch_sizes: the first is the one that everything but the training step uses, too.
    """

    budget_minutes: float
    workload: Workload
    batch_sizes: tuple[int, ...]
    target_s: float
    images: int
    image_size: tuple[int, int]
    resume_batch: int
    observed_steps: int
    saves: int
    expected_s: Mapping[str, float]


_GPU = Scale(
    budget_minutes=9.0,
    workload=Workload("resnet50", 224, 1000, 1_281_167),
    batch_sizes=(256, 128, 512),
    target_s=8.0,
    images=448,
    image_size=(375, 500),
    resume_batch=64,
    observed_steps=100,
    saves=7,
    expected_s={"ceilings": 20, "training_step": 45, "exact_resume": 120, "checkpoint_stall": 40, "end_to_end": 60}
    | {"compiled": 150, "gate_per_epoch": 15, "gpu_loader": 25},
)
_TOY = Scale(
    budget_minutes=1.0,
    workload=Workload("small_cnn", 32, 10, 4000, width=8),
    batch_sizes=(32, 16),
    target_s=0.2,
    images=256,
    image_size=(36, 48),
    resume_batch=32,
    observed_steps=5,
    saves=3,
    expected_s={"ceilings": 3, "training_step": 2, "exact_resume": 15, "checkpoint_stall": 3, "end_to_end": 5}
    | {"compiled": 45, "gate_per_epoch": 1, "gpu_loader": 5},
)


class Budget:
    """The time there is, and whether a task still fits."""

    def __init__(self, seconds: float, expected_s: Mapping[str, float]) -> None:
        self._end = time.monotonic() + seconds
        self._expected_s = dict(expected_s)
        self._is_measured: set[str] = set()

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return max(self._end - time.monotonic(), 0.0)

    def shortage(self, kind: str, factor: float) -> str | None:
        """Why a task of `factor` times its kind's size is left out, or None where it fits."""
        needed = self._expected_s[kind] * factor * (_MARGIN if kind in self._is_measured else 1.0)
        return f"needs about {needed:.0f} s, {self.left_s:.0f} s left" if needed > self.left_s else None

    def took(self, kind: str, factor: float, seconds: float) -> None:
        """Note how long a task took: the next one of its kind is expected to take as long."""
        before = self._expected_s[kind] if kind in self._is_measured else 0.0
        self._expected_s[kind] = max(seconds / factor, before)
        self._is_measured.add(kind)


@dataclass(frozen=True)
class Task:
    """One row to measure. kind: what it is timed as. factor: its size relative to the kind's first task."""

    measure: str
    run: Callable[[], dict[str, Any]]
    about: dict[str, Any]
    kind: str = ""
    factor: float = 1.0


class Bench:
    """All tasks of one machine, in order of worth."""

    def __init__(self, world: World, scale: Scale, budget: Budget, folder: Path) -> None:
        self.world = world
        self.scale = scale
        self.budget = budget
        self.folder = folder
        self.peak = Peak(0.0, "none")
        # Of the first training step that was measured: what a loader has to outrun.
        self.training_images_per_s: float | None = None
        self._shards: tuple[Index, Index] | None = None

    def tasks(self) -> list[Task]:
        """The tasks, most worth knowing first."""
        first, *others = self.scale.batch_sizes
        return [
            Task("ceilings", self._ceilings, {}),
            self._step_task(first),
            Task("exact_resume", self._exact_resume, {"model": self.scale.workload.model}),
            Task("checkpoint_stall", self._checkpoint_stall, {"model": self.scale.workload.model}),
            Task("end_to_end", self._end_to_end, {"model": self.scale.workload.model, "batch_size": first}),
            *(self._loader_task(way, first) for way in WAYS),
            *(self._step_task(batch_size) for batch_size in others),
            Task("gate_per_epoch", self._gate_per_epoch, {}),
            self._step_task(first, compiled=True),
        ]

    def _step_task(self, batch_size: int, *, compiled: bool = False) -> Task:
        scale = self.scale

        def run() -> dict[str, Any]:
            row = training_step(
                self.world, scale.workload, batch_size, compiled=compiled, peak=self.peak, target_s=scale.target_s
            )
            if self.training_images_per_s is None:
                self.training_images_per_s = row["images_per_s"]
            return row

        about = {"model": scale.workload.model, "batch_size": batch_size, "compiled": compiled}
        kind = "compiled" if compiled else "training_step"
        return Task("training_step", run, about, kind, max(1.0, batch_size / scale.batch_sizes[0]))

    def _loader_task(self, way: Way, batch_size: int) -> Task:
        def run() -> dict[str, Any]:
            return gpu_loader(
                self.world.device,
                way,
                self._shard_set()[0],
                batch_size=batch_size,
                image_px=self.scale.workload.image_px,
                target_s=self.scale.target_s,
                training_images_per_s=self.training_images_per_s,
            )

        return Task("gpu_loader", run, {"way": way.name, "cores": way.cores, "batch_size": batch_size})

    def _ceilings(self) -> dict[str, Any]:
        measured_tflops = matmul_tflops(self.world.device)
        stated = datasheet_tflops(device_name(self.world)) if self.world.device.type == "cuda" else None
        self.peak = Peak(stated, "datasheet, dense bf16") if stated else Peak(measured_tflops, "matmul measured here")
        return {
            "matmul_bf16_tflops": measured_tflops,
            "copy_gb_per_s": copy_gb_per_s(self.world.device),
            "peak_tflops": self.peak.tflops,
            "peak_source": self.peak.source,
        }

    def _exact_resume(self) -> dict[str, Any]:
        train, val = self._shard_set()
        folder = self.folder / "resume"
        folder.mkdir()
        return exact_resume(
            folder, self.scale.workload, train, val, self.scale.resume_batch, timeout_s=self.budget.left_s
        )

    def _checkpoint_stall(self) -> dict[str, Any]:
        scale = self.scale
        return checkpoint_stall(
            self.world,
            scale.workload,
            self.folder / "checkpoints",
            scale.batch_sizes[0],
            observed_steps=scale.observed_steps,
            saves=scale.saves,
        )

    def _end_to_end(self) -> dict[str, Any]:
        train, _ = self._shard_set()
        scale = self.scale
        return end_to_end(self.world, scale.workload, train, scale.batch_sizes[0], 2 * scale.target_s)

    def _gate_per_epoch(self) -> dict[str, Any]:
        return gate_per_epoch(self.scale.workload.num_samples)

    def _shard_set(self) -> tuple[Index, Index]:
        """Shards of made-up JPEGs; the classes are few, whatever the model's head has."""
        if self._shards is None:
            height, width = self.scale.image_size
            self._shards = make_shard_set(self.folder / "data", self.scale.images, height, width, num_classes=10)
        return self._shards


def main(argv: list[str]) -> int:
    """Measure, write, print. Returns 0, or 1 when a task failed or a resumed run was not identical."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.gpu")
    torch.backends.cudnn.benchmark = True
    world = World.start()
    is_toy = arguments.toy or world.device.type == "cpu"
    scale = _TOY if is_toy else _GPU
    budget = Budget(60.0 * (arguments.budget_minutes or scale.budget_minutes), scale.expected_s)
    name = "gpu-toy" if is_toy else "gpu"
    command = "python -m benchmarks.gpu" + (" --toy" if arguments.toy else "")
    result = ResultFile(arguments.out / f"{name}.json", name, command, arguments.commit)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tasks = Bench(world, scale, budget, Path(folder)).tasks()
            for task in (task for task in tasks if arguments.compiled or task.kind != "compiled"):
                result.add({"measure": task.measure, "device": device_name(world), **run_task(task, budget)})
                print(_line(result.rows[-1]), flush=True)
    finally:
        world.close()
    print()
    print(tables.render_all(result.content))
    broken = [row for row in result.rows if "error" in row]
    differing = [row for row in measured(result.rows, "exact_resume") if not row["identical"]]
    return 1 if broken or differing else 0


def run_task(task: Task, budget: Budget) -> dict[str, Any]:
    """The task's row; where it does not fit or fails, its description with the reason."""
    kind = task.kind or task.measure
    shortage = budget.shortage(kind, task.factor)
    if shortage:
        return {**task.about, "skipped": shortage}
    began = time.monotonic()
    try:
        row = task.run()
    except torch.OutOfMemoryError as error:
        return {**task.about, "skipped": f"does not fit: {str(error).splitlines()[0]}"}
    except Exception as error:  # noqa: BLE001 - the other figures are still worth having
        traceback.print_exc()
        return {**task.about, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    seconds = time.monotonic() - began
    budget.took(kind, task.factor, seconds)
    return {**row, "took_s": seconds}


def device_name(world: World) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def _line(row: dict[str, Any]) -> str:
    return "  ".join([f"{row['measure']:16}", *(f"{key}={value}" for key, value in row.items() if key != "measure")])


if __name__ == "__main__":
    sys.exit(run_command(main))
