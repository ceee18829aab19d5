"""ast_dist/data/cache.py: decoded images that fit are kept; those that do not say so."""

import numpy as np
import pytest

from ast_dist.data.cache import DecodedCache, make_cache
from ast_dist.data_config import DataConfig
from ast_dist.errors import UserError
from tests.shards import photos, squares, write_split


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("equal") / "train", squares(12, side=16))


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("varied") / "train", photos(6))


def test_a_cache_gives_back_what_was_put_and_nothing_else():
    cache = DecodedCache(4, 5, 6)
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 6), np.uint8)
    assert cache.get(2) is None
    cache.put(2, image)
    np.testing.assert_array_equal(cache.get(2), image)
    assert [sample_id for sample_id in range(4) if cache.get(sample_id) is not None] == [2]


def test_a_black_image_counts_as_kept():
    cache = DecodedCache(1, 2, 2)
    cache.put(0, np.zeros((3, 2, 2), np.uint8))
    assert cache.get(0) is not None


@pytest.mark.parametrize("choice", ["auto", "ram"])
def test_images_of_one_size_that_fit_are_cached(equal, choice):
    assert make_cache(equal, DataConfig(cache=choice)).images.shape == (12, 3, 16, 16)


def test_none_caches_nothing(equal):
    assert make_cache(equal, DataConfig(cache="none")) is None


def test_auto_caches_nothing_where_images_differ_in_size_or_do_not_fit(equal, varied):
    assert make_cache(varied, DataConfig(cache="auto")) is None
    assert make_cache(equal, DataConfig(cache="auto", cache_mb=0)) is None


def test_ram_refuses_images_of_different_sizes_and_names_the_smallest_and_the_largest(varied):
    heights, widths = np.asarray(varied.height), np.asarray(varied.width)
    with pytest.raises(UserError) as caught:
        make_cache(varied, DataConfig(cache="ram"))
    for number in (heights.min(), heights.max(), widths.min(), widths.max()):
        assert str(number) in str(caught.value)
    assert "--data.cache none" in str(caught.value)


def test_ram_refuses_what_does_not_fit_with_both_numbers(tmp_path):
    index = write_split(tmp_path / "train", squares(40, side=128))
    with pytest.raises(UserError, match=r"needs 2 MB a rank, but data\.cache_mb allows 1\."):
        make_cache(index, DataConfig(cache="ram", cache_mb=1))
