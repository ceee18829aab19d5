"""What a run took from its machines, over all ranks and sessions: samples read and decoded, joules of the GPUs."""

import warnings
from typing import Any

import torch

from ast_dist.data.loader import Loader
from ast_dist.distributed import World
from ast_dist.track.energy import GpuMeter


def open_meter(device: torch.device) -> GpuMeter | None:
    """The energy meter of the GPU that a rank computes on, None where there is none."""
    return GpuMeter.open(f"GPU-{torch.cuda.get_device_properties(device).uuid}") if device.type == "cuda" else None


class Resources:
    """Running totals, the same on every rank, as of the last `tally`.

    samples_read, samples_decoded: samples of the training split. Batches prefetched and never trained, because the
    run was stopped, count: they were really read. A damaged sample is read, and decoded only where its bytes gave an
    image of the indexed size. What the cache serves is neither.
    gpu_millijoules: what all GPUs used, their idle share while the run waited included; None unless every rank has
    had a meter in every session, since a part of the sum would pass for all of it. Ranks that share a GPU count it
    once.

    Kept apart from the ledger because two runs with the same weights may differ here. What a killed session spent
    after its last checkpoint is missing.

    loader: of the training split. meter: of this rank's GPU; closed by `close`.
    """

    def __init__(self, loader: Loader, world: World, meter: GpuMeter | None) -> None:
        self._loader = loader
        self._world = world
        self._meter = meter
        uuids = world.gather(meter.uuid if meter else None)
        self._counts_gpu = meter is not None and uuids.index(meter.uuid) == world.rank
        self._read_before = self._decoded_before = 0
        self._millijoules_before: int | None = None if None in uuids else 0
        self._session = [0, 0, 0]

    @property
    def samples_read(self) -> int:
        """Samples read from the shards."""
        return self._read_before + self._session[0]

    @property
    def samples_decoded(self) -> int:
        """Samples decoded to an image."""
        return self._decoded_before + self._session[1]

    @property
    def gpu_millijoules(self) -> int | None:
        """Energy of all GPUs, mJ."""
        return None if self._millijoules_before is None else self._millijoules_before + self._session[2]

    def tally(self) -> None:
        """Sum this session's counts over the ranks. All ranks must call."""
        millijoules = self._meter.millijoules() if self._meter else 0
        counts = [
            self._loader.reader.samples_read,
            self._loader.samples_decoded,
            (millijoules or 0) if self._counts_gpu else 0,
            int(millijoules is None),
        ]
        *self._session, failed = self._world.sum(torch.tensor(counts, device=self._world.device)).tolist()
        if failed and self._millijoules_before is not None:
            self._millijoules_before = None
            if self._world.is_main:
                message = "NVML no longer answers: cost/gpu_joules is left out from here on."
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def row(self) -> dict[str, float]:
        """The cost keys of the last tally; no joules where they were not measured."""
        row: dict[str, float] = {
            "cost/samples_read": self.samples_read,
            "cost/samples_decoded": self.samples_decoded,
            "cost/session_samples_read": self._session[0],
            "cost/session_samples_decoded": self._session[1],
        }
        if self.gpu_millijoules is not None:
            row["cost/gpu_joules"] = self.gpu_millijoules / 1000
        return row

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for the checkpoint."""
        names = ("samples_read", "samples_decoded", "gpu_millijoules")
        return {name: getattr(self, name) for name in names}

    def load(self, before: dict[str, Any]) -> None:
        """Go on from what `to_dict` gave; from an empty dict, the sessions before were not measured."""
        self._read_before = before.get("samples_read", 0)
        self._decoded_before = before.get("samples_decoded", 0)
        if self._millijoules_before is not None:
            self._millijoules_before = before.get("gpu_millijoules")

    def close(self) -> None:
        """Close the meter."""
        if self._meter:
            self._meter.close()
