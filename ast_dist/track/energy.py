"""Joules that a GPU has used, from its own meter: NVML, through nvidia-ml-py (`pip install ast-dist[energy]`).

Measured or absent, never computed. GPUs before Volta have no energy counter; integrating their power readings would
be an estimate, so there is no meter for them. The figure is the whole board's, its idle share and other processes on
it included.

Why not zeus: its ZeusMonitor (zeus 0.16, zeus/monitor/energy.py) reads this same counter, nvmlDeviceGetTotalEnergy-
Consumption. What it adds are the estimates left out above (power polled by a process of its own on older GPUs,
power · time for windows shorter than the counter's period), CPU joules that need root, and a wait for the GPU at each
end of a window, which ours need not: an epoch's last step and an evaluation's last sum have been read by then.
"""

import contextlib
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Power:
    """Mean power over a stretch of time. watts: W. seconds: how long it was measured."""

    watts: float
    seconds: float


class GpuMeter:
    """The energy counter of one GPU, counted from when it was opened. Use `GpuMeter.open`.

    uuid: NVML's name of the board, the same for every process that uses it.
    """

    def __init__(self, nvml: ModuleType, handle: Any, uuid: str) -> None:
        self.uuid = uuid
        self._nvml = nvml
        self._handle = handle
        self._first_mj: int = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._opened_at = time.monotonic()

    @classmethod
    def open(cls, uuid: str) -> "GpuMeter | None":
        """The meter of the GPU with this UUID ("GPU-…"), or None: no nvidia-ml-py, no driver, no counter, a MIG slice.

        Whoever opens it closes it.
        """
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid), uuid)
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
            return None

    def millijoules(self) -> int | None:
        """Energy since the meter was opened, mJ; None when the driver no longer answers."""
        try:
            # The counter runs from when the driver was loaded; it moves every 20 to 100 ms.
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) - self._first_mj
        except self._nvml.NVMLError:
            return None

    def power(self) -> Power | None:
        """Mean power since the meter was opened; None where the counter has not moved, or no longer answers."""
        joules = (self.millijoules() or 0) / 1000
        seconds = time.monotonic() - self._opened_at
        return Power(joules / seconds, seconds) if joules and seconds else None

    def close(self) -> None:
        """Let go of NVML."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
