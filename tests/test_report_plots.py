"""Claims about the report's plots: whatever the numbers, a picture that is well-formed and says what it shows."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.report_plots import MAX_POINTS, Curve, Mark, Panel, _style, figure, number, thinned
from ast_dist.report_run import as_number

values = st.floats(-1e200, 1e200, exclude_min=True, exclude_max=True) | st.just(math.nan)
places = st.floats(0, 1e200, exclude_max=True)


def drawn(panel):
    """The figure as XML, and the numbers of all its paths."""
    tree = ElementTree.fromstring(figure(panel))
    return tree, [path.get("d") for path in tree.iter("path")]


@given(
    points=st.lists(st.tuples(places, values), max_size=20),
    may_be_log=st.booleans(),
    low=st.sampled_from([None, 0.0, -2.0]),
    high=st.sampled_from([None, 100.0]),
    is_stepped=st.booleans(),
)
def test_any_numbers_give_a_plot_inside_its_frame(points, may_be_log, low, high, is_stepped):
    x, y = (np.array([point[i] for point in sorted(points, key=lambda p: p[0])], float) for i in (0, 1))
    marks = [Mark(float(value), "session 2", False) for value in x[:1]]
    tree, paths = drawn(
        Panel("T", [Curve("c", x, y, 0, is_stepped)], low=low, high=high, may_be_log=may_be_log, marks=marks)
    )
    assert not any("nan" in path or "inf" in path for path in paths)
    if np.isfinite(y).any():
        for text in tree.iter("text"):
            assert 0 <= float(text.get("x")) <= 440 and 0 <= float(text.get("y")) <= 250
        for tip in tree.iter("circle"):
            assert 0 <= float(tip.get("cx")) <= 440 and 0 <= float(tip.get("cy")) <= 250
    else:
        assert "not measured" in "".join(tree.itertext())


def test_curves_are_told_apart_without_colour():
    looks = [_style(i)[1:] for i in range(7)]
    assert len(set(looks)) == 7
    assert len({_style(i) for i in range(42)}) == 42


def test_texts_are_no_markup():
    bad = "<script>alert(1)</script>\"'&"
    curve = Curve(bad, np.array([1.0, 2.0]), np.array([1.0, 2.0]), unit=bad)
    panel = Panel(bad, [curve, curve], x_name=bad, marks=[Mark(1.0, bad, True)], notes=[bad])
    tree, _ = drawn(panel)
    assert not list(tree.iter("script"))
    assert "".join(tree.itertext()).count(bad) >= 5
    assert bad in tree.find("svg").get("aria-label")


def test_gaps_stay_gaps_and_a_lone_point_is_a_dot():
    y = np.array([1.0, math.nan, 3.0, 4.0, math.nan])
    tree, _ = drawn(Panel("T", [Curve("c", np.arange(5.0), y)]))
    line = next(path.get("d") for path in tree.iter("path") if path.get("class").startswith("line"))
    assert line.count("M") == 2 and line.count("L") == 1 and line.count("h0") == 2


def test_long_curves_are_averaged_in_blocks():
    x, y = thinned(np.arange(10_000.0), np.full(10_000, 0.1))
    assert 300 < x.size <= MAX_POINTS
    assert set(y.round(12)) == {0.1}
    assert len(figure(Panel("T", [Curve("c", np.arange(1e5), np.arange(1e5))]))) < 25_000


def test_the_words_for_a_plot_tell_its_ends_and_extremes():
    tree, _ = drawn(
        Panel("Accuracy, %", [Curve("val top-1", np.arange(3.0), np.array([10.0, 97.5, 95.25]), unit=" %")])
    )
    assert tree.find("svg").get("aria-label") == (
        "Accuracy, %, over epochs. val top-1: from 10 to 95.25 %, lowest 10, highest 97.5"
    )
    assert "val top-1: 97.5 % (epochs 1)" in [title.text for title in tree.iter("title")]


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (1234.5, "1,234.5"), (12_345.6, "12,346"), (2.5e6, "2.5M"), (3e-7, "3e-07")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, 10**400, 1e300, [1], {}])
def test_what_is_no_number_is_none(value):
    assert as_number(value) is None
