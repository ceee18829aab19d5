"""What a source says of itself before any image is read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Listing:
    """The samples of one split, in an order that depends on the source alone.

    format: the source's name. classes: names; a class's number is its position. names: N names a person can find the
    sample by, unique, ending in the image's extension (`airplane/0001.jpg`). labels: (N,) int32 class numbers.
    sizes: (N,) int64 bytes of each encoded image, from which the shards are planned. stamps: (N,) int64, changed
    whenever the sample's bytes change (a file's modification time). read: gives the encoded bytes of a name; it is
    pickled and runs in worker processes, and raises OSError when the bytes cannot be had. passed_over: files that
    are no images, by extension.
    """

    format: str
    classes: list[str]
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    stamps: np.ndarray
    read: Callable[[str], bytes]
    passed_over: dict[str, int] = field(default_factory=dict)
