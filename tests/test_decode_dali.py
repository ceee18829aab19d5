"""ast_dist/data/decode_dali.py: the pixels of torchvision, on a CPU bit for bit, and damage named in the same words."""

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from ast_dist.data import loader as loader_module
from ast_dist.data.decode_torch import TorchDecoder, decode
from ast_dist.data.encoded import Encoded
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.resize import Box
from ast_dist.data_config import DataConfig
from tests.shards import overwrite, photos, write_split

dali = pytest.importorskip("ast_dist.data.decode_dali")

CPU = torch.device("cpu")
HEIGHT, WIDTH = 75, 101
# What a GPU's decoder may differ by, of 255: another inverse DCT, another order of resize and rounding.
GPU_MEAN_TOLERANCE, GPU_MAX_TOLERANCE = 1.0, 24


def picture(height=HEIGHT, width=WIDTH, seed=0):
    """Smooth colour with noise on it, so that every coefficient of a JPEG counts."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(smooth).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def sample(data, number=0, height=HEIGHT, width=WIDTH):
    return Encoded(data, number, f"key-{number}", height, width)


PLAIN = {
    "4:4:4": encoded(picture(), subsampling=0, quality=92),
    "4:2:2": encoded(picture(), subsampling=1, quality=85),
    "4:2:0": encoded(picture(), subsampling=2, quality=75),
    "progressive": encoded(picture(), progressive=True),
    "grey": encoded(picture().convert("L")),
    "restart markers": encoded(picture(), restart_marker_blocks=3),
}
ODD = {
    "CMYK": encoded(picture().convert("CMYK")),
    "PNG": encoded(picture(), "PNG"),
    "palette": encoded(picture().convert("P"), "PNG"),
    "transparent": encoded(picture().convert("RGBA"), "PNG"),
    "WebP": encoded(picture(), "WEBP"),
    "RGB JPEG": encoded(picture(), keep_rgb=True),
}


@pytest.fixture(scope="module")
def decoder():
    return dali.DaliCpuDecoder()


@st.composite
def boxes(draw):
    height, width = draw(st.integers(1, HEIGHT)), draw(st.integers(1, WIDTH))
    return Box(draw(st.integers(0, HEIGHT - height)), draw(st.integers(0, WIDTH - width)), height, width)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(PLAIN)), boxes()), min_size=1, max_size=8))
def test_a_region_is_torchvisions_bit_for_bit(decoder, wanted):
    samples = [sample(PLAIN[name], number) for number, (name, _) in enumerate(wanted)]
    regions = decoder.regions(samples, [box for _, box in wanted])
    for region, one, (name, box) in zip(regions, samples, wanted, strict=True):
        [expected] = TorchDecoder().regions([one], [box])
        assert torch.equal(region, expected), (name, box)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_is_plain_is_dalis(name):
    assert dali.is_for_dali(sample(PLAIN[name]))


@pytest.mark.parametrize("name", sorted(ODD))
def test_what_decoders_disagree_on_is_torchvisions_and_comes_out_as_rgb(decoder, name):
    assert not dali.is_for_dali(sample(ODD[name]))
    box = Box(3, 5, 40, 60)
    [region] = decoder.regions([sample(ODD[name])], [box])
    assert region.shape == (3, 40, 60) and region.dtype == torch.uint8
    assert torch.equal(region, decode(ODD[name], 0, "")[:, 3:43, 5:65])


def test_exif_orientation_is_not_followed(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), exif=exif.tobytes())
    assert dali.is_for_dali(sample(data))
    [region] = decoder.regions([sample(data)], [Box(0, 0, HEIGHT, WIDTH)])
    assert torch.equal(region, decode(data, 0, ""))


def damaged_jpegs():
    data = PLAIN["4:2:0"]
    return {
        "no image": b"not a picture",
        "empty": b"",
        "header alone": data[:300],
        "end missing": data[: len(data) // 2],
        "end replaced": data[: len(data) // 2] + data[-2:],
        "tables gone": data[:20] + bytes(200) + data[220:],
    }


@pytest.mark.parametrize("name", sorted(damaged_jpegs()))
def test_a_damaged_image_is_named_as_torchvision_names_it_and_its_neighbours_are_kept(decoder, name):
    samples = [sample(PLAIN["4:4:4"], 0), sample(damaged_jpegs()[name], 1), sample(PLAIN["grey"], 2)]
    box = Box(0, 0, HEIGHT, WIDTH)
    [expected] = TorchDecoder().regions([samples[1]], [box])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(2):  # the batch after a refused one is decoded as ever
            first, second, third = decoder.regions(samples, [box] * 3)
            assert torch.equal(first, decode(samples[0].data, 0, ""))
            assert torch.equal(third, decode(samples[2].data, 2, ""))
    if isinstance(expected, DamagedSampleError):
        assert isinstance(second, DamagedSampleError) and str(second) == str(expected)
    else:
        assert second.shape == expected.shape


def test_what_dali_refuses_though_it_is_not_damaged_is_told(monkeypatch):
    decoder = dali.DaliCpuDecoder()

    def refuse(*_):
        raise dali.DaliRefusal("out of patience")

    monkeypatch.setattr(decoder, "_run", refuse)
    with pytest.warns(RuntimeWarning, match="DALI refused 1 images so far .*out of patience"):
        [region] = decoder.regions([sample(PLAIN["grey"])], [Box(0, 0, 9, 9)])
    assert torch.equal(region, decode(PLAIN["grey"], 0, "")[:, :9, :9])


def test_the_fate_of_a_sample_does_not_depend_on_its_neighbours(decoder):
    """JPEGs with bytes changed inside, of which DALI and torchvision accept different ones."""
    rng = np.random.default_rng(0)
    box = Box(0, 0, HEIGHT, WIDTH)
    changed = []
    for number in range(40):
        data = bytearray(PLAIN[("4:2:0", "progressive")[number % 2]])
        for at in rng.integers(len(data) // 3, len(data) - 2, 3):
            data[at] = rng.integers(0, 256)
        changed.append(sample(bytes(data), number))
    alone = [decoder.regions([one], [box])[0] for one in changed]
    among = decoder.regions([*changed, sample(damaged_jpegs()["tables gone"], 99)], [box] * 41)[:40]
    for one, other in zip(alone, among, strict=True):
        assert isinstance(one, DamagedSampleError) == isinstance(other, DamagedSampleError)
        assert isinstance(one, DamagedSampleError) or torch.equal(one, other)


def test_a_size_other_than_the_indexs_is_damage(decoder):
    one = sample(PLAIN["grey"], 7, HEIGHT + 1, WIDTH)
    [region] = decoder.regions([one], [Box(0, 0, 9, 9)])
    [expected] = TorchDecoder().regions([one], [Box(0, 0, 9, 9)])
    assert str(region) == str(expected)
    assert f"has {HEIGHT}×{WIDTH} pixels (height × width), but the index states {HEIGHT + 1}×{WIDTH}" in str(region)


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_batches_of_both_decoders_are_equal_bit_for_bit(tmp_path, crop):
    images = [*photos(40), *(encoded(picture(60, 47, seed), quality=80) for seed in range(8)), *ODD.values()]
    index = write_split(tmp_path / "train", images)
    plan = Plan(np.random.default_rng(0).permutation(len(images)))
    taken = {}
    for name in ("torch", "dali"):
        config = DataConfig(decoder=name, image_size=24, crop=crop, crop_pad_px=6, threads=2, cache="none")
        loader = Loader(index, config, 0, 1)
        assert loader.decoder.name == name
        taken[name] = list(loader.train_batches(plan, 16, 3, 1, image_size=lambda step: 24 + 8 * (step % 2)))
        taken[name] += list(loader.val_batches(20))
        assert loader.samples_decoded == 2 * len(images)
        loader.close()
    for ours, expected in zip(taken["dali"], taken["torch"], strict=True):
        assert torch.equal(ours.images, expected.images) and not ours.damaged
    assert [batch.images.shape[-1] for batch in taken["dali"][:4]] == [24, 32, 24, 32]


def resized(one, box, flip, size):
    image = transforms.resized_crop(decode(one.data, 0, ""), *box, [size, size], antialias=True)
    return transforms.horizontal_flip(image) if flip else image


def assert_whole_batches(device):
    decoder = dali.DaliBatchDecoder(device, threads=2)
    names = sorted(PLAIN) + sorted(ODD)
    # Batches of other lengths and sizes, one with a damaged image and an empty row.
    for count, size in ((4, 32), (len(names), 24), (3, 64), (0, 16)):
        samples = [sample(({**PLAIN, **ODD})[name], number) for number, name in enumerate(names[:count])]
        places = [Box(number, 2 * number, 50, 40) for number in range(count)]
        flips = np.arange(count) % 2 == 1
        images, damaged, ready = decoder.decode(samples, places, flips, size)
        if ready is not None:
            ready.synchronize()
        assert images.shape == (count, 3, size, size) and images.device.type == device.type and not damaged
        assert images.is_contiguous(memory_format=torch.channels_last)
        for row, one in enumerate(samples):
            expected = resized(one, places[row], flips[row], size).int()
            apart = (images[row].cpu().int() - expected).abs()
            assert apart.float().mean() <= GPU_MEAN_TOLERANCE, names[row]
            assert apart.max() <= GPU_MAX_TOLERANCE, names[row]
    samples = [sample(PLAIN["grey"]), None, sample(damaged_jpegs()["end missing"], 1)]
    images, damaged, _ = decoder.decode(samples, [Box(0, 0, 30, 30)] * 3, np.zeros(3, bool), 16)
    assert [error.sample_id for error in damaged] == [1]
    assert images[0].any() and not images[1].any()
    decoder.close()


def test_a_whole_batch_is_within_tolerance_of_torchvision_whatever_its_length_and_size():
    assert_whole_batches(torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loader_of_whole_batches_gives_the_rows_of_one_of_regions(tmp_path, monkeypatch, rank):
    """The way that a GPU goes, on the CPU: reading, padding, damage, sizes and counts are the loader's own."""
    images = [*photos(30), *(encoded(picture(60, 47, seed)) for seed in range(5)), *ODD.values(), b"no image at all"]
    index = write_split(tmp_path / "train", [*images[:-1], images[0]])
    overwrite(index, len(images) - 1, b"damaged since")
    plan, config = Plan(np.arange(len(images))), DataConfig(decoder="dali", image_size=24, threads=2, cache="none")
    taken = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(loader_module, "make_decoder", lambda *_, **__: dali.DaliBatchDecoder(CPU, 2))
        loader = Loader(index, config, rank, 2)
        taken.append(
            [
                *loader.train_batches(plan, 9, 3, 1, image_size=lambda step: 24 + 8 * (step % 2)),
                *loader.train_batches(plan, 9, 3, 1, start_step=3),
                *loader.val_batches(16),
            ]
        )
        stopped = loader.train_batches(plan, 3, 3, 1)
        next(stopped)
        stopped.close()
        loader.close()
    for ours, expected in zip(taken[1], taken[0], strict=True):
        for name in ("ids", "labels", "weights", "is_active"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        assert (ours.damaged, ours.planned, ours.images.shape) == (
            expected.damaged,
            expected.planned,
            expected.images.shape,
        )
        apart = (ours.images.int() - expected.images.int()).abs()
        assert apart.float().mean() <= GPU_MEAN_TOLERANCE and apart.max() <= GPU_MAX_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_batch_is_within_tolerance_of_torchvision():
    assert_whole_batches(torch.device("cuda", 0))
