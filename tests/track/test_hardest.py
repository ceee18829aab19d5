"""The hardest samples are those of the highest significance, with images that a page can hold."""

import zlib

import numpy as np
import pytest

from ast_dist.track.hardest import Hardest
from tests.shards import jpeg, overwrite, photos, restate, write_split


@pytest.fixture(scope="module")
def images():
    return photos(60)


def test_the_most_significant_come_first_and_those_never_seen_not_at_all(tmp_path, images):
    index = write_split(tmp_path / "train", images)
    rng = np.random.default_rng(0)
    significance = rng.uniform(0.0, 5.0, 60).astype(np.float32)
    significance[rng.permutation(60)[:20]] = np.nan
    significance[[3, 50]] = 4.5  # equals go by their number
    visits = np.arange(60, dtype=np.int32)
    hardest = Hardest.of(index, significance, visits)
    seen = [number for number in range(60) if np.isfinite(significance[number])]
    expected = sorted(seen, key=lambda number: (-significance[number], number))[:32]
    assert hardest.ids.tolist() == expected
    rows = list(hardest.rows())
    assert [row[1] for row in rows] == [f"{number:07d}-x" for number in expected]
    assert [row[2] for row in rows] == [f"class-{number % 10}" for number in expected]
    assert [row[3] for row in rows] == [float(significance[number]) for number in expected]
    assert [row[4] for row in rows] == expected
    assert all(max(row[0].size) <= 96 and row[0].mode == "RGB" for row in rows)
    assert max(max(row[0].size) for row in rows) > 60, "none is smaller than it has to be"


def test_later_training_does_not_change_what_was_chosen(tmp_path, images):
    index = write_split(tmp_path / "train", images)
    significance, visits = np.ones(60, dtype=np.float32), np.ones(60, dtype=np.int32)
    hardest = Hardest.of(index, significance, visits, most=2)
    significance[:], visits[:] = 7.0, 7
    assert [(row[3], row[4]) for row in hardest.rows()] == [(1.0, 1), (1.0, 1)]


def test_nothing_seen_is_nothing_to_show(tmp_path, images):
    index = write_split(tmp_path / "train", images)
    never = np.full(60, np.nan, dtype=np.float32)
    assert list(Hardest.of(index, never, np.zeros(60, dtype=np.int32)).rows()) == []


def test_a_damaged_sample_is_left_out_and_a_large_one_made_small(tmp_path, images):
    index = write_split(tmp_path / "train", [jpeg(300, 200, 0), *images[1:]])
    overwrite(index, 1, b"damaged")
    # The bytes are those that the index states, and no image.
    overwrite(index, 2, b"GIF89a" + bytes(int(index.size[2]) - 6))
    index = restate(index, "crc32", 2, zlib.crc32(b"GIF89a" + bytes(int(index.size[2]) - 6)))
    significance = np.full(60, np.nan, dtype=np.float32)
    significance[:4] = 4.0, 3.0, 2.0, 1.0
    rows = list(Hardest.of(index, significance, np.zeros(60, dtype=np.int32)).rows())
    assert [row[1] for row in rows] == ["0000000-x", "0000003-x"]
    assert rows[0][0].size == (64, 96)
