"""Our loaders beside the ones people use today, on CPUs: `python -m benchmarks.loader IMAGES`.

IMAGES holds one folder of JPEGs per class (or a folder train of such). They are copied until an epoch outlasts the
timed parts, and converted to every loader's format. Each measurement is a process of its own, held to as many CPUs
as there are workers, with OMP_NUM_THREADS=1; the loaders take turns, round after round, so that a slow minute hits
all of them, and ratios are taken within a round. Figures are medians over the rounds. The files lie in the page cache.

All loaders deliver batches of RandomResizedCrop and flip: `float32`, normalised, on the CPU, or `uint8`. Ours gives
uint8 by itself, and the consumer normalises; that is counted. A loader whose package is missing is left out, and a
line says so. Rows land in DIR/loader.json after each round.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ast_dist.arguments import parse_arguments
from ast_dist.errors import UserError, run_command
from benchmarks import tables
from benchmarks.loaders.bench import CONTENDERS, Bench, Settings
from benchmarks.result import RESULTS, ResultFile


@dataclass(frozen=True)
class Arguments:
    """Measure loaders side by side on CPUs."""

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """Folder with one folder of JPEGs per class."""
    work: Path | None = None
    """Folder for the copies in every format (8,000 photographs take 4 GB); kept, and used again by the next run.
    Without it, a temporary one."""
    repeat: int = 3
    """Rounds."""
    seconds: float = 5.0
    """Timed part of a measurement, s."""
    warmup_s: float = 1.5
    """Dropped before it, s."""
    workers: int = 2
    """Worker processes or threads, and CPUs that they run on."""
    batch_size: int = 64
    """Images of a batch."""
    image_px: int = 224
    """Side of the crops, pixels."""
    epoch_images: int = 8000
    """The images are copied until there are so many."""
    only: tuple[str, ...] = ()
    """Loaders to measure, by the beginnings of their names, such as ImageFolder or ast_dist; without it, all."""
    outputs: tuple[Literal["float32", "uint8"], ...] = ("float32", "uint8")
    """What the loaders deliver; the first is measured when resumed, too."""
    out: Path = RESULTS
    """Folder of the result file."""

    def __post_init__(self) -> None:
        for name in ("repeat", "workers", "batch_size", "image_px", "epoch_images"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least 1.")
        if self.seconds <= 0 or self.warmup_s < 0:
            raise UserError(f"--seconds is {self.seconds:g} and --warmup-s {self.warmup_s:g}, but neither may be less.")
        cpus = len(os.sched_getaffinity(0))
        if self.workers > cpus:
            raise UserError(f"--workers is {self.workers}, but this process may use {cpus} CPUs.")
        # Half an epoch has to hold a batch from each worker, or there is no middle to resume at.
        if self.epoch_images < 4 * self.workers * self.batch_size:
            raise UserError(
                f"--epoch-images is {self.epoch_images}, but {self.workers} workers with batches of {self.batch_size} "
                f"need at least {4 * self.workers * self.batch_size}."
            )
        if not self.outputs:
            raise UserError("--outputs names nothing, but takes float32, uint8 or both.")
        for name in self.only:
            if not any(contender.name.startswith(name) for contender in CONTENDERS):
                raise UserError(f"--only {name}: no such loader. There are: {'; '.join(c.name for c in CONTENDERS)}.")


def main(argv: list[str]) -> int:
    """Measure, write, print. Returns 0, or 1 when a loader failed."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.loader")
    shared = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    with _work_folder(arguments.work) as work:
        bench = Bench(Settings(**shared), arguments.images, work)
        result = ResultFile(arguments.out / "loader.json", "loader", _command(arguments))
        for _ in range(arguments.repeat):
            bench.round()
            result.replace(bench.rows())
    print()
    print(tables.render_all(result.content))
    return 1 if any("error" in row for row in result.rows) else 0


def _command(arguments: Arguments) -> str:
    """What was run, with the options that change figures."""
    words = ["python -m benchmarks.loader IMAGES"]
    for option in dataclasses.fields(Arguments):
        value = getattr(arguments, option.name)
        if option.name in ("images", "work", "out") or value == option.default:
            continue
        given = " ".join(f"'{name}'" for name in value) if isinstance(value, tuple) else f"{value:g}"
        words.append(f"--{option.name.replace('_', '-')} {given}")
    return " ".join(words)


@contextlib.contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield given


if __name__ == "__main__":
    sys.exit(run_command(main))
