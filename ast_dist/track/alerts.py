"""What is worth an alert: steps that were not finite, a stall, the end."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["nonfinite", "rollback", "stall", "end"]
# An interval between two step rows that is this many times the usual one, and this long at least, is a stall.
STALL_FACTOR = 10.0
STALL_FLOOR_S = 30.0
_USUAL_ROWS = 100
_FEWEST_ROWS = 5
_TITLES: dict[Kind, str] = {
    "nonfinite": "NaN or infinity",
    "rollback": "back to the last checkpoint",
    "stall": "stall",
    "end": "the run has ended",
}


@dataclass(frozen=True)
class Alert:
    """Something that somebody who does not watch should hear of. kind: of which one is sent in 10 minutes."""

    kind: Kind
    text: str
    level: Literal["INFO", "WARN", "ERROR"] = "WARN"

    @property
    def title(self) -> str:
        """A heading of less than 64 characters, the same for all of a kind: by it W&B tells them apart."""
        return _TITLES[self.kind]


class Alerts:
    """Judges rows as they come, and lets one alert of a kind through in `INTERVAL_S` seconds.

    restored: rows of the sessions before. now: seconds.
    """

    INTERVAL_S = 600.0

    def __init__(self, restored: Iterable[Mapping[str, Any]] = (), now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._nonfinite = max((row.get("train/steps_nonfinite") or 0 for row in restored), default=0)
        self._intervals_s: deque[float] = deque(maxlen=_USUAL_ROWS)
        self._last_step: int | None = None
        self._sent_at: dict[Kind, float] = {}

    def judge(self, row: Mapping[str, Any]) -> Alert | None:
        """What a row gives cause for, if anything."""
        nonfinite, before = row.get("train/steps_nonfinite") or 0, self._nonfinite
        self._nonfinite = max(nonfinite, before)
        stall = self._stall(row) if row["kind"] == "step" else None
        if nonfinite > before:
            where = f"by step {row['global_step']:,}"
            return Alert("nonfinite", f"{where}, {nonfinite:,} steps were skipped: not finite ({before:,} before).")
        return stall

    def _stall(self, row: Mapping[str, Any]) -> Alert | None:
        steps = row["global_step"] - (self._last_step if self._last_step is not None else row["global_step"])
        self._last_step = row["global_step"]
        if not steps or row.get("perf/step_ms") is None:
            return None
        took_s = steps * row["perf/step_ms"] / 1000
        known = self._intervals_s
        usual_s = statistics.median(known) if len(known) >= _FEWEST_ROWS else None
        known.append(took_s)
        if usual_s is None or took_s < max(STALL_FACTOR * usual_s, STALL_FLOOR_S):
            return None
        text = f"the {steps} steps up to {row['global_step']:,} took {took_s:.0f} s; {usual_s:.1f} s is usual."
        return Alert("stall", text)

    @staticmethod
    def restarted(recovery_s: float, step: int) -> Alert | None:
        """What a restart gives cause for. recovery_s: since the process before was last alive. step: gone on from."""
        if recovery_s < STALL_FLOOR_S:
            return None
        return Alert("stall", f"no step for {recovery_s:.0f} s; the run was restarted and goes on from step {step:,}.")

    @staticmethod
    def rolled_back(epoch: int, step: int) -> Alert:
        """The run goes back to its last checkpoint."""
        return Alert("rollback", f"step {step:,}, epoch {epoch}: NaN or infinity again and again.")

    @staticmethod
    def ended(state: str, message: str) -> Alert:
        """The end of a session. state: finished, paused or failed."""
        text = f"{state}: {message}" if message else state
        return Alert("end", text[:500], "ERROR" if state == "failed" else "INFO")

    def is_due(self, alert: Alert) -> bool:
        """Whether it may be sent now; asking counts as sending."""
        now, last = self._now(), self._sent_at.get(alert.kind)
        if last is not None and now - last < self.INTERVAL_S:
            return False
        self._sent_at[alert.kind] = now
        return True
