"""When a session has to end, and how long before that it must begin to."""

import os
import time
from collections import deque
from collections.abc import Callable

from ast_dist.errors import UserError
from ast_dist.fault.processes import age_s

BEGAN_VARIABLE = "AST_DIST_SESSION_BEGAN"
_RECENT = 8
# A save has been seen to take half as long again as the one before; a step waits for one vote that is a step late.
_SAVE_FACTOR = 2.5
_STEPS = 3
_DEFAULT_SAVE_S = 20.0
_CLOSE_S = 10.0
# Of a short session, the parts that are not measured may take no more than this.
_UNMEASURED_SHARE = 0.05
_MOST_SHARE = 0.5


class Deadline:
    """The end of a session, moved forward by what the end itself takes: the step under way, a save, and closing.

    session_s: seconds that the session may last. age_s: those it has lasted already. clock: seconds, monotonic.

    The margin is learned: three of the slowest recent step (the vote to stop is heard a step late), 2.5 × the slowest
    of the last 8 saves (one may be under way when the last begins), and 10 s to close. Before the first save that is
    taken to last 20 s. What is not measured is 5 % of the session at most, and the margin half of it.

    Attributes: session_s.
    """

    def __init__(self, session_s: float, age_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.session_s = session_s
        self._clock = clock
        self._ends_at = clock() + session_s - age_s
        self._saves_s: deque[float] = deque(maxlen=_RECENT)
        self._step_s = 0.0

    def saw_save(self, save_s: float) -> None:
        """Note how long a save took until it was committed."""
        self._saves_s.append(save_s)

    def saw_steps(self, slowest_s: float | None) -> None:
        """Note how long the slowest of the recent steps took; None where none is known."""
        self._step_s = slowest_s or 0.0

    @property
    def margin_s(self) -> float:
        """Seconds before the end at which the session must begin to end."""
        measured_s = _STEPS * self._step_s + _SAVE_FACTOR * max(self._saves_s, default=0.0)
        unmeasured_s = _CLOSE_S + (0.0 if self._saves_s else _DEFAULT_SAVE_S)
        short_s = min(unmeasured_s, _UNMEASURED_SHARE * self.session_s)
        return min(measured_s + short_s, _MOST_SHARE * self.session_s)

    @property
    def left_s(self) -> float:
        """Seconds until the session's end, 0 once it is past."""
        return max(0.0, self._ends_at - self._clock())

    @property
    def is_reached(self) -> bool:
        """Whether the session must begin to end."""
        return self.left_s <= self.margin_s


def session_age_s() -> float:
    """Seconds since this session began: a limit of the machine's session does not start anew with each restart.

    The session began when AST_DIST_SESSION_BEGAN says (seconds since 1970; who restarts torchrun sets it), else when
    torchrun was started, else with this process. Raises UserError when the variable is no number.
    """
    began = os.environ.get(BEGAN_VARIABLE)
    if began is not None:
        try:
            return max(0.0, time.time() - float(began))
        except ValueError:
            raise UserError(f"{BEGAN_VARIABLE} is {began!r}, but must be seconds since 1970, as `date +%s`.") from None
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return age_s(process) or 0.0
