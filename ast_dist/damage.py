"""Damaged samples: named on one place whichever rank met them, and a limit that stops the run with their list."""

from collections import deque

from ast_dist.distributed import World

_SHOWN = 20


class DamageLog:
    """The damaged samples of one epoch, the same on every rank.

    limit: share of the samples that may be damaged in an epoch; one may be in any case. num_samples: size of the
    training set. root: the shards' folder, for the message.
    """

    def __init__(self, limit: float, num_samples: int, root: str, world: World) -> None:
        self._allowed = max(1, int(limit * num_samples))
        self._rule = f"data.damaged_limit allows {self._allowed:,} ({limit:g} of {num_samples:,})"
        self._root = root
        self._world = world
        self._waiting: deque[list[str]] = deque()
        self._of_epoch: list[str] = []

    def note(self, damaged: list[str]) -> None:
        """Note what this rank could not decode in a step; every step must be noted, also with an empty list."""
        self._waiting.append(damaged)

    def agree(self, count: int) -> list[str]:
        """Take in the oldest noted step, of which the ranks know that it has `count` damaged samples in all.

        Every rank must call it, with the same count. Returns what was damaged, over all ranks. Raises RuntimeError
        with the list when the epoch has more than the limit allows.
        """
        mine = self._waiting.popleft()
        if count == 0:
            return []
        found = sorted(text for texts in self._world.gather(mine) for text in texts)
        self._of_epoch += found
        self.judge(self._of_epoch)
        return found

    def judge(self, damaged: list[str]) -> None:
        """Raise RuntimeError with the list when an epoch, or an evaluation, has more than the limit allows."""
        if len(damaged) > self._allowed:
            more = f" … and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
            raise RuntimeError(
                f"{len(damaged)} damaged samples in this epoch, but {self._rule}. Check the shards: python -m "
                f"data_prep.check_shards {self._root}. They are: {'; '.join(damaged[:_SHOWN])}{more}"
            )

    def epoch_done(self) -> None:
        """Begin to count anew: a sample that stays damaged is met once an epoch."""
        self._of_epoch.clear()
