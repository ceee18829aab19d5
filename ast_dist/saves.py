"""Saves beside the training: when one is due, how long it held up, how it ended."""

import contextlib
import time
from collections.abc import Callable

from ast_dist.clock import Clock
from ast_dist.config import CheckpointConfig
from ast_dist.fault.checkpoint import Checkpoints, NonFiniteStateError
from ast_dist.fault.deadline import Deadline
from ast_dist.fault.interval import SaveInterval
from ast_dist.fault.nonfinite import NonFiniteSteps
from ast_dist.reports import Reports


class Saves:
    """Starts and ends the saves of a training loop, and tells of them as soon as this rank knows."""

    def __init__(
        self,
        config: CheckpointConfig,
        checkpoints: Checkpoints,
        nonfinite: NonFiniteSteps,
        deadline: Deadline | None,
        clock: Clock,
        reports: Reports,
    ) -> None:
        self._checkpoints = checkpoints
        self._interval = SaveInterval(config.every_s, config.stall_share)
        self._nonfinite = nonfinite
        self._deadline = deadline
        self._clock = clock
        self._reports = reports

    def is_due(self) -> bool:
        """Whether to save by the clock, or to take in at once how the last save failed. Rank 0 alone asks."""
        return self._checkpoints.is_urgent or (self._interval.is_due() and not self._checkpoints.is_saving)

    def start(self, begin: Callable[[], bool], epoch: int) -> None:
        """Save, once the save before has ended; all ranks must call. begin: starts it; False where it did not."""
        began = time.monotonic()
        self.wait(epoch)
        waited_s = time.monotonic() - began
        is_begun = begin()
        self._interval.begun()
        if not is_begun:
            return
        stall_s = time.monotonic() - began
        # A save by the clock never has to wait for the one before.
        self._interval.stalled(stall_s - waited_s)
        self._clock.saved(stall_s)

    def note(self) -> None:
        """Tell of a save that has ended. Raises RuntimeError where it broke off because a peer was lost."""
        ended = self._checkpoints.poll()
        if ended:
            self._clock.save_ended(ended.save_s, ended.copy_s)
            if self._deadline:
                self._deadline.saw_save(ended.save_s)
            self._reports.progress(self._checkpoints.latest, self._checkpoints.verified_at)
            if ended.kind == "saved":
                self._reports.checkpoint(self._checkpoints.folder / ended.name, ended.save_s)

    def wait(self, epoch: int) -> None:
        """Wait until the save under way has ended; all ranks must call. epoch: the present one.

        Raises what `Checkpoints.wait` raises, but RollBack (or UserError, the second time) where the state that was to
        be saved was not finite.
        """
        try:
            self._checkpoints.wait()
        except NonFiniteStateError as error:
            raise self._nonfinite.verdict(str(error), epoch) from error
        finally:
            self.note()

    def leave(self) -> None:
        """End all saving: the state is safe, or given up. All ranks must call."""
        with contextlib.suppress(NonFiniteStateError):
            self._checkpoints.wait()
        self._checkpoints.close()
