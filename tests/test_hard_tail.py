"""ast_dist/gate/hard_tail.py: samples that stay hard are set aside, and only those."""

import numpy as np
import torch

from ast_dist.gate.hard_tail import HardTail
from ast_dist.gate.memory import SignificanceMemory

COUNT = 100
FIRST = 95  # the top 5 %


def visit(memory, scores, epoch, ids=None):
    ids = np.arange(COUNT) if ids is None else ids
    memory.observe(torch.from_numpy(ids), torch.from_numpy(np.float32(scores)[ids]))
    memory.merge(epoch)


def learnt(epoch):
    """Scores that fall to a tenth of themselves over a few epochs, but for the last five samples'."""
    scores = np.linspace(1.0, 2.0, COUNT) * 0.6**epoch
    scores[FIRST:] = 3.0 + 0.01 * np.arange(COUNT - FIRST)
    return scores


def test_samples_that_stay_at_the_top_with_flat_loss_are_suspects_after_so_many_visits():
    memory, tail = SignificanceMemory(COUNT), HardTail(COUNT, share=0.05, visits=3)
    for epoch in range(3):
        assert tail.num_suspects == 0
        visit(memory, learnt(epoch), epoch)
        tail.update(memory)
    assert (np.flatnonzero(tail.streak >= 3) == np.arange(FIRST, COUNT)).all()
    guarded = tail.guarded(memory.significance)
    assert np.isnan(guarded[FIRST:]).all()
    assert (guarded[:FIRST] == memory.significance[:FIRST]).all()
    assert (memory.significance[FIRST:] > 2).all()  # the memory itself stays as it was


def test_a_sample_at_the_top_whose_loss_falls_is_no_suspect():
    memory, tail = SignificanceMemory(COUNT), HardTail(COUNT, share=0.05, visits=3)
    for epoch in range(8):
        scores = learnt(epoch)
        scores[FIRST:] = 10.0 * 0.85**epoch  # falls, and stays above the others
        visit(memory, scores, epoch)
        tail.update(memory)
        assert tail.num_suspects == 0


def test_one_visit_below_the_top_clears_a_suspect():
    memory, tail = SignificanceMemory(COUNT), HardTail(COUNT, share=0.05, visits=2)
    for epoch in range(2):
        visit(memory, learnt(epoch), epoch)
        tail.update(memory)
    assert tail.num_suspects == 5
    scores = learnt(2)
    scores[FIRST] = 0.0
    visit(memory, scores, 2)
    tail.update(memory)
    assert tail.streak[FIRST] == 0 and tail.num_suspects == 4


def test_epochs_in_which_a_sample_was_not_trained_are_no_visits():
    memory, tail = SignificanceMemory(COUNT), HardTail(COUNT, share=0.05, visits=2)
    visit(memory, learnt(0), 0)
    for epoch in range(1, 5):
        tail.update(memory)
        visit(memory, learnt(epoch), epoch, np.arange(FIRST))
    tail.update(memory)
    assert tail.num_suspects == 0 and (tail.streak[FIRST:] == 1).all()


def test_switched_off_it_changes_nothing_and_keeps_nothing():
    memory, tail = SignificanceMemory(COUNT), HardTail(COUNT, share=0.0, visits=2)
    for epoch in range(4):
        visit(memory, learnt(epoch), epoch)
        tail.update(memory)
    assert tail.guarded(memory.significance) is memory.significance
    assert tail.state_dict() == {}


def test_a_restored_guard_goes_on_counting():
    memory, tail = SignificanceMemory(COUNT), HardTail(COUNT, share=0.05, visits=3)
    for epoch in range(2):
        visit(memory, learnt(epoch), epoch)
        tail.update(memory)
    restored = HardTail(COUNT, share=0.05, visits=3)
    restored.load_state_dict(tail.state_dict())
    restored.update(memory)
    assert restored.num_suspects == 0  # no new visit, no step of the count
    visit(memory, learnt(2), 2)
    restored.update(memory)
    assert restored.num_suspects == 5
