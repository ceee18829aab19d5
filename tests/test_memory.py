"""ast_dist/gate/memory.py: what is remembered of a sample does not depend on ranks or on when it was merged."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_dist.gate.memory import SignificanceMemory

NAMES = ("significance", "last_epoch", "visits")

COUNT = 8
few = settings(max_examples=40)
decays = st.sampled_from([0.0, 0.5, 0.9])


@st.composite
def epochs_of_scores(draw):
    """For a few epochs, batches of (ids, scores) that show each sample at most once."""
    epochs = []
    for _ in range(draw(st.integers(1, 4))):
        ids = draw(st.permutations(range(COUNT)))[: draw(st.integers(0, COUNT))]
        scores = [draw(st.one_of(st.floats(0, 10, width=32), st.just(math.nan), st.just(math.inf))) for _ in ids]
        cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=3)))
        bounds = [0, *cuts, len(ids)]
        epochs.append([(ids[a:b], scores[a:b]) for a, b in itertools.pairwise(bounds)])
    return epochs


def observe(memory, batch):
    ids, scores = batch
    memory.observe(torch.tensor(ids, dtype=torch.int64), torch.tensor(scores, dtype=torch.float32))


def assert_same(one, other):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert one.non_finite == other.non_finite


@few
@given(epochs_of_scores(), decays)
def test_it_is_an_average_per_sample_over_finite_scores(epochs, decay):
    """Against a dictionary filled one score at a time."""
    memory, remembered, last, visits, non_finite = SignificanceMemory(COUNT, decay), {}, {}, {}, 0
    for epoch, batches in enumerate(epochs):
        for batch in batches:
            observe(memory, batch)
            for sample_id, score in zip(*batch, strict=True):
                if not math.isfinite(score):
                    non_finite += 1
                    continue
                old = remembered.get(sample_id)
                remembered[sample_id] = score if old is None else decay * old + (1 - decay) * score
                last[sample_id], visits[sample_id] = epoch, visits.get(sample_id, 0) + 1
        memory.merge(epoch)
    expected = [remembered.get(sample_id, math.nan) for sample_id in range(COUNT)]
    np.testing.assert_allclose(memory.significance, np.float32(expected), rtol=1e-6)
    assert memory.last_epoch.tolist() == [last.get(sample_id, -1) for sample_id in range(COUNT)]
    assert memory.visits.tolist() == [visits.get(sample_id, 0) for sample_id in range(COUNT)]
    assert memory.non_finite == non_finite
    assert [memory.significance.dtype, memory.last_epoch.dtype, memory.visits.dtype] == [np.float32, np.int32, np.int32]


@few
@given(epochs_of_scores(), decays)
def test_merging_often_and_merging_once_an_epoch_give_the_same_bits(epochs, decay):
    often, once = SignificanceMemory(COUNT, decay), SignificanceMemory(COUNT, decay)
    for epoch, batches in enumerate(epochs):
        for batch in batches:
            observe(often, batch)
            observe(once, batch)
            often.merge(epoch)
        often.merge(epoch)
        once.merge(epoch)
    assert_same(often, once)


@few
@given(epochs_of_scores(), decays, st.integers(2, 4))
def test_every_rank_remembers_what_one_that_sees_all_does(epochs, decay, world_size):
    alone, ranks = SignificanceMemory(COUNT, decay), [SignificanceMemory(COUNT, decay) for _ in range(world_size)]
    for epoch, batches in enumerate(epochs):
        for ids, scores in batches:
            observe(alone, (ids, scores))
            for rank, memory in enumerate(ranks):
                observe(memory, (ids[rank::world_size], scores[rank::world_size]))
        alone.merge(epoch)
        collectors = [SignificanceMemory(COUNT) for _ in ranks]  # a first round shows what each rank would send
        parts = []
        for collector, memory in zip(collectors, ranks, strict=True):
            collector._pending = list(memory._pending)
            collector.merge(epoch, lambda ids, scores, parts=parts: parts.append((ids, scores)) or (ids, scores))
        all_rows = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
        for memory in ranks:
            memory.merge(epoch, lambda ids, scores, rows=all_rows: rows)
            assert_same(memory, alone)


def test_a_score_that_is_not_finite_is_counted_and_leaves_what_was_remembered():
    memory = SignificanceMemory(3)
    observe(memory, ([0, 1], [2.0, math.nan]))
    memory.merge(0)
    observe(memory, ([0, 1, 2], [math.nan, math.inf, 1.0]))
    memory.merge(1)
    np.testing.assert_array_equal(memory.significance, np.float32([2.0, math.nan, 1.0]))
    assert memory.non_finite == 3
    assert memory.last_epoch.tolist() == [0, -1, 1]
    assert memory.visits.tolist() == [1, 0, 1]


def test_padding_is_passed_over():
    memory = SignificanceMemory(3)
    observe(memory, ([1, -1, -1], [2.0, 9.0, math.nan]))
    memory.merge(0)
    assert memory.visits.tolist() == [0, 1, 0] and memory.non_finite == 0
    assert np.isnan(memory.significance[[0, 2]]).all()


def test_ids_that_float32_cannot_hold_survive():
    first = 2**24 + 1  # float32 would round it to 2^24
    memory = SignificanceMemory(first + 2)
    sent = []
    observe(memory, ([first - 1, first, first + 1], [1.0, 2.0, 3.0]))
    memory.merge(0, lambda ids, scores: sent.append(ids.dtype) or (ids, scores))
    assert sent == [torch.int64]
    assert memory.significance[first - 1 :].tolist() == [1.0, 2.0, 3.0]


def test_a_rank_that_saw_nothing_takes_part_with_typed_empty_rows():
    memory, sent = SignificanceMemory(3), []
    memory.merge(0, lambda ids, scores: sent.append((ids, scores)) or (torch.tensor([2]), torch.tensor([1.5])))
    ((ids, scores),) = sent
    assert (len(ids), ids.dtype, len(scores), scores.dtype) == (0, torch.int64, 0, torch.float32)
    assert memory.visits.tolist() == [0, 0, 1]


def test_half_precision_scores_are_remembered_in_float32_and_without_their_graph():
    memory = SignificanceMemory(2)
    scores = torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 0.5
    memory.observe(torch.tensor([0, 1]), scores)
    memory.merge(0)
    assert memory.significance.tolist() == [0.5, 0.5]


def test_the_state_is_refused_while_observations_wait():
    memory = SignificanceMemory(3)
    observe(memory, ([1], [2.0]))
    with pytest.raises(RuntimeError, match="merge"):
        memory.state_dict()
    memory.merge(0)
    memory.state_dict()


@few
@given(epochs_of_scores(), epochs_of_scores(), decays)
def test_a_restored_memory_goes_on_with_the_same_bits(before, after, decay):
    original, restored = SignificanceMemory(COUNT, decay), SignificanceMemory(COUNT, decay)
    for epoch, batches in enumerate(before):
        for batch in batches:
            observe(original, batch)
        original.merge(epoch)
    observe(restored, ([3], [99.0]))  # what waits in the restored one must not leak in
    state = original.state_dict()
    restored.load_state_dict(state)
    assert_same(restored, original)
    for epoch, batches in enumerate(after, start=len(before)):
        for memory in (original, restored):
            for batch in batches:
                observe(memory, batch)
            memory.merge(epoch)
    assert_same(restored, original)


def test_a_state_is_a_copy():
    memory, other = SignificanceMemory(2), SignificanceMemory(2)
    observe(memory, ([0], [1.0]))
    memory.merge(0)
    state = memory.state_dict()
    other.load_state_dict(state)
    for changed in (memory, other):
        observe(changed, ([0], [5.0]))
        changed.merge(1)
        assert state["significance"][0] == 1.0 and state["visits"].tolist() == [1, 0]
