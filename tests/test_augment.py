"""ast_dist/data/augment.py: crops and flips per sample, in torchvision's distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from ast_dist.data.augment import central_boxes, train_crops, val_crops
from ast_dist.data_config import DataConfig

RESIZED = DataConfig(crop="resized", crop_scale_min=0.08)
PADDED = DataConfig(crop="padded", crop_pad_px=4)
shapes = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=30)


def crops_of_one_shape(count, height, width, config, seed=0, epoch=0):
    return train_crops(np.arange(count), np.full(count, height), np.full(count, width), seed, epoch, config)


@given(shapes, st.sampled_from(["resized", "padded", "none"]), st.integers(0, 2**40), st.randoms())
def test_a_samples_draw_does_not_depend_on_its_batch(shapes, crop, seed, random):
    config = DataConfig(crop=crop)
    ids, (heights, widths) = np.arange(len(shapes)) * 7, np.array(shapes).T
    together = train_crops(ids, heights, widths, seed, 3, config)
    rows = np.array(random.sample(range(len(ids)), random.randint(1, len(ids))))
    apart = train_crops(ids[rows], heights[rows], widths[rows], seed, 3, config)
    np.testing.assert_array_equal(apart.boxes, together.boxes[rows])
    np.testing.assert_array_equal(apart.flips, together.flips[rows])


@settings(max_examples=200)
@given(shapes, st.floats(0.01, 1.0), st.integers(0, 2**40))
def test_resized_crops_lie_inside_the_image(shapes, scale_min, seed):
    # Types as in the index: a product of two int32 sides must not overflow.
    heights, widths = np.array(shapes, np.int32).T
    config = DataConfig(crop="resized", crop_scale_min=scale_min)
    boxes = train_crops(np.arange(len(shapes)), heights, widths, seed, 0, config).boxes
    top, left, height, width = boxes.T
    assert boxes.dtype == np.int64
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()


def test_areas_beyond_32_bits_do_not_overflow():
    side = np.full(200, 60_000, np.int32)
    _, _, height, width = train_crops(np.arange(200), side, side, 0, 0, RESIZED).boxes.T
    assert 0.3 < (height * width / 3.6e9).mean() < 0.8


@pytest.mark.parametrize("shape", [(300, 400), (45, 30), (64, 300), (300, 40)], ids=str)
def test_resized_crops_have_torchvisions_distribution(shape):
    """Two-sample Kolmogorov-Smirnov tests; the last two shapes are so long that the central fallback is common."""
    height, width = shape
    count = 6000
    ours = crops_of_one_shape(count, height, width, RESIZED, seed=11).boxes
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
    ):
        assert kolmogorov_smirnov(statistic(ours), statistic(theirs)) < 1.95 * np.sqrt(2 / count)  # p = 0.001


def kolmogorov_smirnov(ours, theirs):
    values = np.union1d(ours, theirs)
    ranks = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(ranks[0] - ranks[1]).max()


def test_an_image_too_long_for_any_crop_gets_the_largest_central_one_as_in_torchvision():
    for height, width in [(10, 400), (400, 10), (1, 50), (50, 1)]:
        ours = crops_of_one_shape(20, height, width, DataConfig(crop="resized", crop_scale_min=1.0)).boxes
        theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
        assert (ours == theirs).all()


@pytest.mark.parametrize("pad_px", [1, 4])
def test_padded_crops_reach_every_shift_equally_often_on_both_axes_alike(pad_px):
    count, shifts = 9000, 2 * pad_px + 1
    config = DataConfig(crop="padded", crop_pad_px=pad_px)
    top, left, height, width = crops_of_one_shape(count, 32, 32, config).boxes.T
    assert (height == 32).all() and (width == 32).all()
    pairs = np.zeros((shifts, shifts), np.int64)
    np.add.at(pairs, (top + pad_px, left + pad_px), 1)
    expected = count / shifts**2
    degrees = shifts**2 - 1
    assert ((pairs - expected) ** 2 / expected).sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_padded_crops_of_other_than_square_images_shift_the_central_square():
    top, left, height, width = crops_of_one_shape(500, 20, 31, PADDED).boxes.T
    assert {*height, *width} == {20}
    assert {*top} == {*range(-4, 5)} and {*left} == {*range(5 - 4, 5 + 5)}


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_half_of_the_training_images_are_mirrored_whatever_their_crop(crop):
    config = DataConfig(crop=crop)
    crops = crops_of_one_shape(20_000, 40, 40, config)
    assert abs(crops.flips.mean() - 0.5) < 0.015
    if crop != "none":
        for column in (0, 1):
            assert abs(np.corrcoef(crops.flips, crops.boxes[:, column])[0, 1]) < 0.03


def test_no_image_is_mirrored_without_flip():
    assert not crops_of_one_shape(1000, 40, 40, DataConfig(flip=False)).flips.any()


@pytest.mark.parametrize("config", [RESIZED, PADDED], ids=["resized", "padded"])
def test_epochs_and_seeds_draw_anew(config):
    first = crops_of_one_shape(1000, 40, 40, config)
    for other in (crops_of_one_shape(1000, 40, 40, config, epoch=1), crops_of_one_shape(1000, 40, 40, config, seed=1)):
        assert (first.boxes != other.boxes).any(axis=1).mean() > 0.9
        assert abs((first.flips == other.flips).mean() - 0.5) < 0.1


@given(shapes, st.floats(0.05, 1.0))
def test_validation_crops_are_central_squares_inside_the_image_and_never_mirrored(shapes, ratio):
    heights, widths = np.array(shapes, np.int32).T
    crops = val_crops(heights, widths, DataConfig(val_crop_ratio=ratio))
    top, left, height, width = crops.boxes.T
    np.testing.assert_array_equal(height, width)
    np.testing.assert_array_equal(height, np.maximum(1, np.round(np.minimum(heights, widths) * ratio)))
    assert (np.abs(2 * top + height - heights) <= 1).all() and (np.abs(2 * left + width - widths) <= 1).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert not crops.flips.any()


def test_crop_none_takes_the_whole_central_square():
    crops = crops_of_one_shape(5, 20, 31, DataConfig(crop="none"))
    np.testing.assert_array_equal(crops.boxes, central_boxes(np.full(5, 20), np.full(5, 31), 1.0))
    assert crops.boxes[0].tolist() == [0, 5, 20, 20]
