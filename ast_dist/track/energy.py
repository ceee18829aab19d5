"""Joules that a GPU has used, from its own meter: NVML, through nvidia-ml-py (`pip install ast-dist[energy]`).

Measured or absent, never computed. GPUs before Volta have no energy counter; integrating their power readings would
be an estimate, so there is no meter for them. The figure is the whole board's, its idle share and other processes on
it included.
"""

import contextlib
from types import ModuleType
from typing import Any


class GpuMeter:
    """The energy counter of one GPU, counted from when it was opened. Use `GpuMeter.open`.

    uuid: NVML's name of the board, the same for every process that uses it.
    """

    def __init__(self, nvml: ModuleType, handle: Any, uuid: str) -> None:
        self.uuid = uuid
        self._nvml = nvml
        self._handle = handle
        self._first_mj: int = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

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

    def close(self) -> None:
        """Let go of NVML."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
