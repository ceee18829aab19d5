"""Write a checkpoint and commit it: what the thread of each rank does, over a process group of its own."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ast_dist.distributed import World
from ast_dist.errors import described
from ast_dist.fault import commit
from ast_dist.fault.commit import DamagedCheckpointError, UnflushedError
from ast_dist.fault.contents import STATE_NAME
from ast_dist.fault.lease import LostLeaseError
from ast_dist.fault.retention import to_prune
from ast_dist.fault.safe_load import SafeReader
from ast_dist.fault.staging import Staged, first_nonfinite

# Folders of the state whose numbers must be finite; a gate's memory holds NaN for what it has not seen.
_FINITE = ("model", "optimizer", "ema")


@dataclass(frozen=True)
class Ended:
    """How a save ended. Every rank holds the same, but for the times, which are its own.

    why: what kept it from being saved. remarks: what went wrong beside it. save_s: from its start until it was
    committed. copy_s: for how long copying held up the GPU. verified_at: when every file was read back and agreed with
    its SHA-256, seconds since 1970; None where that could not be done.
    """

    name: str
    kind: Literal["saved", "refused", "nonfinite", "lost lease"]
    why: str = ""
    remarks: tuple[str, ...] = ()
    save_s: float = 0.0
    copy_s: float = 0.0
    verified_at: float | None = None


@dataclass
class Flight:
    """The save under way. error: what ended its thread on this rank before the ranks could agree on an end."""

    name: str
    staged: Staged
    content: str
    about: dict[str, Any]
    began: float
    is_done: threading.Event = field(default_factory=threading.Event)
    is_seen: bool = False
    ended: Ended | None = None
    error: BaseException | None = None


class CheckpointWriter:
    """Writes, commits and prunes the checkpoints of one folder. Arguments and `fence`: as Checkpoints has them."""

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every_h: float) -> None:
        self.folder = folder
        self.world = world
        self.fence: Callable[[], None] = lambda: None
        self._keep_last = keep_last
        self._keep_every_h = keep_every_h
        self._group = world.new_group()

    def _saved(self, flight: Flight) -> Ended:
        """Write, commit, and agree with the other ranks on how it ended."""
        world, group = self.world, self._group
        copy_s = flight.staged.wait()
        problems = world.gather(self._prepare(flight), group)
        ended = next((problem for problem in problems if problem), None)
        failure = None if ended else self._write_failure(flight)
        if world.is_main:
            ended = self._concluded(flight, ended, failure)
        ended = world.broadcast(ended, group)
        return dataclasses.replace(ended, save_s=time.monotonic() - flight.began, copy_s=copy_s)

    def _prepare(self, flight: Flight) -> Ended | None:
        """What this rank has against the save; None where nothing. Rank 0 makes the stage folder."""
        where = first_nonfinite(flight.staged.tensors, _FINITE)
        if where is not None:
            return Ended(flight.name, "nonfinite", f"{where} holds NaN or infinity on rank {self.world.rank}")
        if not self.world.is_main:
            return None
        try:
            self.fence()
            if self._is_there(flight.name):
                return Ended(flight.name, "saved", verified_at=time.time())
            commit.new_stage(self.folder, flight.name)
            free, needed = self._free_bytes(), self._needed_bytes(flight)
            if free < needed:
                # What a smaller keep_last or a pruning that failed has left.
                self._prune()
                free = self._free_bytes()
            if free < needed:
                return Ended(flight.name, "refused", f"it needs {needed:,} bytes, but {free:,} are free")
        except LostLeaseError as error:
            return Ended(flight.name, "lost lease", str(error))
        except OSError as error:
            return Ended(flight.name, "refused", f"{described(error)}; {self._room(flight)}")
        return None

    def _is_there(self, name: str) -> bool:
        """Whether this step is committed already, and sound; what is not is moved aside."""
        checkpoint = self.folder / name
        if not checkpoint.exists():
            return False
        try:
            commit.verify(checkpoint)
        except DamagedCheckpointError:
            commit.quarantine(checkpoint)
            return False
        return True

    def _write_failure(self, flight: Flight) -> str | None:
        try:
            self._write(commit.stage_path(self.folder, flight.name), flight.staged.tensors)
        except CheckpointException as error:  # all ranks get it alike
            rank, (first, _) = next(iter(error.failures.items()))
            return f"{described(first)}, on rank {rank}"
        return None

    def _concluded(self, flight: Flight, ended: Ended | None, failure: str | None) -> Ended:
        """Commit, or clear up after what failed. Rank 0 calls it. failure: what kept it from being written."""
        if ended is None and failure is None:
            try:
                self._commit(flight)
            except UnflushedError as error:
                # Nothing older is removed: it may have to stand in.
                return Ended(flight.name, "saved", remarks=(f"{self.folder}: cannot be flushed ({described(error)})",))
            except LostLeaseError as error:
                ended = Ended(flight.name, "lost lease", str(error))
            except (OSError, ValueError, DamagedCheckpointError) as error:
                failure = described(error)
            else:
                return self._checked(flight.name)
        if ended and ended.kind in ("saved", "lost lease"):
            return ended  # what stands at the stage's path may be the new owner's
        # The half that was written holds room that the next try needs.
        shutil.rmtree(commit.stage_path(self.folder, flight.name), ignore_errors=True)
        return ended or Ended(flight.name, "refused", f"{failure}; {self._room(flight)}")

    def _checked(self, name: str) -> Ended:
        """Read back what was committed, and remove what nobody would miss any more."""
        try:
            commit.verify(self.folder / name)
        except DamagedCheckpointError as error:
            # The checkpoints before it are still there: nothing was pruned.
            return Ended(name, "refused", f"{error}; moved to {commit.quarantine(self.folder / name).name}")
        except OSError as error:
            return Ended(name, "saved", remarks=(f"{self.folder / name}: cannot be read back ({described(error)})",))
        verified_at = time.time()
        try:
            self._prune()
        except OSError as error:
            remark = f"{self.folder}: old checkpoints are not removed ({error})"
            return Ended(name, "saved", remarks=(remark,), verified_at=verified_at)
        return Ended(name, "saved", verified_at=verified_at)

    def _write(self, stage: Path, tensors: dict[str, torch.Tensor]) -> None:
        # thread_count above 1 was seen to lose items on an I/O error. A host syncs what it wrote itself: the fsync at
        # the commit is rank 0's host's.
        has_hosts = self.world.local_size < self.world.size
        writer = dcp.FileSystemWriter(stage, thread_count=1, sync_files=has_hosts, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=self._group)

    def _commit(self, flight: Flight) -> None:
        stage = commit.stage_path(self.folder, flight.name)
        # Raises where an item is missing.
        SafeReader(stage).read_metadata()
        (stage / STATE_NAME).write_text(flight.content, encoding="utf-8")
        commit.commit(stage, self.folder / flight.name, flight.about, self.fence)

    def _prune(self) -> None:
        commit.remove(self.folder, to_prune(commit.saved(self.folder), self._keep_last, self._keep_every_h))

    def _needed_bytes(self, flight: Flight) -> int:
        """Bytes of the whole checkpoint: tensors, their archives' headers and metadata, each rank's random state."""
        staged = flight.staged
        return staged.num_bytes + 2048 * len(staged.tensors) + 16384 * self.world.size + 2 * len(flight.content)

    def _room(self, flight: Flight) -> str:
        return f"it needs {self._needed_bytes(flight):,} bytes, and {self._free_bytes():,} are free"

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free
