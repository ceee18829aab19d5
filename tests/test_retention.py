"""Claims about which checkpoints are kept."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ast_dist.fault.retention import Saved, best, to_prune

GAPS_S = st.floats(0.0, 3 * 3600.0)
ACC1S = st.none() | st.sampled_from([10.0, 50.0, 50.0, 90.0])
HOURS = st.sampled_from([0.0, 0.5, 2.0])


@st.composite
def runs(draw: st.DrawFn) -> list[Saved]:
    """The checkpoints of a run, the newest last, had none been removed."""
    total_s, saved = 0.0, []
    for step, (gap_s, acc1) in enumerate(draw(st.lists(st.tuples(GAPS_S, ACC1S), max_size=30))):
        total_s += gap_s
        saved.append(Saved(f"step-{step:08d}", acc1, total_s))
    return saved


@given(runs(), st.integers(1, 4), HOURS)
def test_the_newest_and_the_best_are_kept(saved: list[Saved], keep_last: int, hours: float) -> None:
    pruned = set(to_prune(saved, keep_last, hours))
    assert pruned.isdisjoint(item.name for item in saved[-keep_last:])
    if found := best(saved):
        assert found.name not in pruned
        assert found.acc1 == max(item.acc1 for item in saved if item.acc1 is not None)


@given(runs(), st.integers(1, 4), st.sampled_from([0.5, 2.0]))
def test_of_every_so_many_hours_one_is_kept_and_never_two(saved: list[Saved], keep_last: int, hours: float) -> None:
    pruned = set(to_prune(saved, keep_last, hours))
    kept_s = [item.total_s for item in saved if item.name not in pruned]
    # From wherever in the run one looks back, the next kept one is at most as far as the saves allow.
    for item in saved:
        later = [other.total_s for other in saved if other.total_s >= item.total_s + hours * 3600.0]
        if later:
            assert any(item.total_s < at_s <= later[0] + hours * 3600.0 for at_s in kept_s)
    found = best(saved)
    hourly = [s for s in saved[:-keep_last] if s.name not in pruned and s != found]
    gaps = [b.total_s - a.total_s for a, b in itertools.pairwise(hourly)]
    assert all(gap >= hours * 3600.0 - 1e-6 for gap in gaps)


@given(runs(), st.integers(1, 4), HOURS)
def test_pruning_after_every_save_keeps_the_hours_that_pruning_once_keeps(
    saved: list[Saved], keep_last: int, hours: float
) -> None:
    standing: list[Saved] = []
    for item in saved:
        standing.append(item)
        pruned = set(to_prune(standing, keep_last, hours))
        standing = [one for one in standing if one.name not in pruned]
    assert to_prune(standing, keep_last, hours) == []
    pruned = set(to_prune(saved, keep_last, hours))
    assert [one.name for one in standing] == [one.name for one in saved if one.name not in pruned]


@given(runs(), st.integers(1, 4))
def test_without_hours_no_more_than_the_newest_and_the_best_are_kept(saved: list[Saved], keep_last: int) -> None:
    assert len(saved) - len(to_prune(saved, keep_last, 0.0)) <= keep_last + 1


def test_one_whose_manifest_says_nothing_is_pruned_like_any_other() -> None:
    saved = [Saved(f"step-{step:08d}") for step in range(5)]
    assert to_prune(saved, 2, 2.0) == ["step-00000000", "step-00000001", "step-00000002"]
