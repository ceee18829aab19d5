"""When to save by the clock: as often as asked, but never so often that saving holds up training too much."""

import statistics
import time
from collections import deque
from collections.abc import Callable

_REMEMBERED = 5


class SaveInterval:
    """Seconds between saves, from what the last ones cost.

    every_s: asked for; 0 is never. stall_share: largest share of the time that saves may hold up training.
    now: a clock, in seconds.

        interval = SaveInterval(120.0, 0.005)
        if interval.is_due(): ...; interval.begun(); ...; interval.stalled(0.9)   # the next one is due after 180 s
    """

    def __init__(self, every_s: float, stall_share: float, now: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._stall_share = stall_share
        self._now = now
        self._last = now()
        self._stalls_s: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def seconds(self) -> float:
        """The present interval. The median: one slow disk access in five widens nothing."""
        if not self._stalls_s:
            return self._every_s
        return max(self._every_s, statistics.median(self._stalls_s) / self._stall_share)

    def is_due(self) -> bool:
        """Whether the last save began an interval ago."""
        return self._every_s > 0 and self._now() - self._last >= self.seconds

    def begun(self) -> None:
        """Note that a save begins, for whatever reason."""
        self._last = self._now()

    def stalled(self, stall_s: float) -> None:
        """Note for how long a save held up the training."""
        self._stalls_s.append(stall_s)
