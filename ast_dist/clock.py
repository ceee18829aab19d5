"""Where the time goes: steps, waiting for data, checkpoints, epochs."""

import time
from collections import deque
from collections.abc import Iterator

from ast_dist.data.batch import Batch
from ast_dist.track.time_left import RECENT, Stretch


class Span:
    """A stretch of the run: since when, how many steps and samples, at what cost, FLOPs, wait for data."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.steps = 0
        self.samples = 0
        self.cost = 0.0
        self.flops = 0.0
        self.waited_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the span began."""
        return max(time.monotonic() - self.began, 1e-9)

    def row(self, peak_flops_per_s: float | None) -> dict[str, float]:
        """Throughput over all ranks, and shares: of the time spent waiting for data, of the peak rate where known."""
        elapsed_s = self.elapsed_s
        row = {
            "perf/images_per_s": self.samples / elapsed_s,
            "perf/data_wait": min(self.waited_s / elapsed_s, 1.0),
        }
        if peak_flops_per_s:
            row["perf/mfu"] = self.flops / elapsed_s / peak_flops_per_s
        return row

    @property
    def stretch(self) -> Stretch | None:
        """Seconds and cost so far, evaluation and saves included; None where nothing was trained.

        A scored sample counts as the part of a trained one that it costs.
        """
        return Stretch(self.elapsed_s, self.cost) if self.cost else None


class Clock:
    """Measures steps, waiting for data, saves and epochs, each over its own span.

    peak_flops_per_s: what all devices together can do; None where it is not known.

    Attributes: intervals (of the last rows, the newest last).
    """

    def __init__(self, peak_flops_per_s: float | None = None) -> None:
        self._peak_flops_per_s = peak_flops_per_s
        self._process, self._epoch, self._interval = Span(), Span(), Span()
        self._saves: dict[str, float] = {}
        self.intervals: deque[Stretch] = deque(maxlen=RECENT)

    @property
    def is_first_step(self) -> bool:
        """Whether exactly one step was done in this process."""
        return self._process.steps == 1

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches through and measure the time that the loop waits for them."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            for span in (self._epoch, self._interval):
                span.waited_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def step_done(self, samples: int, cost: float | None = None) -> None:
        """Count a step of the global batch. samples: drawn for it. cost: in trained samples, None where all were."""
        for span in (self._process, self._epoch, self._interval):
            span.steps += 1
            span.samples += samples
            span.cost += samples if cost is None else cost

    def computed(self, flops: float) -> None:
        """Count what went through the model on all ranks, FLOPs."""
        for span in (self._epoch, self._interval):
            span.flops += flops

    def saved(self, stall_s: float) -> None:
        """Note for how long a save held up the training's host."""
        self._saves["perf/ckpt_stall_ms"] = 1000 * stall_s

    def save_ended(self, save_s: float, copy_s: float) -> None:
        """Note how long a save took until it was committed, and for how long its copies held up the GPU."""
        self._saves["perf/ckpt_save_s"] = save_s
        if copy_s:
            self._saves["perf/ckpt_copy_ms"] = 1000 * copy_s

    @property
    def process(self) -> Stretch | None:
        """This process so far; None before its first step."""
        return self._process.stretch

    def interval_row(self) -> dict[str, float]:
        """The perf keys since the last call or the epoch's start."""
        span, self._interval = self._interval, Span()
        row = {**span.row(self._peak_flops_per_s), "perf/step_ms": 1000 * span.elapsed_s / max(span.steps, 1)}
        if stretch := span.stretch:
            self.intervals.append(stretch)
        row |= self._saves
        self._saves = {}
        return row

    def epoch_trained(self) -> dict[str, float]:
        """The perf keys of the epoch's steps, evaluation left out."""
        return {**self._epoch.row(self._peak_flops_per_s), "perf/train_s": self._epoch.elapsed_s}

    def epoch_done(self) -> dict[str, float]:
        """The epoch's seconds, evaluation included, and their pace; the next epoch's time begins.

        After a resume in mid-epoch both are of its rest. The pace is absent where this process trained none of it.
        """
        elapsed_s, cost = self._epoch.elapsed_s, self._epoch.cost
        row = {"perf/epoch_s": elapsed_s, **({"perf/s_per_sample": elapsed_s / cost} if cost else {})}
        self._epoch, self._interval = Span(), Span()
        return row
