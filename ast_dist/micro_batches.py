"""How a rank's share of a global batch is cut where it does not fit the device at once."""

from dataclasses import dataclass

import numpy as np

from ast_dist.data.batch import MIN_ROWS


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    rows: (size,) int64 row numbers. is_own: (size,) bool; False marks a row that only fills up: it must not train.
    """

    rows: np.ndarray
    is_own: np.ndarray


def micro_batches(num_rows: int, largest_share: int, limit: int) -> list[MicroBatch]:
    """Cut a rank's rows into as few micro-batches as `limit` allows, as many and as large on every rank.

    Ranks must agree on the number, because synchronised batch statistics and DDP's buffers meet in every forward
    pass; a rank with fewer rows repeats its last one. Row order is kept, and the repeated rows come last.

    num_rows: of this rank, at least 1. largest_share: rows of the rank that has most. limit: samples at once, ≥ 2.
    """
    most = max(largest_share, num_rows, MIN_ROWS)
    count = -(-most // limit)
    size = -(-most // count)
    places = np.arange(count * size).reshape(count, size)
    return [MicroBatch(np.minimum(part, num_rows - 1), part < num_rows) for part in places]
