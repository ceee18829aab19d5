"""The world: which rank this is, on which device, and the few collectives that training uses."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ast_dist.errors import UserError

_TIMEOUT = timedelta(minutes=10)
_GLOO_THREADS = 4
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class World:
    """This process among all.

    rank: 0 … size - 1. size: number of processes. local_rank, local_size: the same on this host. restart: how often
    torchrun has restarted this job. device: where this rank computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    restart: int
    device: torch.device

    @classmethod
    def start(cls) -> "World":
        """Join the process group that torchrun's environment describes; without it, a group of one.

        GPUs use NCCL for their tensors, and gloo serves the CPU's tensors everywhere. A group of one needs no port.
        Raises UserError when a host has more ranks than GPUs.
        """
        env = os.environ
        local_rank, local_size = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", "1"))
        restart = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_size > torch.cuda.device_count():
                raise UserError(
                    f"{local_size} processes on this host, but it has {torch.cuda.device_count()} GPUs. "
                    f"Use --nproc_per_node={torch.cuda.device_count()}."
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in env and "MASTER_ADDR" in env:
            _join(backend, restart)
        else:
            dist.init_process_group(backend, timeout=_TIMEOUT, rank=0, world_size=1, store=dist.HashStore())
        return cls(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=local_rank,
            local_size=local_size,
            restart=restart,
            device=device,
        )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes: rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it. Integers give the same bits in any order.

        Raises RuntimeError when a peer is lost; torchrun then restarts all ranks.
        """
        dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value of a picklable object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def on_main(self, action: Callable[[], _Result]) -> _Result | None:
        """Run `action` on rank 0 and return its result there, None elsewhere. All ranks must call.

        When it raises, every rank raises: rank 0 its own error, the others a UserError with the same words, or a
        RuntimeError that quotes it. Without that they would wait for a rank that is gone.
        """
        result = None
        if self.is_main:
            try:
                result = action()
            except BaseException as error:
                self.broadcast((isinstance(error, UserError), f"{error}" or type(error).__name__))
                raise
        told = self.broadcast(None)
        if told is not None:
            is_users, text = told
            raise UserError(text) if is_users else RuntimeError(f"rank 0: {text}")
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value of a picklable object, in order of rank, on every rank."""
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def gather_rows(self, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate the rows of all ranks, in order of rank.

        ids: (n,) int64, scores: (n,) float32, n may differ between ranks. Returns both over all ranks, on the CPU.
        """
        ids, scores = ids.cpu(), scores.cpu()
        counts = self.sum(torch.eye(self.size, dtype=torch.int64)[self.rank] * len(ids)).tolist()
        longest = max(counts)
        padded_ids, padded_scores = torch.zeros(longest, dtype=torch.int64), torch.zeros(longest)
        padded_ids[: len(ids)], padded_scores[: len(ids)] = ids, scores
        all_ids = [torch.empty_like(padded_ids) for _ in counts]
        all_scores = [torch.empty_like(padded_scores) for _ in counts]
        dist.all_gather(all_ids, padded_ids)
        dist.all_gather(all_scores, padded_scores)
        return (
            torch.cat([rows[:count] for rows, count in zip(all_ids, counts, strict=True)]),
            torch.cat([rows[:count] for rows, count in zip(all_scores, counts, strict=True)]),
        )

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers (batch statistics), as DDP does before each forward."""
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1, dtype=torch.int64))

    def close(self) -> None:
        """Leave the process group, once all ranks are here."""
        # Gloo's threads hold on to the last tensors they worked on. Some versions free them while the group is
        # destroyed, which deadlocks where Python owns a tensor (seen with 2.7 in 2 of 3 runs of 4 ranks). Their last
        # work is therefore on a tensor that outlives the group.
        kept = torch.zeros(1, dtype=torch.int64)
        for _ in range(_GLOO_THREADS):
            self.sum(kept)
        dist.destroy_process_group()

    def abandon(self) -> None:
        """Leave without the others, after an error: they see the connection close when this process ends."""
        if self.size == 1:
            self.close()


def _join(backend: str, restart: int) -> None:
    """Join the group that torchrun's environment describes, under a prefix of this restart's own.

    torchrun shares one store between all attempts of a job, and gloo then reads the addresses that killed workers
    left there and fails to connect (pytorch/pytorch#135712). On one host the restart count tells attempts apart; on
    several it may differ between agents, so there the launcher has to set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt-{restart}", store)
    dist.init_process_group(backend, timeout=_TIMEOUT, store=store, rank=rank, world_size=size)


class LaggedRead:
    """Reads small device tensors one step late, so that the host never waits for the step it has just launched."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def swap(self, values: Tensor) -> list[int] | None:
        """Keep this step's values and return the last step's, None at the first step."""
        previous = self.flush()
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values
        return previous

    def flush(self) -> list[int] | None:
        """Return the values that were kept, waiting for them, and keep none."""
        if self._host is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        values: list[int] = self._host.tolist()
        self._host, self._event = None, None
        return values
