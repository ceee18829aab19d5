"""data_prep.image: what is stored of an image, by what is inside it."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

from data_prep import make_shards
from data_prep.image import DamagedImage, store_image


def pixels(number, height=20, width=28, channels=3):
    return np.random.default_rng(number).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height, width):
    """A picture without detail, so that JPEG's loss stays small beside any turn or colour that is wrong."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 7, columns * 5, rows + columns], 2).astype(np.uint8)


def encoded(array, kind="JPEG", mode=None, **options):
    buffer = io.BytesIO()
    image = Image.frombytes(mode, array.shape[1::-1], array.tobytes()) if mode else Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def with_orientation(array, orientation, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_undone_once_for_all_readers(orientation, kind):
    picture = smooth(32, 48)
    data = with_orientation(picture, orientation, kind)
    stored = store_image(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    actual = decoded(stored.data).permute(1, 2, 0).numpy()
    assert (stored.height, stored.width) == expected.shape[:2] == actual.shape[:2]
    assert np.abs(actual - expected).max() <= (0 if kind == "PNG" else 24)
    assert Image.open(io.BytesIO(stored.data)).getexif().get(0x0112) is None
    assert stored.rewritten == "turned upright"


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_exif_without_a_turn_leaves_the_bytes_untouched(orientation):
    data = with_orientation(pixels(0), orientation)
    assert store_image(data).data == data


@pytest.mark.parametrize("decode", [True, False])
def test_grey_jpegs_are_stored_untouched(decode):
    data = encoded(np.asarray(Image.fromarray(pixels(0)).convert("L")))
    stored = store_image(data, decode=decode)
    assert (stored.data, stored.rewritten) == (data, "")
    assert decoded(stored.data).shape == (3, stored.height, stored.width)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_jpegs_with_four_channels_become_rgb_ones_of_the_same_colours(transform, decode):
    inks = np.concatenate([255 - smooth(32, 48), smooth(32, 48)[:, :, 2:]], 2)
    data = bytearray(encoded(inks, mode="CMYK", quality=95))
    data[data.index(b"Adobe") + 11] = transform  # says how the same four planes are to be read
    stored = store_image(bytes(data), decode=decode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert (stored.rewritten, stored.extension, stored.height, stored.width) == ("from CMYK", "jpg", 32, 48)
    assert Image.open(io.BytesIO(stored.data)).mode == "RGB"
    assert np.abs(decoded(stored.data).permute(1, 2, 0).numpy() - expected).mean() < 2


@pytest.mark.parametrize("decode", [True, False])
def test_an_upside_down_cmyk_jpeg_is_encoded_once_for_both_reasons(decode):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = store_image(encoded(pixels(0, 20, 28, 4), mode="CMYK", exif=exif), decode=decode)
    assert stored.rewritten == "from CMYK and turned upright"
    assert (stored.height, stored.width) == (28, 20)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_inside_decides_the_extension_whatever_the_file_is_called(kind, decode, tmp_path):
    data = encoded(pixels(0), kind)
    (tmp_path / "src" / "cat").mkdir(parents=True)
    (tmp_path / "src" / "cat" / "n02105855_2933.JPEG").write_bytes(data)
    options = [] if decode else ["--no-decode-check"]
    make_shards.main([str(tmp_path / "src"), str(tmp_path / "dst"), "--split=train", "--workers=1", *options])
    with tarfile.open(tmp_path / "dst" / "train" / "train-000000.tar") as tar:
        assert tar.getnames() == [f"00000000-cat-n02105855_2933.{name}" for name in ("cls", kind.lower())]
        assert tar.extractfile(tar.getnames()[1]).read() == data


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_what_only_pillow_knows_by_its_content_is_not_opened_by_other_programs(name):
    # Pillow would hand PostScript to Ghostscript.
    with pytest.raises(DamagedImage, match="cannot identify image file"):
        store_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", decode=False)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF"])
def test_formats_that_training_cannot_decode_become_png_without_loss(kind):
    stored = store_image(encoded(pixels(0), kind))
    assert (stored.extension, stored.rewritten) == ("png", "as PNG")
    assert np.array_equal(decoded(stored.data).permute(1, 2, 0), pixels(0))


@pytest.mark.parametrize("decode", [True, False])
def test_png_of_16_bits_becomes_8_bits(decode):
    wide = np.random.default_rng(0).integers(0, 65536, (9, 7)).astype(np.uint16)
    stored = store_image(encoded(wide, "PNG"), decode=decode)
    assert decoded(stored.data).dtype == torch.uint8
    assert np.array_equal(decoded(stored.data)[0], np.rint(wide / 257))


@pytest.mark.parametrize(
    "start", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF    WEBP", b"GIF89a", b"BM", b"II*\0"]
)
@pytest.mark.parametrize("decode", [True, False])
def test_what_is_no_image_is_damaged_whatever_it_starts_with(start, decode):
    with pytest.raises(DamagedImage, match=r"^[^\n/<]+$"):
        store_image(start + b"no image at all", decode=decode)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "F", "P", "LA"])
def test_tiffs_in_colours_that_png_does_not_hold_become_png_all_the_same(mode):
    buffer = io.BytesIO()
    image = Image.fromarray(smooth(20, 28)).convert(mode)
    image.save(buffer, "TIFF")
    stored = store_image(buffer.getvalue())
    assert (stored.extension, stored.rewritten, stored.height, stored.width) == ("png", "as PNG", 20, 28)
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")).astype(int)
    assert np.abs(decoded(stored.data).permute(1, 2, 0).numpy() - expected).max() <= 1


def test_floats_up_to_1_are_no_black_picture_but_damaged():
    with pytest.raises(DamagedImage, match="floating-point values of at most 1"):
        store_image(encoded(np.full((9, 7), 0.5, np.float32), "TIFF"))
