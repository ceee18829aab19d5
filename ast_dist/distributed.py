"""The world: which rank this is, on which device, and the few collectives that training uses."""

import functools
import gc
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
# A large checkpoint may take long to hash and to sync on a slow disk; whether it hangs is judged elsewhere.
_SAVE_TIMEOUT = timedelta(hours=2)
_GLOO_THREADS = 4
_CPU = torch.device("cpu")
# torch 2.14 renamed it, and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class World:
    """This process among all.

    rank: 0 … size - 1. size: number of processes. local_rank, local_size: the same on this host. restart: how often
    torchrun has restarted this job. device: where this rank computes. carrier: what the host's tensors travel
    through: a GPU where the group serves nothing else.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    restart: int
    device: torch.device
    carrier: torch.device = _CPU

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

    @classmethod
    def current(cls) -> "World":
        """The process group that the caller has initialised; without one, a group of one, which has no collectives.

        Opens nothing and changes nothing. device: the current GPU where the group serves GPUs and there is one.
        """
        env = os.environ
        if not (dist.is_available() and dist.is_initialized()):
            return cls(rank=0, size=1, local_rank=0, local_size=1, restart=0, device=_CPU)
        backends = dist.get_backend_config()
        has_gpu = "cuda:" in backends and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else _CPU
        return cls(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            restart=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            device=device,
            carrier=_CPU if "cpu:" in backends else device,
        )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes: rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it. Integers give the same bits in any order.

        Raises RuntimeError when a peer is lost; torchrun then restarts all ranks.
        """
        carried = values if values.device.type != "cpu" else values.to(self.carrier)
        dist.all_reduce(carried)
        return values if carried is values else values.copy_(carried)

    def new_group(self) -> "dist.ProcessGroup":
        """A group of all ranks over gloo, for a thread beside the training to use alone. All ranks must call."""
        group = dist.new_group(backend="gloo", timeout=_SAVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "all ranks are in it"
        return group

    def leave(self, group: "dist.ProcessGroup") -> None:
        """Leave a group that `new_group` made, once all ranks are here."""
        kept = _settle_threads(group)
        dist.destroy_process_group(group)
        del kept

    def broadcast(self, value: Any, group: "dist.ProcessGroup | None" = None) -> Any:
        """Rank 0's value of a picklable object, on every rank. group: one of `new_group`'s, where it is not ours."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
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

    def gather(self, value: Any, group: "dist.ProcessGroup | None" = None) -> list[Any]:
        """Every rank's value of a picklable object, in order of rank, on every rank. group: as in `broadcast`."""
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value, group=group)
        return boxes

    def gather_rows(self, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate the rows of all ranks, in order of rank.

        ids: (n,) int64, scores: (n,) float32, n may differ between ranks. Returns both over all ranks, on the CPU.
        """
        where = self.carrier
        counts = self.sum(torch.eye(self.size, dtype=torch.int64)[self.rank] * len(ids)).tolist()
        longest = max(counts)
        padded_ids = torch.zeros(longest, dtype=torch.int64, device=where)
        padded_scores = torch.zeros(longest, device=where)
        padded_ids[: len(ids)], padded_scores[: len(ids)] = ids, scores
        all_ids = [torch.empty_like(padded_ids) for _ in counts]
        all_scores = [torch.empty_like(padded_scores) for _ in counts]
        dist.all_gather(all_ids, padded_ids)
        dist.all_gather(all_scores, padded_scores)
        return (
            torch.cat([rows[:count] for rows, count in zip(all_ids, counts, strict=True)]).cpu(),
            torch.cat([rows[:count] for rows, count in zip(all_scores, counts, strict=True)]).cpu(),
        )

    def sum_later(self, values: Tensor) -> "Later":
        """Begin to sum a tensor over the ranks, in place; training goes on meanwhile. All ranks must call."""
        return Later(dist.all_reduce(values, async_op=True), values)

    def gather_later(self, values: Tensor) -> "Later":
        """Begin to gather a tensor from all ranks; training goes on meanwhile. All ranks must call.

        values: (n,), n the same on every rank. The result is (size · n,), in order of rank.
        """
        gathered = values.new_empty(self.size * len(values))
        return Later(_all_gather_single(gathered, values, async_op=True), gathered, values)

    def exchange_rows(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Send rows to other ranks and receive theirs. All ranks must call.

        rows: (n, …), first those for rank 0, then those for rank 1, and so on. send_counts, receive_counts: how many
        go to each rank and come from each. Returns the rows received, in order of the rank that sent them.
        """
        if self.size == 1:
            return rows
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts)
        return received

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers (batch statistics), as DDP does before each forward."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_dtype.values():
            # One message, not one a buffer: a ResNet-50 has 159.
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, src=0)
            for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1, dtype=torch.int64))

    def close(self) -> None:
        """Leave the process group, once all ranks are here."""
        # A DDP module that waits for the garbage collector keeps the group, whose threads then outlive the interpreter.
        gc.collect()
        kept = _settle_threads(None)
        dist.destroy_process_group()
        del kept

    def abandon(self) -> None:
        """Leave without the others, after an error: they see the connection close when this process ends."""
        if self.size == 1:
            self.close()


def _settle_threads(group: "dist.ProcessGroup | None") -> Tensor:
    """Give a group's threads work on a tensor that must outlive the group.

    Gloo's threads hold on to the last tensors they worked on. Some versions free them while the group is destroyed,
    which deadlocks where Python owns a tensor (seen with 2.7 in 2 of 3 runs of 4 ranks).
    """
    kept = torch.zeros(1, dtype=torch.int64)
    for _ in range(_GLOO_THREADS):
        dist.all_reduce(kept, group=group)
    return kept


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


class Later:
    """A tensor that a collective is filling: the ranks go on, and the host reads it when it is needed.

    work: the collective under way. result: what it fills, on the device. inputs: what it reads.
    """

    def __init__(self, work: "dist.Work | None", result: Tensor, *inputs: Tensor) -> None:
        assert work is not None, "this rank is not in the group"
        self._work = work
        # The memory must not be given to others while the collective or the copy is under way.
        self._kept = (result, *inputs)
        self._event: torch.cuda.Event | None = None
        self._host = result
        if result.device.type == "cuda":
            # On a stream of its own, so that training waits for neither the collective nor the copy.
            with torch.cuda.stream(_side_stream(result.device)):
                work.wait()
                self._host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                self._host.copy_(result, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def get(self) -> Tensor:
        """The result, on the CPU, once it is there. Raises RuntimeError when a peer is lost."""
        if self._event is None:
            self._work.wait()
        else:
            self._event.synchronize()
        return self._host


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
