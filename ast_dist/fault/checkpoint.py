"""Save and load checkpoints: sharded by torch.distributed.checkpoint, committed as commit.py says.

A checkpoint is a folder `step-00000160`: `.metadata` and `__R_0.distcp` (tensors), state.json (plain values),
manifest.json (SHA-256 of every file). All ranks enter `save` and `load`.
"""

import json
import os
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

    def save(self, state: TrainState) -> Path | None:
        """Commit a checkpoint of this step on all ranks. Returns its path, or None when the disk refused it.

        A failed save warns and training goes on with the previous checkpoint standing; the third failure in a row
        raises RuntimeError. A step that is already committed is not saved again.
        """
        name = f"step-{state.global_step:08d}"
        final = self.folder / name
        if self.world.broadcast(final.exists()):
            return final
        # Each rank keeps its own batch statistics between forwards, and the checkpoint holds one copy of each.
        self.world.broadcast_buffers(state.model)
        tensors, plain = split(state.state_dict(self.world.rank))
        error: BaseException | None = self._on_main(lambda: commit.new_stage(self.folder, name))
        if error is None:
            error = self._write(commit.stage_path(self.folder, name), tensors)
        if error is None:
            error = self._on_main(lambda: self._commit(name, plain, state))
        if error is None:
            self._failures = 0
            self.newest = name
            return final
        self._failures += 1
        message = f"checkpoint {final} was not saved ({error}); the last good one is {self.newest}"
        if self._failures >= _FAILURES_LIMIT:
            raise RuntimeError(f"{message}; that was failure {self._failures} in a row")
        if self.world.is_main:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None

    def find(self) -> Path | None:
        """The newest checkpoint that verifies, agreed on by all ranks; None where there is none.

        Damaged ones are moved aside to `.corrupt-…`, with a warning that names the file.
        """
        found: Path | None = None
        if self.world.is_main:
            for checkpoint in reversed(commit.committed(self.folder)):
                try:
                    commit.verify(checkpoint)
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
        loaded, session = read(checkpoint)
        state.load_state_dict(loaded, self.world.rank)
        state.session = session
        self.newest = checkpoint.name
        hashes = set(self.world.gather(hash_state(state.state_dict(self.world.rank), with_rng=False)))
        if len(hashes) != 1:
            raise RuntimeError(f"{checkpoint}: ranks hold {len(hashes)} different states after loading")

    def _write(self, stage: Path, tensors: dict[str, torch.Tensor]) -> BaseException | None:
        try:
            # thread_count above 1 was seen to lose items on an I/O error.
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(stage, thread_count=1, sync_files=False))
        except CheckpointException as error:
            return next(iter(error.failures.values()))[0]
        return None

    def _commit(self, name: str, plain: dict[str, Any], state: TrainState) -> None:
        stage = commit.stage_path(self.folder, name)
        content = {"state": plain, "session": state.session}
        (stage / _STATE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        commit.commit(stage, self.folder / name, {"step": state.global_step, "val_acc1": self._fresh_acc1(state)})
        commit.prune(self.folder, self.keep_last, self._best())

    def _fresh_acc1(self, state: TrainState) -> float | None:
        """The validation accuracy of exactly these weights: between epochs there is one."""
        return state.last_acc1 if state.step_in_epoch == 0 else None

    def _best(self) -> set[str]:
        scores = {}
        for checkpoint in commit.committed(self.folder):
            score = json.loads((checkpoint / commit.MANIFEST_NAME).read_text(encoding="utf-8")).get("val_acc1")
            if score is not None:
                scores[checkpoint.name] = score
        return {max(scores, key=lambda name: (scores[name], name))} if scores else set()

    def _on_main(self, action: Any) -> Exception | None:
        """Run `action` on rank 0; every rank learns what went wrong, if anything did."""
        failure: Exception | None = None
        if self.world.is_main:
            try:
                action()
            except OSError as error:
                failure = OSError(error.errno, os.strerror(error.errno) if error.errno else str(error))
        return self.world.broadcast(failure)


def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a committed checkpoint whole, without a process group.

    Returns the state (as TrainState.state_dict gives it, with the random states of all ranks) and the session's
    record. Raises DamagedCheckpointError when the folder does not verify or its metadata asks for code to run.
    """
    commit.verify(checkpoint)
    reader = SafeReader(checkpoint)
    metadata = reader.read_metadata()
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
