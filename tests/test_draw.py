"""ast_dist/gate/draw.py: the device draws what the host draws."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.counter_rng import uniform
from ast_dist.gate.draw import uniform_on_device

ids = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30)


@given(ids, st.integers(0, 20), st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_torch_draws_the_same_bits_as_numpy(ids, stream, seed, epoch):
    drawn = uniform_on_device(torch.tensor(ids), stream, seed, epoch)
    assert drawn.dtype == torch.float64
    np.testing.assert_array_equal(drawn.numpy(), uniform(np.array(ids), stream, seed, epoch))
