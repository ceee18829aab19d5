"""Save and load checkpoints: sharded by torch.distributed.checkpoint, committed as commit.py says.

A checkpoint is a folder `step-00000160`: `.metadata` and `__R_0.distcp` (tensors), state.json (plain values),
manifest.json (SHA-256 of every file). All ranks enter `save` and `load`.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ast_dist.distributed import World
from ast_dist.fault import commit
from ast_dist.fault.safe_load import SafeReader
from ast_dist.fault.state import TrainState, hash_state, join, split

_STATE_NAME = "state.json"
_FAILURES_LIMIT = 3


def checkpoint_name(global_step: int) -> str:
    """The folder of a step's checkpoint; names sort by step."""
    return f"step-{global_step:08d}"


class Checkpoints:
    """The checkpoints of one run.

    folder: RUN/checkpoints, on storage that all ranks see. keep_last: newest ones kept; the one with the best
    validation accuracy is kept besides.
    """

    def __init__(self, folder: Path, world: World, keep_last: int) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.newest: str | None = None
        self._failures = 0

    def save(
        self,
        state: TrainState,
        val_acc1: float | None = None,
        val_ema_acc1: float | None = None,
        name: str | None = None,
    ) -> Path | None:
        """Commit a checkpoint of this step on all ranks. Returns its path, or None when the disk refused it.

        val_acc1, val_ema_acc1: validation accuracy of exactly these weights and of their average, percent; None where
        they were not evaluated. name: of the checkpoint's folder, checkpoint_name of the step unless given.
        A failed save warns and training goes on with the previous checkpoint standing; the third failure in a row
        raises RuntimeError. A step that is already committed is not saved again.
        """
        name = name or checkpoint_name(state.global_step)
        final = self.folder / name
        if self.world.broadcast(final.exists()):
            self.newest = name
            return final
        # Each rank keeps its own batch statistics between forwards, and the checkpoint holds one copy of each.
        self.world.broadcast_buffers(state.model)
        if state.average:
            self.world.broadcast_buffers(state.average.module)
        tensors, plain = split(state.state_dict(self.world.rank))
        try:
            self.world.on_main(lambda: commit.new_stage(self.folder, name))
            self._write(commit.stage_path(self.folder, name), tensors)
            about = {"step": state.global_step, "val_acc1": val_acc1, "val_ema_acc1": val_ema_acc1}
            self.world.on_main(lambda: self._commit(name, plain, state, about))
        except (OSError, RuntimeError, ValueError) as error:
            self._refused(name, error)
            return None
        if self.world.is_main:
            self._prune()
        self._failures = 0
        self.newest = name
        return final

    def _refused(self, name: str, error: Exception) -> None:
        """Count a save that failed, on every rank alike; warn, and raise at the third in a row."""
        self._failures += 1
        free_mb = shutil.disk_usage(self.folder.parent).free / 1e6
        message = (
            f"checkpoint {self.folder / name} was not saved ({error}); {free_mb:,.0f} MB are free there; "
            f"the last good one is {self.newest}"
        )
        if self._failures >= _FAILURES_LIMIT:
            raise RuntimeError(f"{message}; that was failure {self._failures} in a row") from error
        if self.world.is_main:
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def find(self) -> Path | None:
        """The newest checkpoint that verifies, agreed on by all ranks; None where there is none.

        Damaged ones are moved aside to `.corrupt-…`, with a warning that names the file.
        """
        found: Path | None = None
        if self.world.is_main:
            for checkpoint in reversed(commit.committed(self.folder)):
                try:
                    commit.verify(checkpoint)
                    SafeReader(checkpoint).read_metadata()
                except commit.DamagedCheckpointError as error:
                    aside = commit.quarantine(checkpoint)
                    message = f"{error}; moved to {aside.name}, trying the one before"
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
                else:
                    found = checkpoint
                    break
        return self.world.broadcast(found)

    def load(self, checkpoint: Path, state: TrainState) -> None:
        """Restore a verified checkpoint into `state`. Raises RuntimeError when ranks then hold different states."""
        loaded, session = _read_verified(checkpoint)
        state.load_state_dict(loaded, self.world.rank)
        state.session = session
        self.newest = checkpoint.name
        hashes = set(self.world.gather(hash_state(state.state_dict(self.world.rank), with_rng=False)))
        if len(hashes) != 1:
            raise RuntimeError(f"{checkpoint}: ranks hold {len(hashes)} different states after loading")

    def _write(self, stage: Path, tensors: dict[str, torch.Tensor]) -> None:
        try:
            # thread_count above 1 was seen to lose items on an I/O error.
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(stage, thread_count=1, sync_files=False))
        except CheckpointException as error:
            rank, (first, _) = next(iter(error.failures.items()))
            raise RuntimeError(f"rank {rank}: {first}") from error

    def _commit(self, name: str, plain: dict[str, Any], state: TrainState, about: dict[str, Any]) -> None:
        stage = commit.stage_path(self.folder, name)
        content = {"state": plain, "session": state.session}
        (stage / _STATE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        commit.commit(stage, self.folder / name, about)

    def _prune(self) -> None:
        """Remove old checkpoints; the new one is committed, so a failure here is no failure of the save."""
        best = commit.best(self.folder)
        try:
            commit.prune(self.folder, self.keep_last, {best} if best else set())
        except OSError as error:
            warnings.warn(f"{self.folder}: old checkpoints are not removed ({error})", RuntimeWarning, stacklevel=2)


def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a committed checkpoint whole, without a process group.

    Returns the state (as TrainState.state_dict gives it, with the random states of all ranks) and the session's
    record. Raises DamagedCheckpointError when the folder does not verify or its metadata asks for code to run.
    """
    commit.verify(checkpoint)
    return _read_verified(checkpoint)


def _read_verified(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = SafeReader(checkpoint).read_metadata()
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # Loading without a process group is what is meant here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(tensors, storage_reader=SafeReader(checkpoint), no_dist=True)
    content = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8"))
    return join(tensors, content["state"]), content["session"]
