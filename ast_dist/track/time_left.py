"""How long a run still takes, as an interval, and how many sessions that is.

The likely figure is the cost of what is left × the pace of this process. The interval is that cost × the 10th and the
90th percentile of the paces of the last 20 epochs, weighted by their cost, those of earlier sessions included; before
an epoch is done, of the last 20 intervals between rows. It is the spread of single epochs, not of their mean: what
disturbs a pace, such as another job on the machine or another GPU in the next session, lasts for many of them.

Few epochs show little of their spread, so each end lies at least a factor of 1 + 0.3 / √n from the likely figure, n the
epochs counted, and a third of one before the first is done (1.52; 1.30 after one, 1.10 after nine). The √n is that of
a standard error; the 0.3 was chosen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ast_dist.track.history import as_number

RECENT = 20
SHARES = (0.1, 0.9)
WIDENING = 0.3
# What the intervals before the first epoch's end count for: they know of no evaluation, and of no slow hour.
_EPOCHS_OF_INTERVALS = 1 / 3


@dataclass(frozen=True)
class Stretch:
    """A stretch of training. seconds: it took. cost: of its samples, in trained samples; above 0."""

    seconds: float
    cost: float

    @property
    def pace(self) -> float:
        """Seconds per trained sample."""
        return self.seconds / self.cost


@dataclass(frozen=True)
class TimeLeft:
    """Seconds left: the likely figure, and the interval around it."""

    low_s: float
    likely_s: float
    high_s: float


def epoch_stretches(rows: Iterable[Mapping[str, Any]]) -> list[Stretch]:
    """The stretches that rows of metrics.jsonl tell of, the oldest first.

    An epoch row's are its seconds in the process that ended it, and what was trained in them: the epoch whole, or its
    rest after a resume. Rows that hold no pace are passed over.
    """
    found = []
    for row in rows:
        if row.get("kind") != "epoch":
            continue
        seconds, pace = as_number(row.get("perf/epoch_s")), as_number(row.get("perf/s_per_sample"))
        if seconds and pace:
            found.append(Stretch(seconds, seconds / pace))
    return found


def time_left(
    cost_left: float, present: Stretch | None, epochs: Sequence[Stretch], intervals: Sequence[Stretch] = ()
) -> TimeLeft | None:
    """Seconds until all is trained.

    cost_left: of what is still to be trained, in trained samples. present: this process so far, None before its first
    step; the pace is then that of the epochs. epochs: those done, the newest last. intervals: between rows of this
    process, the newest last. Returns None where no pace is known.
    """
    if cost_left <= 0:
        return TimeLeft(0.0, 0.0, 0.0)
    seen = (epochs or intervals)[-RECENT:]
    if present is None:
        if not seen:
            return None
        present = Stretch(sum(s.seconds for s in seen), sum(s.cost for s in seen))
    count = min(len(epochs), RECENT) or _EPOCHS_OF_INTERVALS
    factor = 1.0 + WIDENING / math.sqrt(count)
    low, high = (_percentile(seen or [present], share) for share in SHARES)
    return TimeLeft(
        low_s=cost_left * min(low, present.pace / factor),
        likely_s=cost_left * present.pace,
        high_s=cost_left * max(high, present.pace * factor),
    )


def sessions_left(left_s: float, session_s: float, now_s: float) -> int:
    """Sessions that must still be started after the present one; 0 where it suffices.

    left_s: seconds that the run still takes. session_s: that a session has for training, its end's margin taken off;
    above 0. now_s: the same of what is left of the present session, 0 where it is over. What a start takes is left out.
    """
    return max(0, math.ceil((left_s - now_s) / session_s))


def _percentile(stretches: Sequence[Stretch], share: float) -> float:
    """The least pace at which `share` of the cost was trained at that pace or faster."""
    ordered = sorted(stretches, key=lambda stretch: stretch.pace)
    wanted = share * math.fsum(stretch.cost for stretch in ordered)
    reached = 0.0
    for stretch in ordered:
        reached += stretch.cost
        if reached >= wanted:
            return stretch.pace
    return ordered[-1].pace
