"""What a committed checkpoint holds, read without a process group, and without trust in who made it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ast_dist.errors import described
from ast_dist.fault import commit
from ast_dist.fault.commit import DamagedCheckpointError
from ast_dist.fault.safe_load import METADATA_NAME, SafeReader
from ast_dist.fault.state import hash_state, join, split

STATE_NAME = "state.json"


def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a committed checkpoint whole, without a process group.

    Returns the state (as TrainState.state_dict gives it, with the random states of all ranks) and the session's
    record. Raises DamagedCheckpointError when the folder does not verify, when its metadata asks for code to run, or
    when its parts do not agree with each other.
    """
    return read_verified(checkpoint, verified_reader(checkpoint))


def verified_reader(checkpoint: Path) -> SafeReader:
    """A reader of the files that the manifest names, all of them verified."""
    names = commit.verify(checkpoint)["files"].keys()
    for name in (METADATA_NAME, STATE_NAME):
        if name not in names:
            raise DamagedCheckpointError(f"{checkpoint / name}: missing")
    return SafeReader(checkpoint, names)


def read_verified(checkpoint: Path, reader: SafeReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `read`, of a checkpoint whose files were verified before."""
    metadata = reader.read_metadata()
    tensors = {
        name: torch.zeros(item.size, dtype=item.properties.dtype)
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            # Loading without a process group is what is meant here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        _, (first, _) = next(iter(error.failures.items()))
        if isinstance(first, DamagedCheckpointError):
            raise first from None
        raise DamagedCheckpointError(f"{checkpoint}: its tensors cannot be read ({described(first)})") from None
    path = checkpoint / STATE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return join(tensors, content["state"]), dict(content["session"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: not a state ({error!r})") from None


def difference(expected: dict[str, Any], held: dict[str, Any]) -> str:
    """The first thing in which two states differ, in words."""
    (before, plain_before), (after, plain_after) = split(expected), split(held)
    for name, tensor in before.items():
        other = after.get(name)
        if other is None:
            return f"{name} is missing"
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return f"{name} was {tensor.dtype} {tuple(tensor.shape)}, is {other.dtype} {tuple(other.shape)}"
        if hash_state({name: tensor}) != hash_state({name: other}):
            return f"{name} has other values"
    keys = sorted(key for key in plain_before if json.dumps(plain_before[key]) != json.dumps(plain_after.get(key)))
    return ", ".join(keys) or "it holds more than was saved"
