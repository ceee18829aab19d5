"""ast_dist/gate/cost.py: counts that add up, and FLOPs as one counts them by hand."""

import pytest
import torch
from torch import nn

from ast_dist.config import ModelConfig
from ast_dist.gate.cost import Ledger, SampleFlops, count_flops
from ast_dist.model import build_model


@pytest.mark.parametrize("count", [2, 5])
def test_flops_of_one_sample_equal_a_count_by_hand(count):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 10 * 10, 5))
    flops = count_flops(model, torch.zeros(count, 3, 10, 10), torch.zeros(count, dtype=torch.int64))
    convolution = 2 * (10 * 10 * 8) * (3 * 3 * 3)  # a multiplication and an addition a weight and output
    linear = 2 * 800 * 5
    assert flops.forward == convolution + linear
    # Gradients of all weights, and of every input but the image.
    assert flops.backward == convolution + 2 * linear
    assert flops.step == flops.forward + flops.backward


def test_a_larger_image_costs_in_proportion_to_its_area():
    model = build_model(ModelConfig(name="small_cnn", width=8, channels_last=False), 10)
    small, large = (
        count_flops(model, torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.int64)) for side in (16, 32)
    )
    head = 2 * 32 * 10
    assert large.forward - head == 4 * (small.forward - head)
    assert 1.8 < small.backward / small.forward < 2.0


def test_samples_skipped_are_what_full_training_would_have_trained_more():
    assert Ledger(forwarded=40, backwarded=40, full_equivalent=100).samples_skipped == 60
    assert Ledger().samples_skipped == 0


def test_flops_saved_weigh_forward_and_backward_by_their_cost():
    flops = SampleFlops(forward=1.0, backward=3.0)
    assert Ledger(forwarded=40, backwarded=40, full_equivalent=100).flops_saved(flops) == pytest.approx(0.6)
    # Every sample scored, a fifth trained: (100 · 1 + 20 · 3) / 400 spent.
    assert Ledger(forwarded=100, backwarded=20, full_equivalent=100).flops_saved(flops) == pytest.approx(0.6)
    assert Ledger(forwarded=100, backwarded=100, full_equivalent=100).flops_saved(flops) == 0.0


def test_scoring_that_costs_more_than_it_saves_shows_as_a_loss():
    saved = Ledger(forwarded=200, backwarded=100, full_equivalent=100).flops_saved(SampleFlops(1.0, 3.0))
    assert saved == pytest.approx(-0.25)


def test_nothing_done_is_nothing_saved():
    assert Ledger().flops_saved(SampleFlops(1.0, 2.0)) == 0.0


def test_a_ledger_comes_back_from_its_plain_numbers():
    ledger = Ledger(forwarded=1, backwarded=2, full_equivalent=3, damaged=4)
    assert Ledger(**ledger.to_dict()) == ledger
