"""Which checkpoints are kept. A pure function; the disk is commit.py's."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, as its manifest tells.

    acc1: validation accuracy of the better of its weights and their average, percent, None where neither was evaluated.
    total_s: seconds of
    training until then, over all sessions, None where unknown.
    """

    name: str
    acc1: float | None = None
    total_s: float | None = None


def best(saved: Sequence[Saved]) -> Saved | None:
    """The one of the highest accuracy, the newest of equals; None where none was evaluated. saved: the newest last."""
    evaluated = [(item.acc1, place) for place, item in enumerate(saved) if item.acc1 is not None]
    return saved[max(evaluated)[1]] if evaluated else None


def to_prune(saved: Sequence[Saved], keep_last: int, keep_every_h: float) -> list[str]:
    """Names of the checkpoints to remove, the oldest first.

    saved: the newest last. Kept are the newest keep_last, the best, and one for every keep_every_h hours of training
    (0: none): the first that lies so far behind the one kept before it. A checkpoint kept for its hours stays kept,
    whatever is removed and added meanwhile.
    """
    kept = {item.name for item in saved[-keep_last:]}
    if found := best(saved):
        kept.add(found.name)
    next_s = keep_every_h * 3600.0
    for item in saved:
        if keep_every_h > 0 and item.total_s is not None and item.total_s >= next_s:
            kept.add(item.name)
            next_s = item.total_s + keep_every_h * 3600.0
    return [item.name for item in saved if item.name not in kept]
