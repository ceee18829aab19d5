"""Clocks that wait for the device, and the ceilings that a measured time is held against."""

import statistics
import time
from collections.abc import Callable

import torch

# Dense bf16, TFLOP/s, from NVIDIA's datasheets (which print twice as much, "with sparsity").
_DATASHEET_TFLOPS = {"H200": 989.4, "H100 80GB HBM3": 989.4, "A100": 312.0}
_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}


class Marks:
    """Moments on the device's own clock, taken without waiting for it.

    On a GPU a mark is an event in the current stream: it is passed when all work launched before it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Take a moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds between one mark and the next. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            pairs = zip(self._events, self._events[1:], strict=False)
            return [float(first.elapsed_time(second)) for first, second in pairs]
        return [1000.0 * (b - a) for a, b in zip(self._times, self._times[1:], strict=False)]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(action: Callable[[], object], device: torch.device, target_s: float = 0.5) -> float:
    """Median milliseconds of `action`, after a warm-up, over as many repetitions as `target_s` seconds hold (≥ 5)."""
    action()
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    repetitions = max(5, min(200, int(target_s / max(time.perf_counter() - began, 1e-6))))
    marks = Marks(device)
    marks.mark()
    for _ in range(repetitions):
        action()
        marks.mark()
    return statistics.median(marks.intervals_ms())


def matmul_tflops(device: torch.device) -> float:
    """What one square bf16 matrix product of random numbers reaches on this device, TFLOP/s."""
    side = _MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / median_ms(lambda: torch.mm(a, b, out=out), device) / 1e9


def copy_gb_per_s(device: torch.device) -> float:
    """What a large copy within the device's memory moves, bytes read plus bytes written, GB/s."""
    source = torch.randint(255, (_COPY_BYTES[device.type] // 2,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return _COPY_BYTES[device.type] / median_ms(lambda: target.copy_(source), device) / 1e6


def datasheet_tflops(gpu: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, TFLOP/s; None where this table does not know it."""
    return next((peak for name, peak in _DATASHEET_TFLOPS.items() if name in gpu), None)
