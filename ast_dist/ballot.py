"""A vote of the ranks on stopping, where no step carries one: during an evaluation, and after it."""

from collections.abc import Callable

import torch

from ast_dist.distributed import Later, World


class StopAskedError(Exception):
    """A rank asked to stop, and all ranks have heard it at the same place."""


class Ballot:
    """Asks the ranks once a batch, and hears the answer a batch later: nobody waits for it.

    wants_stop: this rank's vote. Every rank must call as often as the others.
    """

    def __init__(self, world: World, wants_stop: Callable[[], bool]) -> None:
        self._world = world
        self._wants_stop = wants_stop
        self._underway: Later | None = None

    def __call__(self) -> None:
        """Vote. Raises StopAskedError on all ranks when one of them voted for it in the call before."""
        before, self._underway = self._underway, self._vote()
        if before is not None and before.get().item():
            self._underway.get()
            raise StopAskedError

    def result(self) -> bool:
        """Whether any rank wants to stop now."""
        if self._underway is not None:
            self._underway.get()
        return bool(self._vote().get().item())

    def _vote(self) -> Later:
        return self._world.sum_later(torch.tensor([int(self._wants_stop())]))
