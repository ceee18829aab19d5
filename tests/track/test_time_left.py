"""Time left: an interval around the likely figure, and the sessions that it takes."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.track.time_left import RECENT, Stretch, TimeLeft, epoch_stretches, sessions_left, time_left

amounts = st.floats(1e-3, 1e6)
stretches = st.builds(Stretch, seconds=amounts, cost=amounts)
several = st.lists(stretches, min_size=1, max_size=30)


@given(amounts, stretches, st.lists(stretches, max_size=30), st.lists(stretches, max_size=30))
def test_the_likely_figure_is_cost_times_pace_and_lies_inside_its_interval(cost, present, epochs, intervals):
    left = time_left(cost, present, epochs, intervals)
    assert left.likely_s == pytest.approx(cost * present.seconds / present.cost)
    assert 0 < left.low_s < left.likely_s < left.high_s


@given(amounts, stretches, several, st.randoms())
def test_the_order_of_recent_epochs_does_not_matter(cost, present, epochs, random):
    epochs = epochs[:RECENT]
    shuffled = random.sample(epochs, len(epochs))
    assert time_left(cost, present, epochs) == time_left(cost, present, shuffled)


@given(amounts, stretches, several, st.integers(-10, 10))
def test_a_machine_of_another_speed_scales_all_three(cost, present, epochs, exponent):
    factor = 2.0**exponent

    def slower(stretch):
        return Stretch(stretch.seconds * factor, stretch.cost)

    left = time_left(cost, present, epochs)
    scaled = time_left(cost, slower(present), [slower(epoch) for epoch in epochs])
    for name in ("low_s", "likely_s", "high_s"):
        assert getattr(scaled, name) == pytest.approx(getattr(left, name) * factor)


def by_hand(stretches, share):
    """The percentile of paces, each counted once for every unit of (whole) cost."""
    paces = sorted(itertools.chain.from_iterable([s.seconds / s.cost] * int(s.cost) for s in stretches))
    return paces[max(0, math.ceil(share * len(paces)) - 1)]


@given(st.lists(st.builds(Stretch, seconds=amounts, cost=st.integers(1, 9).map(float)), min_size=10, max_size=RECENT))
def test_the_interval_spans_the_tenth_to_the_ninetieth_percentile_of_the_paces(epochs):
    present = Stretch(math.fsum(e.seconds for e in epochs), math.fsum(e.cost for e in epochs))
    left = time_left(1000.0, present, epochs)
    widened = 1 + 0.3 / math.sqrt(len(epochs))
    assert left.low_s == pytest.approx(1000 * min(by_hand(epochs, 0.1), present.pace / widened))
    assert left.high_s == pytest.approx(1000 * max(by_hand(epochs, 0.9), present.pace * widened))


def test_few_epochs_give_a_wider_interval_than_many_that_agree():
    alike = Stretch(10.0, 100.0)
    widths = []
    for count in (0, 1, 2, 5, 10, 20):
        left = time_left(1000.0, alike, [alike] * count, [alike] * 20)
        widths.append(left.high_s / left.low_s)
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == len(widths)
    assert widths[1] == pytest.approx(1.3**2) and widths[-1] == pytest.approx((1 + 0.3 / math.sqrt(20)) ** 2)


def test_only_recent_epochs_count():
    fast, slow = Stretch(1.0, 100.0), Stretch(100.0, 100.0)
    assert time_left(1.0, fast, [slow] * 50 + [fast] * RECENT) == time_left(1.0, fast, [fast] * RECENT)


def test_a_slow_rest_of_an_epoch_weighs_as_little_as_it_trained():
    usual, rest = Stretch(100.0, 1000.0), Stretch(5.0, 1.0)
    left = time_left(1000.0, usual, [usual] * 5 + [rest] + [usual] * 5)
    assert left.high_s < 1000 * rest.pace / 40


def test_another_machine_in_an_earlier_session_widens_the_interval_to_its_pace():
    t4, p100 = Stretch(200.0, 100.0), Stretch(100.0, 100.0)
    left = time_left(1000.0, p100, [t4, p100, t4, p100])
    assert left == TimeLeft(low_s=pytest.approx(1000 / 1.15), likely_s=1000.0, high_s=2000.0)


def test_before_the_first_epoch_the_intervals_tell_and_before_the_first_step_earlier_epochs():
    present = Stretch(10.0, 100.0)
    left = time_left(1000.0, present, [], [Stretch(1.0, 5.0), Stretch(1.0, 20.0)])
    assert left.high_s == pytest.approx(200.0) and left.low_s == pytest.approx(50.0)
    assert time_left(1000.0, None, [present]).likely_s == pytest.approx(100.0)
    assert time_left(1000.0, None, []) is None


def test_nothing_to_train_takes_no_time_whatever_is_known():
    assert time_left(0.0, None, []) == TimeLeft(0.0, 0.0, 0.0)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8))
def test_stretches_are_read_back_from_epoch_rows(paces):
    rows = []
    for number, pace in enumerate(paces):
        rows.append({"kind": "step", "perf/epoch_s": 1.0, "perf/s_per_sample": 1.0})
        rows.append({"kind": "epoch", "perf/epoch_s": 10.0 + number, "perf/s_per_sample": pace})
        rows.append({"kind": "epoch", "perf/epoch_s": 10.0})  # evaluated late: this process trained none of it
    found = epoch_stretches(rows)
    assert [stretch.pace for stretch in found] == pytest.approx(paces)
    assert [stretch.seconds for stretch in found] == [10.0 + number for number in range(len(paces))]


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 40))
def test_sessions_left_are_those_that_playing_them_through_takes(left_s, session_s, now_s):
    remaining, started = left_s - now_s, 0
    while remaining > 0:
        remaining, started = remaining - session_s, started + 1
    assert sessions_left(left_s, session_s, now_s) == started
