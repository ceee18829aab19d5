"""Where the time goes: steps, waiting for data, checkpoints, epochs."""

import time
from collections.abc import Iterator

from ast_dist.data.loader import Batch


class Clock:
    """Where the time goes: steps, waiting for data, saves, epochs."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._began = self._interval_began = self._epoch_began = self._last_save = now
        self._waited_s = 0.0
        self._steps = 0
        self._all_steps = 0
        self._samples = 0
        self._all_samples = 0
        self._stall_s: float | None = None

    @property
    def is_first_step(self) -> bool:
        """Whether exactly one step was done in this process."""
        return self._all_steps == 1

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches through and measure the time that the loop waits for them."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def step_done(self, samples: int) -> None:
        """Count a step of the global batch."""
        self._steps += 1
        self._all_steps += 1
        self._samples += samples
        self._all_samples += samples

    def saved(self, stall_s: float) -> None:
        """Note a checkpoint and for how long it held up the training."""
        self._last_save = time.monotonic()
        self._stall_s = stall_s

    def since_save_s(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._last_save

    def seconds_per_sample(self) -> float:
        """Wall-clock seconds per trained sample in this session, evaluation and saves included."""
        return (time.monotonic() - self._began) / self._all_samples if self._all_samples else 0.0

    def interval_row(self) -> dict[str, float]:
        """The perf keys since the last call or the epoch's start, samples over all ranks."""
        now = time.monotonic()
        elapsed = max(now - self._interval_began, 1e-9)
        row = {
            "perf/images_per_s": self._samples / elapsed,
            "perf/step_ms": 1000 * elapsed / max(self._steps, 1),
            "perf/data_wait": min(self._waited_s / elapsed, 1.0),
        }
        if self._stall_s is not None:
            row["perf/ckpt_stall_ms"] = 1000 * self._stall_s
        self._interval_began, self._steps, self._samples, self._waited_s, self._stall_s = now, 0, 0, 0.0, None
        return row

    def epoch_row(self) -> dict[str, float]:
        """The perf keys of an epoch."""
        return {"perf/epoch_s": time.monotonic() - self._epoch_began}

    def epoch_done(self) -> None:
        """Begin the next epoch's time; evaluation belongs to no step interval."""
        now = time.monotonic()
        self._epoch_began = self._interval_began = now
        self._steps, self._samples, self._waited_s = 0, 0, 0.0
