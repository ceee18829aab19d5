"""Claims about the session's end: when it is, and how long before it the session must begin to end."""

import os
import subprocess
import sys
import time

import pytest

from ast_dist.errors import UserError
from ast_dist.fault.deadline import BEGAN_VARIABLE, Deadline, session_age_s
from ast_dist.fault.processes import age_s
from tests.launching import finish, start

AGE = "import time; time.sleep(1.5); from ast_dist.fault.deadline import session_age_s; print(session_age_s())"


class Clock:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_session_ends_before_its_time_by_what_the_end_takes() -> None:
    clock = Clock()
    deadline = Deadline(3600.0, clock=clock)
    deadline.saw_steps(2.0)
    deadline.saw_save(40.0)
    # Three steps, 2.5 saves, 10 s to close.
    assert deadline.margin_s == 3 * 2.0 + 2.5 * 40.0 + 10.0
    clock.now += 3600.0 - deadline.margin_s - 0.1
    assert not deadline.is_reached
    clock.now += 0.2
    assert deadline.is_reached
    assert deadline.left_s == pytest.approx(deadline.margin_s - 0.1)
    clock.now += 3600.0
    assert deadline.left_s == 0.0


def test_a_save_that_was_slow_is_remembered_and_forgotten() -> None:
    deadline = Deadline(36000.0, clock=Clock())
    deadline.saw_save(100.0)
    for _ in range(7):
        deadline.saw_save(1.0)
    assert deadline.margin_s == 260.0
    deadline.saw_save(1.0)
    assert deadline.margin_s == 12.5


def test_before_the_first_save_it_is_taken_to_last_20_s() -> None:
    deadline = Deadline(3600.0, clock=Clock())
    assert deadline.margin_s == 30.0
    deadline.saw_steps(None)
    assert deadline.margin_s == 30.0


def test_a_short_session_gives_5_percent_to_what_is_not_measured_and_half_at_most_to_all() -> None:
    deadline = Deadline(60.0, clock=Clock())
    assert deadline.margin_s == 3.0
    deadline.saw_save(4.0)
    assert deadline.margin_s == 10.0 + 3.0
    deadline.saw_save(1000.0)
    assert deadline.margin_s == 30.0


def test_what_the_session_has_lasted_before_this_process_counts() -> None:
    clock = Clock()
    assert Deadline(3600.0, 3580.0, clock).is_reached
    assert not Deadline(3600.0, 3000.0, clock).is_reached


def test_the_session_began_when_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BEGAN_VARIABLE, str(time.time() - 500.0))
    assert session_age_s() == pytest.approx(500.0, abs=5.0)
    monkeypatch.setenv(BEGAN_VARIABLE, str(time.time() + 500.0))
    assert session_age_s() == 0.0
    monkeypatch.setenv(BEGAN_VARIABLE, "at noon")
    with pytest.raises(UserError, match="AST_DIST_SESSION_BEGAN is 'at noon'"):
        session_age_s()


def test_without_word_the_session_began_with_the_process() -> None:
    assert 1.5 < float(finish(start("-c", AGE))) < 60.0


def test_under_torchrun_the_session_began_with_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    # The parent of the process asked is this one, which has run since pytest started.
    parent_age_s = age_s(os.getpid())
    assert parent_age_s is not None
    output = subprocess.run(
        [sys.executable, "-c", AGE],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert float(output) == pytest.approx(parent_age_s, abs=30.0)
    assert float(output) > parent_age_s + 1.4
