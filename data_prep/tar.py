"""Shards as tars: what webdataset's TarWriter writes, byte for byte, without torch and in a tenth of the time.

Measured with photographs of 110 kB: TarWriter takes 64 µs a sample, this one 6, writing itself apart; and importing
TarWriter takes torch with it, 1.4 s of a core. A test holds the two writers against each other.
"""

import tarfile
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

BLOCK = 512  # bytes: a tar's headers take one, and file contents are padded to whole ones
RECORD = 20 * BLOCK  # a tar's size is a multiple of it

_READ_BEHIND_END = 1 << 20

Sizes = TypeVar("Sizes", int, np.ndarray)

_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)


class Writable(Protocol):
    """What a tar is written to, from its first byte on."""

    def write(self, data: bytes, /) -> object:
        """Append bytes."""


def tar_bytes(sizes: Sizes) -> Sizes:
    """Bytes that an image of this size, or each of an array of sizes, takes in a shard with its .cls and headers."""
    return 3 * BLOCK + (sizes + BLOCK - 1) // BLOCK * BLOCK


def bytes_behind_end(path: Path, mark: int) -> str:
    """What follows the mark of a tar's end, as where tars were joined with cat: text for a message, or empty.

    mark: its offset. Zeros are padding, and so is what fills the last record; of the rest the beginning is read.
    Raises OSError.
    """
    end = -(-(mark + 2 * BLOCK) // RECORD) * RECORD
    behind = path.stat().st_size - end
    if behind <= 0:
        return ""
    with path.open("rb") as file:
        file.seek(mark)
        if file.read(BLOCK).strip(b"\0"):
            return ""  # a damaged header, which is another fault
        file.seek(end)
        is_padding = not file.read(_READ_BEHIND_END).strip(b"\0")
    return "" if is_padding else f"{behind:,} bytes follow the tar's end at offset {end:,}"


class TarWriter:
    """Writes samples to a tar. Times, owners and modes are fixed, so equal samples give equal bytes.

    file: written from its start. offset: where the next header goes.
    """

    def __init__(self, file: Writable) -> None:
        self.file, self.offset = file, 0
        header = tarfile.TarInfo()
        header.mode = 0o444
        self._header = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
        self._header[_NAME], self._header[_SIZE], self._header[_CHECKSUM] = bytes(100), bytes(12), b" " * 8
        self._sum = sum(self._header)

    def write(self, files: list[tuple[str, bytes]]) -> list[int]:
        """Append files, ASCII names of at most 100 characters. Returns the offset of each one's first byte."""
        parts: list[bytes] = []
        offsets = []
        for name, data in files:
            offsets.append(self.offset + BLOCK)
            parts += [self._header_of(name, len(data)), data, bytes(-len(data) % BLOCK)]
            self.offset += BLOCK + (len(data) + BLOCK - 1) // BLOCK * BLOCK
        self.file.write(b"".join(parts))  # at once: a write of a few bytes costs as much as one of a photograph
        return offsets

    def close(self) -> None:
        """Write the end of the tar. The file stays open."""
        ending = 2 * BLOCK
        ending += -(self.offset + ending) % RECORD
        self.file.write(bytes(ending))
        self.offset += ending

    def _header_of(self, name: str, size: int) -> bytes:
        encoded, octal = name.encode("ascii"), b"%011o\0" % size
        assert len(encoded) <= 100 and len(octal) == 12
        self._header[_NAME] = encoded.ljust(100, b"\0")
        self._header[_SIZE] = octal
        self._header[_CHECKSUM] = b"%06o\0 " % (self._sum + sum(encoded) + sum(octal))
        return bytes(self._header)
