"""ast_dist/counter_rng.py: a draw depends on its key and on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_dist.counter_rng import STREAM_CROP, STREAM_FLIP, STREAM_KEEP, hash_ids, hash_key, uniform

words = st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=5)


def splitmix64(seed):
    """The generator's published form, one output."""
    state = (seed + 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_the_mixer_is_splitmix64():
    # The first outputs for the seed 1234567, as implementations in other languages print them.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [hash_key(1234567 + number * 0x9E3779B97F4A7C15) for number in range(4)] == published


@given(words, st.lists(st.integers(0, 2**63 - 1), max_size=20))
def test_the_vectorised_hash_equals_the_scalar_one(key, ids):
    expected = [splitmix64(sample_id ^ hash_key(*key)) for sample_id in ids]
    assert hash_ids(np.array(ids, np.int64), *key).tolist() == expected


@given(words, st.integers(0, 10**9), st.randoms())
def test_an_ids_draw_does_not_depend_on_the_ids_around_it(key, first, random):
    ids = np.arange(first, first + 40)
    chosen = np.array(random.sample(range(40), random.randint(1, 40)))
    np.testing.assert_array_equal(uniform(ids, *key)[chosen], uniform(ids[chosen], *key))


def test_draws_of_earlier_versions_are_kept():
    # Changing these numbers changes the order, the crops and the selection of every run that exists.
    hashes = [16321491304643971414, 4585330820673184961, 10430974457111710706]
    assert hash_ids(np.arange(3), 1, 0, 0).tolist() == hashes
    assert uniform(np.arange(3), 2, 7, 3).tolist() == [0.6106554776712446, 0.6277041237441411, 0.46170548836296277]


@pytest.mark.parametrize("key", [(1, 0, 0), (1, 0, 1), (2, 12345, 0, 3)])
def test_consecutive_ids_give_uniform_draws(key):
    draws = uniform(np.arange(100_000), *key)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi2 = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert 50 < chi2 < 155  # 99 degrees of freedom, 0.9998 of the mass


def test_streams_seeds_and_epochs_are_uncorrelated():
    ids = np.arange(50_000)
    keys = [(STREAM_CROP, 0, 0), (STREAM_FLIP, 0, 0), (STREAM_KEEP, 0, 0), (STREAM_CROP, 1, 0), (STREAM_CROP, 0, 1)]
    correlation = np.corrcoef([uniform(ids, *key) for key in keys])
    assert np.abs(correlation - np.eye(len(keys))).max() < 5 / np.sqrt(len(ids))


@settings(max_examples=50)
@given(words, words)
def test_different_keys_give_different_hashes(one, other):
    mask = 2**64 - 1
    if [word & mask for word in one] != [word & mask for word in other]:
        assert hash_key(*one) != hash_key(*other)
