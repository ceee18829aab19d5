"""Images/s of the conversion to shards, beside its limit: `python -m benchmarks.make_shards [--images FOLDER]`.

FOLDER holds one folder of images per class; without it, made-up JPEGs as large as ImageNet's are used. The times are
those of the whole command, with its start, its listing and its waiting for the disk. Every file is read once before,
so reading comes from the page cache; writing goes to --scratch, and is waited for.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.arguments import parse_arguments
from ast_dist.errors import UserError, run_command
from benchmarks import tables
from benchmarks.images import make_images
from benchmarks.result import RESULTS, ROOT, ResultFile
from data_prep.pool import available_cores
from data_prep.sources.imagefolder import list_samples

_HEIGHT_PX, _WIDTH_PX, _CLASSES = 375, 500, 100


@dataclass(frozen=True)
class Arguments:
    """Time data_prep.make_shards."""

    images: Path | None = None
    """Folder with one folder of images per class; made up where there is none."""
    count: int = 10_000
    """Images to make up."""
    workers: int = 0
    """Worker processes; 0 takes all cores."""
    repeats: int = 3
    """Conversions of each kind; the median counts."""
    scratch: Path | None = None
    """Folder for the shards, which are deleted again; the system's temporary one unless given."""
    out: Path = RESULTS
    """Folder of the result file."""

    def __post_init__(self) -> None:
        if self.count < _CLASSES or self.repeats < 1 or self.workers < 0:
            raise UserError(
                f"--count is {self.count}, --repeats {self.repeats} and --workers {self.workers}, but must be at least "
                f"{_CLASSES}, 1 and 0."
            )


def main(argv: list[str]) -> int:
    """Measure, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.make_shards")
    command = "python -m benchmarks.make_shards" + (" --images IMAGES" if arguments.images else "")
    command += " --scratch SCRATCH" if arguments.scratch else ""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        images = arguments.images.absolute() if arguments.images else None
        if images is None:
            images = Path(scratch, "images")
            make_images(images, arguments.count, _HEIGHT_PX, _WIDTH_PX, _CLASSES)
        listing = list_samples(str(images), "train")
        workers = arguments.workers or available_cores()
        for name in listing.names:
            listing.read(name)  # so that the first kind is not the only one to wait for the disk
        convert = ("data_prep.make_shards", "--split=train", f"--workers={workers}")
        result = ResultFile(arguments.out / "make_shards.json", "make_shards", command)
        kinds: dict[str, Callable[[str], None]] = {
            "read, SHA-256 and write alone": lambda folder: _run("benchmarks.copy_files", images, folder, workers),
            "without the decode check": lambda folder: _run(*convert, images, folder, "--no-decode-check"),
            "with the decode check": lambda folder: _run(*convert, images, folder),
        }
        for kind, act in kinds.items():
            seconds = statistics.median(_timed(act, scratch) for _ in range(arguments.repeats))
            result.add(_row(kind, seconds, listing.sizes, workers))
    print(tables.render_all(result.content))
    return 0


def _row(kind: str, seconds: float, sizes: np.ndarray, workers: int) -> dict[str, Any]:
    return {
        "measure": "conversion",
        "kind": kind,
        "images": len(sizes),
        "jpeg_kb": float(sizes.mean()) / 1000.0,
        "workers": workers,
        "seconds": seconds,
        "images_per_s": len(sizes) / seconds,
        "mb_per_s": float(sizes.sum()) / seconds / 1e6,
    }


def _timed(act: Callable[[str], None], scratch: str) -> float:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        began = time.perf_counter()
        act(folder)
        return time.perf_counter() - began


def _run(*command: object) -> None:
    words = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")


if __name__ == "__main__":
    sys.exit(run_command(main))
