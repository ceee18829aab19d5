"""One measurement in a process of its own: `python -m benchmarks.loaders.run JOB.json RESULT.json`.

The process holds itself, and so its threads and workers, to the job's CPUs before it imports anything that counts
them. The result goes to a file, since some loaders write to the standard output.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.loaders.source import Job, Source


def main() -> None:
    """Do what the job says."""
    described = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.sched_setaffinity(0, described["cpus"])
    from ast_dist.allocator import keep_freed_memory
    from benchmarks.loaders.source import Job

    keep_freed_memory()  # as our training command does; here for all, and their workers inherit it

    job = Job(**described)
    module = importlib.import_module(f"benchmarks.loaders.{job.module}")
    result = MODES[job.mode](job, module)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _convert(job: "Job", module: Any) -> dict[str, Any]:
    """Write the images in the loader's own format."""
    root = Path(job.paths["images"])
    classes = sorted(path.name for path in root.iterdir())
    samples = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())]
    module.convert(samples, Path(job.paths["converted"]))
    return {"samples": len(samples)}


def _throughput(job: "Job", module: Any) -> dict[str, Any]:
    """Time the pace once the prefetch is full, and the first batch before that."""
    from benchmarks.loaders.usage import busy_s, cpu_s, memory_mb

    began = time.perf_counter()
    source = module.open_source(job)
    batches = _endless(source)
    next(batches)
    first_batch_s = time.perf_counter() - began
    _pass(batches, job.warmup_s, job.workers)
    began, cpu_began, busy_began = time.perf_counter(), cpu_s(), busy_s(job.cpus)
    images = _pass(batches, job.seconds, job.workers)
    wall_s, used_s, busy = time.perf_counter() - began, cpu_s() - cpu_began, busy_s(job.cpus) - busy_began
    peak_mb, proportional_mb = memory_mb()
    batches.close()
    source.close()
    return {
        "images_per_s": images / wall_s,
        "cpu_ms_per_image": 1000.0 * used_s / images,
        "first_batch_s": first_batch_s,
        "others_cpu_share": max(busy - used_s, 0.0) / (wall_s * len(job.cpus)),
        "max_rss_mb": peak_mb,
        "pss_mb": proportional_mb,
    }


def _resume(job: "Job", module: Any) -> dict[str, Any]:
    """Time the first batch of an epoch that goes on in its middle."""
    began = time.perf_counter()
    source = module.open_source(job)
    next(source.epoch())
    return {"resume_s": time.perf_counter() - began, "resume_method": source.resume_method}


def _save(job: "Job", module: Any) -> dict[str, Any]:
    """Load to the middle of an epoch and save what the loader itself saves there; None where it saves nothing."""
    source = module.open_source(job)
    if source.state is None:
        return {"state": None}
    batches = source.epoch()
    for _ in range(job.start_batch):
        next(batches)
    return {"state": source.state()}


def _keep(job: "Job", module: Any) -> dict[str, Any]:
    """Time our loader's epoch over all samples, and over the share that a gate keeps."""
    import numpy as np

    from ast_dist.data.order import Plan, epoch_order
    from benchmarks.loaders.source import SEED
    from benchmarks.loaders.usage import cpu_s

    index, _, loader = module.open_loader(job)
    generator = np.random.default_rng(SEED)

    def epoch(number: int, rate: float) -> tuple[float, float]:
        order = epoch_order(index.num_samples, SEED, number)[: job.epoch_images]
        kept = np.sort(generator.permutation(len(order))[: round(rate * len(order))])
        began, cpu_began = time.perf_counter(), cpu_s()
        for _ in loader.train_batches(Plan(order[kept]), job.batch_size, SEED, number):
            pass
        return time.perf_counter() - began, cpu_s() - cpu_began

    epoch(0, job.keep_rate)
    wall_s, used_s = epoch(1, 1.0)
    kept_wall_s, kept_used_s = epoch(2, job.keep_rate)
    loader.close()
    return {
        "full_epoch_s": wall_s,
        "epoch_s": kept_wall_s,
        "wall_ratio": kept_wall_s / wall_s,
        "cpu_ratio": kept_used_s / used_s,
    }


def _endless(source: "Source") -> Iterator[Any]:
    while True:
        yield from source.epoch()


def _pass(batches: Iterator[Any], seconds: float, workers: int) -> int:
    """Take batches for so long. Returns the images. Workers deliver in turn, so it takes as many from each."""
    began = time.perf_counter()
    images = count = 0
    while count == 0 or count % workers or time.perf_counter() - began < seconds:
        images += len(next(batches)[1])
        count += 1
    return images


MODES = {"convert": _convert, "throughput": _throughput, "resume": _resume, "save": _save, "keep": _keep}

if __name__ == "__main__":
    main()
