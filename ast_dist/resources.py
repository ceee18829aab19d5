"""What a run took from its machines, over all ranks and sessions: samples read and decoded, GPU joules, memory."""

import resource
import sys
from typing import Any

import torch

from ast_dist.data.loader import Loader
from ast_dist.distributed import World
from ast_dist.joules import Joules
from ast_dist.track.energy import GpuMeter


def open_meter(device: torch.device) -> GpuMeter | None:
    """The energy meter of the GPU that a rank computes on, None where there is none."""
    return GpuMeter.open(f"GPU-{torch.cuda.get_device_properties(device).uuid}") if device.type == "cuda" else None


class Resources:
    """Running totals, the same on every rank, as of the last `tally`.

    samples_read, samples_decoded: samples of the training split. Batches prefetched and never trained, because the
    run was stopped, count: they were really read. A damaged sample is read, and decoded only where its bytes gave an
    image of the indexed size. What the cache serves is neither.
    joules: of the GPUs; closed by `close`.

    Kept apart from the ledger because two runs with the same weights may differ here. What a killed session spent
    after its last checkpoint is missing.

    loader: of the training split.
    """

    def __init__(self, loader: Loader, world: World, joules: Joules) -> None:
        self.joules = joules
        self._loader = loader
        self._world = world
        self._read_before = self._decoded_before = 0
        self._session = [0, 0]
        self._peak_bytes = 0

    @property
    def samples_read(self) -> int:
        """Samples read from the shards."""
        return self._read_before + self._session[0]

    @property
    def samples_decoded(self) -> int:
        """Samples decoded to an image."""
        return self._decoded_before + self._session[1]

    def tally(self) -> None:
        """Sum this session's counts over the ranks, and find the peak of their memory. All ranks must call."""
        world = self._world
        peak = peak_bytes(world.device)
        peaks = [peak if rank == world.rank else 0 for rank in range(world.size)]
        counts = [self._loader.reader.samples_read, self._loader.samples_decoded, *self.joules.counts(), *peaks]
        read, decoded, *rest = world.sum(torch.tensor(counts, device=world.device)).tolist()
        self._session = [read, decoded]
        self.joules.take(rest[: -world.size])
        self._peak_bytes = max(rest[-world.size :])

    def row(self) -> dict[str, float]:
        """What the last tally found, by its key; no joules where they were not measured."""
        return {
            "cost/samples_read": self.samples_read,
            "cost/samples_decoded": self.samples_decoded,
            "cost/session_samples_read": self._session[0],
            "cost/session_samples_decoded": self._session[1],
            **self.joules.row(),
            "perf/mem_gb": self._peak_bytes / 1e9,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for the checkpoint."""
        samples = {"samples_read": self.samples_read, "samples_decoded": self.samples_decoded}
        return {**samples, **self.joules.to_dict()}

    def load(self, before: dict[str, Any]) -> None:
        """Go on from what `to_dict` gave; from an empty dict, the sessions before were not measured."""
        self._read_before = before.get("samples_read", 0)
        self._decoded_before = before.get("samples_decoded", 0)
        self.joules.load(before)

    def close(self) -> None:
        """Close the meter."""
        self.joules.close()


def peak_bytes(device: torch.device) -> int:
    """Most memory in use at once on this rank: what torch held for tensors on its GPU since `forget_peak`.

    On a CPU, what the process had resident since it began: the kernel tells no later peak.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak anew, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
