"""Prepares the data, runs the measurements in turn and keeps what they gave."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ast_dist.data.index import Index
from ast_dist.data_config import DataConfig
from benchmarks.loaders.data import copy_images, once, shard_set
from benchmarks.loaders.limits import best_decoder
from benchmarks.loaders.rows import DECODE_LIMIT, Result, Task, all_rows
from benchmarks.loaders.source import Job, is_installed
from benchmarks.result import ROOT

RESIZED_PX = (256, 288)
KEEP_RATE = 0.4
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Contender:
    """A loader: the row's name, its module and decoder.

    package: what must be importable. extra: the extra of setup.cfg that installs it. format: what its own copy of
    the data is called, where it has one. saves: it saves its state in the middle of an epoch.
    """

    name: str
    module: str
    decoder: str
    package: str = "torchvision"
    extra: str = ""
    format: str = ""
    saves: bool = False


CONTENDERS = (
    Contender("ImageFolder, PIL", "imagefolder", "pil"),
    Contender("ImageFolder, torchvision decode", "imagefolder", "torchvision"),
    Contender("webdataset, PIL", "plain_webdataset", "pil"),
    Contender("webdataset, torchvision decode", "plain_webdataset", "torchvision"),
    Contender("DALI readers.webdataset", "plain_dali", "dali", "nvidia.dali", "dali", saves=True),
    Contender("mosaicml-streaming, PIL", "mosaic_streaming", "pil", "streaming", "bench", "mds", saves=True),
    Contender(
        "mosaicml-streaming, torchvision decode",
        "mosaic_streaming",
        "torchvision",
        "streaming",
        "bench",
        "mds",
        saves=True,
    ),
    Contender("litdata, PIL", "lit_data", "pil", "litdata", "bench", "litdata", saves=True),
    Contender("litdata, torchvision decode", "lit_data", "torchvision", "litdata", "bench", "litdata", saves=True),
    Contender("ast_dist, torch", "ours", "torch"),
    Contender("ast_dist, dali", "ours", "dali", "nvidia.dali", "dali"),
)


@dataclass(frozen=True)
class Settings:
    """What the command says about the measurements; `benchmarks.loader.Arguments` has the words for each."""

    seconds: float
    warmup_s: float
    workers: int
    batch_size: int
    image_px: int
    epoch_images: int
    only: tuple[str, ...]
    outputs: tuple[str, ...]


class Bench:
    """All measurements of one run of the command. Making it prepares the data in `work`."""

    def __init__(self, settings: Settings, images: Path, work: Path) -> None:
        self._settings = settings
        self._folder = work
        copies, count = copy_images(images, work, settings.epoch_images)
        index = shard_set(copies, work / "shards")
        # A middle that every worker reaches with whole batches.
        half = count // settings.batch_size // 2 // settings.workers * settings.workers
        self._common = Job(
            mode="throughput",
            module="",
            decoder="",
            output="float32",
            paths={"images": str(copies), "shards": str(index.root)},
            batch_size=settings.batch_size,
            workers=settings.workers,
            image_px=settings.image_px,
            epoch_images=count,
            cpus=sorted(os.sched_getaffinity(0))[: settings.workers],
            seconds=settings.seconds,
            warmup_s=settings.warmup_s,
            start_batch=0,
        )
        self._states: dict[str, Any] = {}
        self._skipped: list[dict[str, Any]] = []
        self._tasks: list[Task] = []
        chosen = [contender for contender in CONTENDERS if self._is_chosen(contender)]
        for contender in chosen:
            self._tasks += self._loader_tasks(contender, half)
        ours = [contender for contender in chosen if contender.module == "ours"]
        self._tasks += self._limit_tasks()
        if ours:
            self._tasks += self._own_tasks(ours, images, index)
        self._results: list[list[Result]] = [[] for _ in self._tasks]

    def round(self) -> None:
        """Run every measurement once."""
        number = len(self._results[0]) + 1
        for task, results in zip(self._tasks, self._results, strict=True):
            joined: Result = {}
            for job in task.jobs:
                joined |= self._run(job)
            results.append({"error": joined["error"]} if "error" in joined else joined)
            shown = "  ".join(f"{key} {_shown(value)}" for key, value in results[-1].items())
            print(f"round {number}  {task.measure:14}  {task.name:38}  {task.output:7}  {shown}", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the rounds so far, and the loaders that were left out."""
        return all_rows(self._tasks, self._results) + self._skipped

    def _is_chosen(self, contender: Contender) -> bool:
        """Whether to measure it. Where it can't be, a line and a row without figures say why."""
        only = self._settings.only
        if only and not any(contender.name.startswith(name) for name in only):
            return False
        reason = reason_against(contender)
        if reason:
            print(f"{contender.name}: left out, {reason}", flush=True)
            self._skipped.append({"measure": "loader", "device": "cpu", "loader": contender.name, "skipped": reason})
        return reason is None

    def _loader_tasks(self, contender: Contender, half: int) -> list[Task]:
        paths = dict(self._common.paths)
        about = {"module": contender.module, "decoder": contender.decoder}
        if contender.format:
            folder = self._folder / contender.format
            once(folder, lambda made: self._must_run(about | {"mode": "convert"}, {**paths, "converted": str(made)}))
            paths[contender.format] = str(folder)
        resume = {**about, "mode": "resume", "paths": paths, "start_batch": half}
        if contender.saves:
            if contender.module not in self._states:  # what decodes has no part in it
                self._states[contender.module] = self._must_run({**resume, "mode": "save"}, paths)["state"]
            resume["state"] = self._states[contender.module]
        tasks = []
        for output in self._settings.outputs:
            jobs = [{**about, "output": output, "paths": paths}]
            if output == self._settings.outputs[0]:
                jobs.append({**resume, "output": output})
            described = {"decoder": contender.decoder, "workers": self._settings.workers}
            tasks.append(Task("loader", contender.name, output, tuple(jobs), described))
        return tasks

    def _limit_tasks(self) -> list[Task]:
        about = {"workers": self._settings.workers}
        read, decode = ({"module": "limits", "decoder": decoder} for decoder in ("read", best_decoder()))
        return [
            Task("loader_limit", "read the bytes", "", (read,), about),
            Task("loader_limit", DECODE_LIMIT, "", (decode,), {**about, "decoder": decode["decoder"]}),
        ]

    def _own_tasks(self, ours: list[Contender], images: Path, index: Index) -> list[Task]:
        """The keep rate and pre-resized shards with our fastest decoder, processes with our torch decoder."""
        best = ours[-1]
        job = {"module": "ours", "decoder": best.decoder}
        keep = {**job, "mode": "keep", "keep_rate": KEEP_RATE}
        tasks = [Task("loader_keep", best.name, "uint8", (keep,), {"keep_rate": KEEP_RATE})]
        source, _ = copy_images(images, self._folder / "resized", at_least=1)
        for short_px in RESIZED_PX:
            resized = shard_set(source, self._folder / "resized" / f"shards-{short_px}", short_px)
            bytes_ratio = float(resized.size.mean()) / float(index.size.mean())
            about = {"short_side_px": short_px, "bytes_ratio": bytes_ratio}
            paths = {**self._common.paths, "shards": str(resized.root)}
            for output in self._settings.outputs:
                jobs = ({**job, "output": output, "paths": paths},)
                tasks.append(Task("loader_resized", best.name, output, jobs, about, baseline=best.name))
        for module, what in (("ours", "threads"), ("ours_processes", "processes")):
            jobs = ({"module": module, "decoder": "torch", "output": "uint8"},)
            tasks.append(Task("loader_workers", what, "uint8", jobs, {"decoder": "torch"}))
        return tasks

    def _must_run(self, changes: dict[str, Any], paths: dict[str, str]) -> Result:
        result = self._run({**changes, "paths": paths})
        if "error" in result:
            raise RuntimeError(f"{changes['module']}, {changes['mode']}: {result['error']}")
        return result

    def _run(self, changes: dict[str, Any]) -> Result:
        """A job in a process of its own. Returns its result, or what went wrong as "error"."""
        job = dataclasses.replace(self._common, **changes)
        with tempfile.TemporaryDirectory() as name:
            described, result = Path(name) / "job.json", Path(name) / "result.json"
            described.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.loaders.run", str(described), str(result)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, errors = process.communicate(timeout=_TIMEOUT_S + job.seconds)
            except subprocess.TimeoutExpired:
                return {"error": f"no result after {_TIMEOUT_S + job.seconds:.0f} s"}
            finally:
                # Its workers too, where it hung, failed, or this process is being interrupted.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode:
                print(errors, file=sys.stderr, flush=True)
                last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                return {"error": last[0]}
            found: Result = json.loads(result.read_text(encoding="utf-8"))
            return found


def reason_against(contender: Contender) -> str | None:
    """Why a loader cannot be measured here, or None."""
    if not is_installed(contender.package):
        return f"{contender.package} is not installed: pip install 'ast-dist[{contender.extra}]'"
    if contender.module == "ours" and contender.decoder not in get_args(get_type_hints(DataConfig)["decoder"]):
        return f"data.decoder does not know {contender.decoder}"
    return None


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
