"""Read encoded images by position: one pread a sample, checked against the index.

    reader.will_need(ids)          soon: the system reads ahead, or remote shards are fetched
    data = reader.read(sample_id)  now

What is wrong with a sample is a DamagedSampleError, and training goes on without it. What is wrong with the disk, the
server or the network is not: after a few tries it ends the run, which resumes when they are back. Otherwise a dead
file server would look like an epoch of damaged samples.
"""

import contextlib
import errno
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ast_dist.data.checksum import crc32
from ast_dist.data.index import Index
from ast_dist.data.shard_cache import ShardCache

_OPEN_SHARDS = 64
# Linux reads ahead no more than about this much for one request; a longer one would be cut, not refused.
_ADVISED_BYTES = 128 * 1024
# Ranges of that size that one call may ask for, 512 MB: more would push out what is not yet used.
_ADVISED_RANGES = 4096
# Gaps up to this size are read, too: between neighbours in a tar lie a label and two headers.
_GAP_BYTES = 4096
# An NFS server that restarts, or a file that was replaced there, shows as one of these, and a fresh descriptor helps.
_PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}
# What says that a file is not there, or is none.
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_PAUSES_S = (0.1, 0.5, 2.0)

Result = TypeVar("Result")


class DamagedSampleError(RuntimeError):
    """A sample's bytes are not those the index describes, or they do not decode."""

    def __init__(self, sample_id: int, message: str) -> None:
        super().__init__(message)
        self.sample_id = sample_id


