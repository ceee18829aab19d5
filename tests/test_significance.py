"""ast_dist/gate/significance.py: cross-entropy and entropy in nats, in float32 whatever comes in."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.gate.significance import significance


def by_hand(logits, label, loss_weight, entropy_weight):
    top = max(logits)
    total = sum(math.exp(value - top) for value in logits)
    log_p = [value - top - math.log(total) for value in logits]
    return -loss_weight * log_p[label] - entropy_weight * sum(math.exp(value) * value for value in log_p)


@given(
    st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=8),
    st.integers(0, 3),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_it_is_the_weighted_sum_of_cross_entropy_and_entropy(logits, label, loss_weight, entropy_weight):
    labels = torch.full((len(logits),), label)
    scores = significance(torch.tensor(logits), labels, loss_weight, entropy_weight)
    expected = [by_hand(row, label, loss_weight, entropy_weight) for row in logits]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_model_that_knows_nothing_scores_the_logarithm_of_the_number_of_classes():
    scores = significance(torch.zeros(3, 10), torch.tensor([0, 4, 9]))
    torch.testing.assert_close(scores, torch.full((3,), math.log(10)))


def test_a_sure_and_right_prediction_scores_nothing_and_a_sure_and_wrong_one_its_loss():
    scores = significance(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(scores, torch.tensor([0.0, 70.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_scored_in_float32(dtype):
    logits = torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 0.0], [0.5, 0.25, -2.0]], dtype=dtype)
    labels = torch.tensor([0, 0, 2])
    scores = significance(logits, labels)
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    torch.testing.assert_close(scores, significance(logits.float(), labels), rtol=0, atol=0)


def test_extreme_logits_stay_finite():
    assert significance(torch.tensor([[3e38, -3e38], [-3e38, 3e38]]) / 4, torch.tensor([0, 0])).isfinite().all()


def test_no_gradient_is_kept():
    assert not significance(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])).requires_grad


def test_an_empty_batch_has_no_scores():
    assert significance(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
