"""What a source says of itself before any image is read."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from ast_dist.errors import UserError


class Reader(Protocol):
    """Gives the encoded bytes of a name. It is pickled and runs in worker processes."""

    def __call__(self, name: str, /) -> bytes:
        """Raises OSError when the bytes cannot be had."""


@runtime_checkable
class ReadsTogether(Protocol):
    """A reader for which many samples at once cost far less than one after the other."""

    def __call__(self, name: str, /) -> bytes:
        """Raises OSError when the bytes cannot be had."""

    def together(self, names: Sequence[str], between: Callable[[], None]) -> Reader:
        """A reader of these samples alone, which may hold them in memory. Raises OSError when one cannot be had.

        between: called several times a second, so that it can raise what ends the work.
        """


@dataclass(frozen=True)
class ReadMemory:
    """Gives images that are held in memory."""

    images: dict[str, bytes]

    def __call__(self, name: str) -> bytes:
        return self.images[name]


@dataclass(frozen=True)
class Listing:
    """The samples of one split, in an order that depends on the source alone.

    format: the source's name. classes: names; a class's number is its position. names: N names a person can find the
    sample by, unique. labels: (N,) int32 class numbers. sizes: (N,) int64 bytes of each encoded image, at least on
    average, from which the shards are planned. stamps: (N,) int64, changed whenever the sample's bytes change (a
    file's modification time). read: gives the encoded bytes of a name. passed_over: files that are no images, by
    extension. class_names: what people call the classes, where `classes` holds identifiers. blocks: (N,) int64 where
    samples with equal numbers are read together; None where each is read by itself.
    """

    format: str
    classes: list[str]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    stamps: np.ndarray
    read: Reader
    passed_over: dict[str, int] = field(default_factory=dict)
    class_names: list[str] | None = None
    blocks: np.ndarray | None = None


@contextlib.contextmanager
def readable(src: str) -> Iterator[None]:
    """Raise a UserError that names the file or folder where the file system refuses to read it."""
    try:
        yield
    except OSError as error:
        where = src if error.filename is None else error.filename
        raise UserError(
            f"{where}: cannot be read ({error.strerror or error}). Make it readable, or move it away."
        ) from None
