"""ast_dist/data/decode_torch.py: torchvision's pixels, bit for bit, or an error that names the sample."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, encode_png
from torchvision.transforms.v2 import functional as transforms

from ast_dist.data.decode_torch import decode
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.resize import Box, crop_resize, cut, resize_region
from tests.shards import jpeg

HEIGHT, WIDTH = 37, 53
IMAGE = decode(jpeg(HEIGHT, WIDTH, 0), 0, "key")


def pillow_bytes(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@st.composite
def boxes_inside(draw):
    height, width = draw(st.integers(1, HEIGHT)), draw(st.integers(1, WIDTH))
    return (draw(st.integers(0, HEIGHT - height)), draw(st.integers(0, WIDTH - width)), height, width)


@settings(max_examples=200)
@given(boxes_inside(), st.booleans(), st.integers(1, 40))
@example((3, 5, 16, 16), False, 16)
@example((3, 5, 16, 16), True, 16)
@example((0, 0, HEIGHT, WIDTH), True, 64)
def test_a_box_inside_the_image_equals_torchvisions_resized_crop(box, flip, size):
    out = torch.empty((3, size, size), dtype=torch.uint8)
    crop_resize(IMAGE, np.array(box), flip, size, out)
    expected = transforms.resized_crop(IMAGE, *box, [size, size], antialias=True)
    expected = transforms.horizontal_flip(expected) if flip else expected
    assert torch.equal(out, expected)


@given(st.integers(0, 8), st.integers(0, 8), st.booleans(), st.sampled_from([8, HEIGHT]))
def test_a_box_beyond_the_image_equals_torchvisions_crop_of_the_padded_image(top, left, flip, size):
    """As torchvision's RandomCrop(HEIGHT, padding=4) cuts it."""
    out = torch.full((3, size, size), 99, dtype=torch.uint8)
    crop_resize(IMAGE, np.array([top - 4, left - 4, HEIGHT, HEIGHT]), flip, size, out)
    padded = transforms.pad(IMAGE, [4, 4, 4, 4])
    expected = transforms.resized_crop(padded, top, left, HEIGHT, HEIGHT, [size, size], antialias=True)
    expected = transforms.horizontal_flip(expected) if flip else expected
    assert torch.equal(out, expected)


def test_pixels_beyond_the_image_are_zero():
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    out = torch.full((3, 8, 8), 99, dtype=torch.uint8)
    crop_resize(white, np.array([-2, 3, 8, 8]), False, 8, out)
    assert (out[:, :2] == 0).all() and (out[:, :, 5:] == 0).all() and (out[:, 2:, :5] == 255).all()


def test_the_image_is_left_as_it_was():
    before = IMAGE.clone()
    out = torch.empty((3, 8, 8), dtype=torch.uint8)
    for box in ((0, 0, HEIGHT, WIDTH), (-3, -3, 8, 8), (4, 4, 8, 8)):
        crop_resize(IMAGE, np.array(box), True, 8, out)
    assert torch.equal(IMAGE, before)


def test_a_batchs_other_rows_are_left_alone():
    batch = torch.full((3, 3, 8, 8), 7, dtype=torch.uint8)
    crop_resize(IMAGE, np.array([0, 0, 20, 20]), False, 8, batch[1])
    assert (batch[[0, 2]] == 7).all() and (batch[1] != 7).any()


def test_exif_orientation_is_not_applied():
    pixels = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned, plain = pillow_bytes(pixels, "JPEG", exif=exif), pillow_bytes(pixels, "JPEG")
    assert decode(turned, 0, "key").shape == (3, 20, 30)
    assert torch.equal(decode(turned, 0, "key"), decode(plain, 0, "key"))


@pytest.mark.parametrize(
    "data",
    [
        bytes(encode_jpeg(IMAGE[:1]).numpy()),
        bytes(encode_png(IMAGE[:1]).numpy()),
        pillow_bytes(Image.fromarray(np.full((HEIGHT, WIDTH, 4), 77, np.uint8), "RGBA"), "PNG"),
        pillow_bytes(Image.fromarray(np.full((HEIGHT, WIDTH), 3, np.uint8)).convert("P"), "PNG"),
        pillow_bytes(Image.fromarray(np.full((HEIGHT, WIDTH, 4), 77, np.uint8), "CMYK"), "JPEG"),
    ],
    ids=["grey JPEG", "grey PNG", "RGBA PNG", "palette PNG", "CMYK JPEG"],
)
def test_every_colour_model_becomes_rgb(data):
    image = decode(data, 0, "key")
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)


def gif_of_two_pictures():
    pictures = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    return pillow_bytes(pictures[0], "GIF", save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        jpeg(40, 40, 0)[:300],
        pillow_bytes(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG"),
        gif_of_two_pictures(),
    ],
    ids=["empty", "text", "half a JPEG", "PNG with 16 bits", "animation"],
)
def test_what_is_not_one_8_bit_image_is_a_damaged_sample_named_by_its_key(data):
    with pytest.raises(DamagedSampleError) as caught:
        decode(data, 41, "000041-cat")
    assert str(caught.value).startswith("sample 000041-cat (id 41) does not decode: ")
    assert "\n" not in str(caught.value)
    assert caught.value.sample_id == 41


@settings(max_examples=200)
@given(st.binary(max_size=64), st.integers(0, 400))
def test_arbitrary_damage_never_raises_anything_else(noise, at):
    data = jpeg(20, 20, 0)
    data = data[:at] + noise + data[at + len(noise) :]
    try:
        image = decode(data, 0, "key")
    except DamagedSampleError:
        return
    assert image.ndim == 3 and image.shape[0] == 3 and image.dtype == torch.uint8


def test_decoding_is_torchvisions():
    data = jpeg(64, 48, 3)
    expected = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    assert torch.equal(decode(data, 0, "key"), expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (3, 5), (-4, 4), (4, -4), (7, 7), (0, 20), (19, 0)])
def test_a_box_of_the_output_size_is_cut_as_torchvision_cuts_it(top, left, flip):
    image = torch.randint(1, 256, (3, 20, 24), dtype=torch.uint8)
    out = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    crop_resize(image, np.array([top, left, 16, 16]), flip, 16, out)
    expected = transforms.crop(image, top, left, 16, 16)
    assert torch.equal(out, expected.flip(-1) if flip else expected)


def test_a_box_wholly_outside_the_image_is_black():
    out = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    for top, left in ((-20, 0), (0, 30), (25, -40)):
        crop_resize(torch.ones(3, 20, 24, dtype=torch.uint8), np.array([top, left, 16, 16]), True, 16, out)
        assert not out.any()


@pytest.mark.parametrize("box", [(20, 0, 8, 8), (-9, 0, 8, 8), (0, 60, 8, 8), (3, -8, 8, 8), (40, 60, 5, 9)])
def test_the_region_of_a_box_wholly_outside_is_black(box):
    image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    wanted = Box(*box)
    held = wanted.inside(16, 16)
    out = torch.full((3, 8, 8), 99, dtype=torch.uint8)
    resize_region(cut(image, held), wanted, held, False, out)
    assert not out.any()