class Reader:
    """Random access to the samples of an Index; safe to share between threads.

    shard_cache: where the shards' files come from when they lie behind a URL; `ast_dist.data.remote.open_reader` makes
    both. samples_read counts the reads, for the cost ledger.
    """

    def __init__(self, index: Index, shard_cache: ShardCache | None = None) -> None:
        self._index = index
        self._cache = shard_cache
        self._paths = index.shard_paths
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self.samples_read = 0

    def read(self, sample_id: int) -> bytes:
        """Return the sample's encoded bytes.

        Raises DamagedSampleError when the shard ends early, the CRC-32 differs, or a file of the layout "files" is
        missing while its folder is there. Raises OSError that names the shard or file when it cannot be read: at once
        when it is gone, after four tries with fresh descriptors when the system reports an I/O error or a stale NFS
        handle. Remote shards: what `ShardCache.open` raises.
        """
        with self._lock:
            self.samples_read += 1
        if self._index.layout == "files":
            return self._read_file(sample_id)
        shard = int(self._index.shard[sample_id])
        try:
            return self._read_from_shard(sample_id, shard)
        except DamagedSampleError:
            # The copy in the cache may have been harmed since it was verified; then a fresh one has the sample.
            if self._cache is None or not self._cache.remove_damaged(shard):
                raise
        return self._read_from_shard(sample_id, shard)

    def will_need(self, ids: np.ndarray, ahead: np.ndarray | None = None) -> None:
        """Say which samples are read next: an epoch's order calls it for each batch, a few batches before its reads.

        ids: (n,) int64, one batch. ahead: (m,) int64, samples further on; they matter for remote shards only, which
        are fetched that much earlier where the cache has room.
        Does not wait. Local files: the system is told to read ahead, at most 512 MB for one call, where it has
        posix_fadvise. A shard that cannot be opened is passed over: `read` will tell.
        Raises UserError when the shards of one batch do not fit into the cache of remote shards.
        """
        if self._cache is not None:
            later = () if ahead is None else _distinct(self._index.shard[ahead])
            self._cache.will_need(_distinct(self._index.shard[ids]), later)
        elif hasattr(os, "posix_fadvise") and self._index.layout == "shards":
            shard, left = self._index.shard[ids], _ADVISED_RANGES
            for number in _distinct(shard):
                rows = ids[shard == number]
                ranges = list(itertools.islice(_merged(self._index.offset[rows], self._index.size[rows]), left))
                self._advise(number, ranges)
                left -= len(ranges)

    def stop(self) -> None:
        """Begin no further fetch: whoever closes a reader while others read calls this first."""
        if self._cache is not None:
            self._cache.stop()

    def close(self) -> None:
        """Close all shards, and stop fetching."""
        if self._cache is not None:
            self._cache.close()
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _read_from_shard(self, sample_id: int, shard: int) -> bytes:
        index = self._index
        offset, size = int(index.offset[sample_id]), int(index.size[sample_id])
        data, length = _with_retries(
            self._paths[shard], lambda: self._bytes(shard, offset, size), lambda: self._forget(shard)
        )
        where = f"{self._paths[shard].name}: sample {index.key(sample_id)} (id {sample_id})"
        if len(data) < size:
            raise DamagedSampleError(
                sample_id, f"{where} needs {size:,} bytes at offset {offset:,}, but the file ends at {length:,}."
            )
        return self._checked(sample_id, data, int(index.crc32[sample_id]), where)

    def _read_file(self, sample_id: int) -> bytes:
        key, size = self._index.key(sample_id), int(self._index.size[sample_id])
        path = Path(self._index.data_root, key)
        try:
            data = _with_retries(path, path.read_bytes)
        except OSError as error:
            # Only what is wrong with this one file; all else is the disk's, the server's or the process's.
            if error.errno not in _GONE or not Path(self._index.data_root).is_dir():
                raise
            raise DamagedSampleError(
                sample_id, f"{path}: sample {key} (id {sample_id}) cannot be read ({error.strerror})."
            ) from None
        where = f"{path}: sample {key} (id {sample_id})"
        if size and len(data) != size:
            raise DamagedSampleError(sample_id, f"{where} has {len(data):,} bytes, but the index states {size:,}.")
        stated = int(self._index.crc32[sample_id])
        return self._checked(sample_id, data, stated, where) if stated else data

    def _checked(self, sample_id: int, data: bytes, stated: int, where: str) -> bytes:
        checksum = crc32(data)
        if checksum != stated:
            raise DamagedSampleError(
                sample_id, f"{where} has CRC-32 {checksum:08x}, but the index states {stated:08x}."
            )
        return data

    def _bytes(self, shard: int, offset: int, size: int) -> tuple[bytes, int]:
        """Up to `size` bytes of a shard, and the shard's length where there are fewer."""
        file = self._descriptor(shard)
        try:
            data = os.pread(file, size, offset)
            while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more  # interrupted on the way: NFS may do that
            return data, os.fstat(file).st_size if len(data) < size else 0
        finally:
            os.close(file)

    def _advise(self, shard: int, ranges: list[tuple[int, int]]) -> None:
        try:
            file = self._descriptor(shard)
        except OSError:
            return
        try:
            for start, length in ranges:
                os.posix_fadvise(file, start, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)

    def _descriptor(self, shard: int) -> int:
        """A descriptor of the shard's file that the caller closes."""
        if self._cache is not None:
            # Not kept open: the cache's disk space would only be free again once the last descriptor is closed.
            return self._cache.open(shard)
        # The descriptor is duplicated under the lock, so that another thread's eviction cannot close it mid-read.
        with self._lock:
            return os.dup(self._open(shard))

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def _forget(self, shard: int) -> None:
        with self._lock, contextlib.suppress(KeyError, OSError):
            os.close(self._files.pop(shard))


def _with_retries(path: Path, attempt: Callable[[], Result], forget: Callable[[], None] = lambda: None) -> Result:
    """What `attempt` returns, tried again after a pause where an error of the file system may pass.

    forget: drops the descriptor that failed. Raises the OSError with the path and the number of tries in it.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return attempt()
        except OSError as error:
            if error.errno not in _PASSING_ERRORS:
                raise
            forget()
            if pause_s is None:
                said = f"{error.strerror}, in {len(_PAUSES_S) + 1} tries with fresh descriptors"
                raise OSError(error.errno, said, str(path)) from None
        time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _distinct(numbers: np.ndarray) -> Sequence[int]:
    """Each number once, in the order of its first place."""
    return list(dict.fromkeys(numbers.tolist()))


def _merged(offsets: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of one file as (start, length), neighbours joined, none longer than the system reads ahead."""
    order = np.argsort(offsets)
    starts, ends = offsets[order], (offsets + sizes)[order]
    is_first = np.concatenate([[True], starts[1:] > np.maximum.accumulate(ends)[:-1] + _GAP_BYTES])
    firsts = np.flatnonzero(is_first)
    for start, end in zip(starts[firsts].tolist(), np.maximum.reduceat(ends, firsts).tolist(), strict=True):
        for position in range(start, end, _ADVISED_BYTES):
            yield position, min(_ADVISED_BYTES, end - position)
