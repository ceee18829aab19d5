"""ast_dist/data/pixel_draws.py: operations and boxes per sample, in torchvision's distributions."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from ast_dist.counter_rng import STREAM_FLIP, uniform
from ast_dist.data.pixel_draws import Kernel, PixelDraws, Space
from ast_dist.data_config import DataConfig

SIDE = 40
JITTER = (0.4, 1.5, 0.3, 0.1)
EVERYTHING = {"color_jitter": JITTER, "erase_share": 0.5}
RANDAUGMENT = DataConfig(auto_augment="randaugment", randaugment_ops=3, **EVERYTHING)
TRIVIALAUGMENT = DataConfig(auto_augment="trivialaugment", **EVERYTHING)
CONFIGS = [RANDAUGMENT, TRIVIALAUGMENT]
AUTO = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
COUNT = 8000


def drawn(config, ids, epoch=0, seed=0):
    """All that is drawn, each round and the boxes as an array with a row for each id."""
    draws = PixelDraws(config, seed)
    rounds = [np.column_stack([each.kernels, each.parameters]) for each in draws.rounds(ids, epoch, SIDE)]
    return [*rounds, draws.erased(ids, epoch, SIDE)]


def kolmogorov_smirnov(ours, theirs):
    values = np.union1d(ours, theirs)
    ranks = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(ranks[0] - ranks[1]).max()


def chi_square_holds(ours: Counter, theirs: Counter):
    """Whether two samples of equal size may be of one distribution, by the normal approximation at four sigmas."""
    cells = ours.keys() | theirs.keys()
    degrees = len(cells) - 1
    statistic = sum((ours[cell] - theirs[cell]) ** 2 / (ours[cell] + theirs[cell]) for cell in cells)
    return statistic < degrees + 4 * np.sqrt(2 * degrees)


@settings(max_examples=30)
@given(
    st.lists(st.integers(-1, 2**40), min_size=1, max_size=30, unique=True),
    st.sampled_from(CONFIGS),
    st.integers(0, 2**40),
    st.integers(0, 500),
    st.randoms(),
)
def test_a_samples_draw_does_not_depend_on_its_batch(ids, config, seed, epoch, random):
    rows = random.sample(range(len(ids)), random.randint(1, len(ids)))
    ids = np.array(ids)
    for apart, together in zip(drawn(config, ids[rows], epoch, seed), drawn(config, ids, epoch, seed), strict=True):
        np.testing.assert_array_equal(apart, together[rows])


@pytest.mark.parametrize("config", CONFIGS, ids=AUTO)
def test_epochs_and_seeds_draw_anew(config):
    ids = np.arange(400)
    first = drawn(config, ids)
    for other in (drawn(config, ids, epoch=1), drawn(config, ids, seed=1)):
        for before, after in zip(first, other, strict=True):
            assert (before != after).any(axis=1).mean() > 0.6  # a quarter is erased in neither


def test_nothing_is_drawn_where_all_is_off():
    draws = PixelDraws(DataConfig(), 0)
    assert draws.rounds(np.arange(5), 0, SIDE) == []
    assert draws.erased(np.arange(5), 0, SIDE) is None


@pytest.mark.parametrize("kind", AUTO)
def test_operations_strengths_and_signs_have_torchvisions_distribution(kind):
    found = []

    class Recorder(AUTO[kind]):
        def _apply_image_or_video_transform(self, image, name, magnitude, interpolation, fill):
            found.append((name, magnitude))
            return image

    torch.manual_seed(0)
    theirs, image = Recorder(), torch.zeros((3, SIDE, SIDE), dtype=torch.uint8)
    rounds = 2 if kind == "randaugment" else 1
    for _ in range(COUNT):
        theirs(image)
    space = Space(kind, SIDE)
    # Kernel and parameters stand for what was drawn: the kernels' own tests say that they do the same.
    table = {}
    for operation, (name, (magnitudes, is_signed)) in enumerate(theirs._AUGMENTATION_SPACE.items()):
        values = magnitudes(31, SIDE, SIDE)
        for strength in range(31):
            for is_negative in (False, True):
                magnitude = 0.0 if values is None else float(values[strength])
                magnitude = -magnitude if is_signed and is_negative else magnitude
                row = space.look_up(np.array([operation]), np.array([strength]), np.array([is_negative]))
                table[name, magnitude] = (row.kernels[0], *row.parameters[0])
    assert len(found) == rounds * COUNT
    config = DataConfig(auto_augment=kind, randaugment_ops=rounds)
    for number, each in enumerate(PixelDraws(config, 7).rounds(np.arange(COUNT), 3, SIDE)):
        ours = Counter((kernel, *row) for kernel, row in zip(each.kernels, each.parameters.tolist(), strict=True))
        assert chi_square_holds(ours, Counter(table[one] for one in found[number::rounds]))


def test_the_operations_of_one_image_are_drawn_apart():
    first, second, third = PixelDraws(RANDAUGMENT, 0).rounds(np.arange(COUNT), 0, SIDE)[:3]
    for a, b in ((first, second), (second, third), (first, third)):
        # Five of the 14 are affine; the other nine each have a kernel of their own.
        assert abs((a.kernels == b.kernels).mean() - (5**2 + 9) / 14**2) < 0.02


def test_randaugment_uses_its_magnitude_and_number_of_operations():
    for magnitude in (0, 30):
        config = DataConfig(auto_augment="randaugment", randaugment_magnitude=magnitude, randaugment_ops=3)
        rounds = PixelDraws(config, 0).rounds(np.arange(500), 0, SIDE)
        assert len(rounds) == 3
        factors = rounds[0].parameters[rounds[0].kernels == Kernel.SHARPNESS, 0]
        np.testing.assert_allclose(np.unique(factors), [1.0] if magnitude == 0 else [0.1, 1.9], rtol=1e-6)


def test_colour_jitter_has_torchvisions_distribution_in_factors_and_order():
    theirs, image = v2.ColorJitter(*JITTER), torch.zeros(3, 1, 1)
    torch.manual_seed(0)
    made = [theirs.make_params([image]) for _ in range(COUNT)]
    rounds = PixelDraws(DataConfig(color_jitter=JITTER), 5).rounds(np.arange(COUNT), 2, SIDE)
    assert len(rounds) == 4
    kernels = np.stack([each.kernels for each in rounds], axis=1)
    factors = np.stack([each.parameters[:, 0] for each in rounds], axis=1)
    kinds = [Kernel.BRIGHTNESS, Kernel.CONTRAST, Kernel.SATURATION, Kernel.HUE]
    orders = Counter(tuple(kinds.index(kernel) for kernel in row) for row in kernels.tolist())
    assert chi_square_holds(orders, Counter(tuple(one["fn_idx"].tolist()) for one in made))
    of_kind = [factors[kernels == kind] for kind in kinds]
    for name, ours in zip(("brightness", "contrast", "saturation", "hue"), of_kind, strict=True):
        expected = np.array([one[f"{name}_factor"] for one in made])
        assert len(ours) == COUNT
        assert kolmogorov_smirnov(ours, expected) < 1.95 * np.sqrt(2 / COUNT)  # p = 0.001
    # One sample's four factors are independent, and of its flip, too.
    by_sample = [factors[np.arange(COUNT), (kernels == kind).argmax(axis=1)] for kind in kinds]
    by_sample.append(uniform(np.arange(COUNT), STREAM_FLIP, 5, 2))
    assert np.abs(np.corrcoef(by_sample) - np.eye(5)).max() < 0.05


def test_a_change_of_strength_0_is_left_out():
    rounds = PixelDraws(DataConfig(color_jitter=(0.4, 0.0, 0.0, 0.1)), 0).rounds(np.arange(300), 0, SIDE)
    assert len(rounds) == 2
    assert {*np.unique([each.kernels for each in rounds])} == {Kernel.BRIGHTNESS, Kernel.HUE}


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.5, 1.0), (0.5, 1.0))])
def test_erased_boxes_have_torchvisions_distribution(scale, ratio):
    """The second pair of ranges often gives a box too large, and then another try or none at all."""
    torch.manual_seed(0)
    theirs, image = v2.RandomErasing(1.0, scale, ratio), torch.zeros(3, SIDE, SIDE)
    made = [theirs.make_params([image]) for _ in range(COUNT)]
    expected = np.array([[one[key] if one["v"] is not None else 0 for key in ("i", "j", "h", "w")] for one in made])
    config = DataConfig(erase_share=1.0, erase_scale=scale, erase_ratio=ratio)
    boxes = PixelDraws(config, 3).erased(np.arange(COUNT), 1, SIDE)
    for statistic in (
        *(lambda b, column=column: b[:, column] for column in range(4)),
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / np.maximum(b[:, 3], 1),
        lambda b: b[:, 0] / np.maximum(SIDE - b[:, 2], 1),
    ):
        assert kolmogorov_smirnov(statistic(boxes), statistic(expected)) < 1.95 * np.sqrt(2 / COUNT)


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_a_share_of_the_images_is_erased(share):
    boxes = PixelDraws(DataConfig(erase_share=share), 0).erased(np.arange(COUNT), 0, SIDE)
    assert abs((boxes[:, 2] > 0).mean() - share) < 0.02
    assert (boxes[boxes[:, 2] == 0] == 0).all()
