"""Read checkpoints that strangers made: no code of theirs runs.

torch.distributed.checkpoint stores `.metadata` as a pickle, and unpickling runs whatever a pickle asks for. Only the
classes that a metadata file of plain tensors needs are let through; tensors are read with weights_only=True.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from ast_dist.fault.commit import DamagedCheckpointError

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")


def _memory_format(kind: Any, name: str) -> _MEM_FORMAT_ENCODING:
    """Stands in for getattr, by which Python 3.11.0 to 3.11.3 pickle an enum's member; any other use is refused."""
    if kind is _MEM_FORMAT_ENCODING and name in _MEM_FORMAT_ENCODING.__members__:
        return _MEM_FORMAT_ENCODING[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is not allowed in a checkpoint's metadata")


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, with the metadata's pickle held to an allow-list.

    Raises DamagedCheckpointError when the metadata cannot be read or asks for anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise DamagedCheckpointError(f"{path}: {error}") from None
        if not isinstance(metadata, Metadata):
            raise DamagedCheckpointError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata
