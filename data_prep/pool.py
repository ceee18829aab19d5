"""Tasks in worker processes, with progress, and with no worker left behind however the command ends."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ast_dist.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

REFRESH_S = 0.2
PLAIN_LINE_EVERY_S = 10.0


class Stopped(Exception):
    """Raised inside a task when the command is ending."""


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    on_result: Callable[[int, Result], None],
    *,
    workers: int,
    total: int,
    label: str,
    preload: Sequence[str] = (),
) -> None:
    """Run `function` on every task in worker processes and hand each result over as it comes.

    function: a module's function, run in a worker; it calls `advance` as its images are done. on_result: called here
    with the task's position and its result. workers: processes, 0 for one a core. total: images over all tasks.
    label: what stands before the progress. preload: modules that the workers share instead of importing each.
    Raises what a task raised, after the others have stopped; UserError when a worker was killed.
    """
    if not tasks:
        return
    workers = min(workers or available_cores(), len(tasks))
    # Not fork: the progress bar has a thread, and a forked copy of a locked lock stays locked for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.pool", *preload])
    # No locks: a worker that is killed while it holds one would block the rest. Each task writes its own number.
    done, stop = context.RawArray("q", len(tasks)), context.RawValue("b", 0)
    with (
        _progress(label, total) as show,
        ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(done, stop)) as pool,
    ):
        try:
            pending = {pool.submit(_run, function, task, number): number for number, task in enumerate(tasks)}
            while pending:
                finished, _ = wait(pending, timeout=REFRESH_S, return_when=FIRST_COMPLETED)
                show(sum(done))
                for future in finished:
                    number = pending.pop(future)
                    on_result(number, future.result())
        except BaseException as error:
            stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{label}: a worker process was killed, perhaps for want of memory (there were {workers}). "
                    "Run the same command again with fewer --workers."
                ) from None
            raise


def advance(images: int = 1) -> None:
    """Count images as done. To be called from inside a task; raises Stopped when the command is ending."""
    _worker["done"][_worker["task"]] += images
    if _worker["stop"].value:
        raise Stopped


def available_cores() -> int:
    """Cores that this process may use (a container or batch system may grant fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 shard, 2 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


_worker: dict[str, Any] = {}


def _start_worker(done: Any, stop: Any) -> None:
    _worker.update(done=done, stop=stop)
    # Ctrl-C reaches the whole terminal; the parent alone decides, and tells the workers through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed says nothing: without this, its workers would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(function: Callable[[Task], Result], task: Task, number: int) -> Result:
    _worker["task"] = number
    return function(task)


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere; both on stderr. Yields what takes the count so far."""
    if not sys.stderr.isatty():
        yield _PlainProgress(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, rate="")
        started = time.monotonic()
        yield lambda count: bar.update(
            task, completed=count, rate=f"{count / max(time.monotonic() - started, 1e-9):,.0f}/s"
        )


class _PlainProgress:
    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.started = self.last_line = time.monotonic()

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if now - self.last_line < PLAIN_LINE_EVERY_S:
            return
        self.last_line = now
        rate = count / (now - self.started)
        left = f", {(self.total - count) / rate:,.0f} s left" if rate else ""
        line = f"{self.label}: {count:,} of {self.total:,} images, {rate:,.0f}/s{left}"
        print(line, file=sys.stderr, flush=True)
