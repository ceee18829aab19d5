"""Read encoded images by position: one pread a sample, checked against the index."""

import os
import threading
import zlib
from collections import OrderedDict

from ast_dist.data.index import Index

_OPEN_SHARDS = 64


class DamagedSampleError(RuntimeError):
    """A sample's bytes are not those the index describes, or they do not decode."""

    def __init__(self, sample_id: int, message: str) -> None:
        super().__init__(message)
        self.sample_id = sample_id


class Reader:
    """Random access to the samples of an Index; safe to share between threads.

    samples_read counts the reads, for the cost ledger.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._paths = index.shard_paths
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self.samples_read = 0

    def read(self, sample_id: int) -> bytes:
        """Return the sample's encoded bytes.

        Raises DamagedSampleError when the shard ends early or the CRC-32 differs.
        """
        index = self._index
        shard, offset, size = int(index.shard[sample_id]), int(index.offset[sample_id]), int(index.size[sample_id])
        # The descriptor is duplicated under the lock, so that another thread's eviction cannot close it mid-read.
        with self._lock:
            self.samples_read += 1
            file = os.dup(self._open(shard))
        try:
            data = os.pread(file, size, offset)
            length = os.fstat(file).st_size if len(data) < size else 0
        finally:
            os.close(file)
        where = f"{self._paths[shard].name}: sample {index.key(sample_id)} (id {sample_id})"
        if len(data) < size:
            raise DamagedSampleError(
                sample_id, f"{where} needs {size:,} bytes at offset {offset:,}, but the file ends at {length:,}."
            )
        checksum = zlib.crc32(data)
        if checksum != int(index.crc32[sample_id]):
            raise DamagedSampleError(
                sample_id, f"{where} has CRC-32 {checksum:08x}, but the index states {int(index.crc32[sample_id]):08x}."
            )
        return data

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]
