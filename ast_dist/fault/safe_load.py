"""Read checkpoints that strangers made: no code of theirs runs, and nothing is allocated that the files do not hold.

torch.distributed.checkpoint stores `.metadata` as a pickle, and unpickling runs whatever a pickle asks for. Only the
classes that a metadata file of plain tensors needs are let through. Objects that are no tensors would be unpickled
without any limit by torch's planner, so a checkpoint that holds one is refused; tensors are read with
weights_only=True, and only as the metadata announces them.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from ast_dist.fault.commit import DamagedCheckpointError

METADATA_NAME = ".metadata"
# Objects whose attributes a pickle may set; they check nothing themselves, so `_checked` does.
_PLAIN_CLASSES = (ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata, _StorageInfo)

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


# The one in Python: the one in C cannot be told whose attributes are set, and grows its memo as a pickle demands.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")

    def load_build(self) -> None:
        """Set attributes of an object; those of a class or a function would outlive the checkpoint."""
        target, state = self.stack[-2:]
        if type(target) not in (*_PLAIN_CLASSES, TensorProperties):
            raise pickle.UnpicklingError(f"setting attributes of {target!r} is not allowed in a checkpoint's metadata")
        if type(target) is not TensorProperties and type(state) is not dict:
            raise pickle.UnpicklingError(f"{type(target).__name__} is set by a {type(state).__name__}, not by a dict")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _memory_format(kind: Any, name: str) -> _MEM_FORMAT_ENCODING:
    """Stands in for getattr, by which Python 3.11.0 to 3.11.3 pickle an enum's member; any other use is refused."""
    if kind is _MEM_FORMAT_ENCODING and name in _MEM_FORMAT_ENCODING.__members__:
        return _MEM_FORMAT_ENCODING[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is not allowed in a checkpoint's metadata")


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, which trusts neither the metadata nor the tensors' files.

    names: the files that may be read; None allows all that lie in the folder itself. Raises DamagedCheckpointError
    when the metadata cannot be read, asks for code to run, or does not agree with the files beside it.
    """

    def __init__(self, path: Path, names: Collection[str] | None = None) -> None:
        super().__init__(path)
        self._folder = path
        self._names = names

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = self._folder / METADATA_NAME
        try:
            # Read whole first: a pickle's own idea of its lengths must not decide what is allocated.
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # noqa: BLE001 - whatever a stranger's pickle makes of itself, it is damaged
            raise DamagedCheckpointError(f"{path}: {error!r}") from None
        if type(metadata) is not Metadata:
            raise DamagedCheckpointError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata")
        try:
            self._check(metadata)
        except DamagedCheckpointError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
            raise DamagedCheckpointError(f"{path}: not the metadata of tensors ({error!r})") from None
        # What torch's planner would only pass on.
        metadata.planner_data = None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """As torch's own, but a tensor must be what the metadata announced: torch would cast it silently."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise DamagedCheckpointError(f"{self._folder}: {item.storage_index.fqn} is not a tensor")
            info = self.storage_data[item.storage_index]
            with (self._folder / info.relative_path).open("rb") as file:
                part = cast(IO[bytes], _Part(file, info.offset, info.length))
                tensor = torch.load(part, map_location="cpu", weights_only=True)
            target = planner.resolve_tensor(item).detach()
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise DamagedCheckpointError(f"{self._folder}: {item.storage_index.fqn} is not a dense tensor")
            for dim, (first, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dim, first, length)
            if (tensor.dtype, tensor.shape) != (target.dtype, target.shape):
                raise DamagedCheckpointError(
                    f"{self._folder}: {item.storage_index.fqn} is {tensor.dtype} of {tuple(tensor.shape)}, but "
                    f"{METADATA_NAME} says {target.dtype} of {tuple(target.shape)}"
                )
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, metadata: Metadata) -> None:
        """Hold every item against the files before anything is allocated for it."""
        sizes: dict[str, int] = {}
        total_bytes = 0
        for name, item in metadata.state_dict_metadata.items():
            where = f"{self._folder / METADATA_NAME}: {str(name)[:200]}"
            if type(name) is not str or type(item) is not TensorStorageMetadata:
                raise DamagedCheckpointError(f"{where} is a {type(item).__name__}: only tensors are read")
            if type(item.properties) is not TensorProperties or not isinstance(item.properties.dtype, torch.dtype):
                raise DamagedCheckpointError(f"{where} has no type")
            numel = _numel(item.size)
            # We write each tensor in one piece: pieces could overlap, and leave holes with what memory held before.
            if len(item.chunks) != 1 or _numel(item.chunks[0].sizes) != numel:
                raise DamagedCheckpointError(f"{where} is not whole")
            for chunk in item.chunks:
                bounds = zip(chunk.offsets, chunk.sizes, item.size, strict=True)
                if any(first < 0 or first + length > size for first, length, size in bounds):
                    raise DamagedCheckpointError(f"{where} has a part outside of itself")
                info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                num_bytes = numel * item.properties.dtype.itemsize
                self._check_item(where, info, num_bytes, sizes)
                total_bytes += num_bytes
        # Many tensors may point at the same bytes of a file.
        if total_bytes > sum(sizes.values()):
            raise DamagedCheckpointError(
                f"{self._folder / METADATA_NAME}: announces {total_bytes:,} bytes of tensors, but its files hold "
                f"{sum(sizes.values()):,}"
            )

    def _check_item(self, where: str, info: _StorageInfo, expected_bytes: int, sizes: dict[str, int]) -> None:
        file_name = info.relative_path
        if type(info) is not _StorageInfo or type(file_name) is not str or Path(file_name).name != file_name:
            raise DamagedCheckpointError(f"{where} lies in {file_name!r}, which is no file of this folder")
        file = self._folder / file_name
        if file_name not in sizes:
            if (self._names is not None and file_name not in self._names) or file.is_symlink() or not file.is_file():
                raise DamagedCheckpointError(f"{where} lies in {file_name!r}, which is no file of this checkpoint")
            sizes[file_name] = file.stat().st_size
        if info.__dict__.get("transform_descriptors"):
            raise DamagedCheckpointError(f"{where} is encoded by {info.transform_descriptors}")
        if not (info.offset >= 0 and expected_bytes <= info.length <= sizes[file_name] - info.offset):
            raise DamagedCheckpointError(
                f"{where} needs {expected_bytes:,} bytes and has {info.length:,} at {info.offset:,} of {file_name}, "
                f"which holds {sizes[file_name]:,}"
            )
        with file.open("rb") as stream:
            _check_archive(where, _Part(stream, info.offset, info.length), info.length)


class _Part(io.RawIOBase):
    """A part of a file, read like a file. (torch's own goes the wrong way from the end.)"""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}")
        return self._file.seek(self._offset + start + offset) - self._offset

    def readinto(self, buffer: Any, /) -> int:
        room = memoryview(buffer).cast("B")
        return self._file.readinto(room[: max(self._length - self.tell(), 0)])


def _numel(size: torch.Size) -> int:
    if type(size) is not torch.Size or any(length < 0 for length in size):
        raise DamagedCheckpointError(f"{size!r} is not a tensor's size")
    return math.prod(size)


def _check_archive(where: str, stream: _Part, length: int) -> None:
    """Refuse an item that would grow when it is read: torch stores tensors uncompressed, in a zip file each."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{where} is not stored as a tensor ({error})") from None
    stored = sum(entry.file_size for entry in entries)
    if stored > length or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DamagedCheckpointError(f"{where} has {length:,} bytes, which would grow to {stored:,} when read")
