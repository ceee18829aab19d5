"""Claims about when to save by the clock."""

import pytest

from ast_dist.fault.interval import SaveInterval


class Hands:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def __call__(self) -> float:
        return self.at_s


def test_a_save_is_due_an_interval_after_the_last_one_began() -> None:
    now = Hands()
    interval = SaveInterval(120.0, 0.005, now)
    now.at_s += 119.0
    assert not interval.is_due()
    now.at_s += 1.0
    assert interval.is_due()
    interval.begun()
    assert not interval.is_due()


def test_saves_become_rarer_until_their_stall_is_the_allowed_share() -> None:
    now = Hands()
    interval = SaveInterval(120.0, 0.005, now)
    interval.stalled(0.6)
    assert interval.seconds == pytest.approx(120.0), "0.6 s in 120 s is just allowed"
    for _ in range(3):
        interval.stalled(3.0)
    assert interval.seconds == pytest.approx(600.0)
    assert 3.0 / interval.seconds == pytest.approx(0.005)
    now.at_s += 599.0
    assert not interval.is_due()
    now.at_s += 2.0
    assert interval.is_due()


def test_the_interval_comes_back_when_stalls_shrink() -> None:
    interval = SaveInterval(120.0, 0.005, Hands())
    for _ in range(10):
        interval.stalled(3.0)
    for _ in range(3):
        interval.stalled(0.1)
    assert interval.seconds == 120.0


def test_one_slow_save_widens_nothing() -> None:
    interval = SaveInterval(120.0, 0.005, Hands())
    for stall_s in (0.1, 0.1, 30.0):
        interval.stalled(stall_s)
    assert interval.seconds == 120.0


def test_an_interval_of_0_is_never_due() -> None:
    now = Hands()
    interval = SaveInterval(0.0, 0.005, now)
    now.at_s += 1e9
    interval.stalled(1.0)
    assert not interval.is_due()
