"""ast_dist/data/header.py: it says of every image what Pillow says, and of no image that it is one."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ast_dist.data.header import Header, exif_orientation, image_header


def encoded(height, width, mode="RGB", kind="JPEG", **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def with_thumbnail(data):
    """The JPEG with an Exif segment that holds a whole JPEG of another size, as cameras write it."""
    no_tags = b"II*\0" + struct.pack("<IHI", 8, 0, 0)
    body = b"Exif\0\0" + no_tags + encoded(6, 11)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def with_fill_bytes(data):
    """The JPEG with fill bytes in front of its second marker."""
    return data[:2] + b"\xff\xff\xff" + data[2:]


def header_or_fault(data):
    """The header, or None where there is a ValueError; its message must be one line that names no address."""
    try:
        return image_header(data)
    except ValueError as error:
        text = str(error)
    assert text
    assert "\n" not in text
    assert "0x" not in text
    return None


sides = st.integers(1, 200)
jpegs = st.builds(
    lambda height, width, mode, options, change: change(encoded(height, width, mode, **options)),
    sides,
    sides,
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.fixed_dictionaries(
        {},
        optional={
            "progressive": st.just(True),
            "optimize": st.just(True),
            "quality": st.integers(1, 95),
            "restart_marker_blocks": st.integers(1, 5),
            "comment": st.binary(max_size=50),
            "icc_profile": st.binary(min_size=1, max_size=70_000),  # above 65,519 bytes it takes two segments
        },
    ),
    st.sampled_from([bytes, with_thumbnail, with_fill_bytes]),
)


@settings(deadline=None, max_examples=150)
@given(jpegs)
def test_a_jpegs_header_says_what_pillow_says(data):
    image = Image.open(io.BytesIO(data))
    expected = Header(image.height, image.width, "jpeg", len(image.getbands()), 8, image.info.get("adobe_transform"))
    assert image_header(data) == expected


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]))
def test_a_pngs_header_says_what_pillow_says(height, width, mode):
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full((height, width), 40_000, np.uint16)).save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data = encoded(height, width, mode, "PNG")
    channels = {"P": 3}.get(mode, len(Image.open(io.BytesIO(data)).getbands()))
    header = image_header(data)
    assert header[:4] == (height, width, "png", channels)
    assert (header.bits == 16) == (mode == "I;16")


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.sampled_from(["RGB", "RGBA"]), st.booleans(), st.booleans())
def test_a_webps_header_says_what_pillow_says(height, width, mode, lossless, extended):
    options = {"icc_profile": b"profile"} if extended else {}
    data = encoded(height, width, mode, "WEBP", lossless=lossless, method=0, **options)
    image = Image.open(io.BytesIO(data))
    assert image_header(data) == Header(image.height, image.width, "webp", len(image.getbands()), 8)


def test_the_kinds_of_webp_that_are_tested_are_the_three_there_are():
    chunks = [
        encoded(9, 9, "RGB", "WEBP", lossless=False),
        encoded(9, 9, "RGB", "WEBP", lossless=True),
        encoded(9, 9, "RGB", "WEBP", icc_profile=b"profile"),
    ]
    assert [data[12:16] for data in chunks] == [b"VP8 ", b"VP8L", b"VP8X"]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_are_left_to_pillow(kind):
    header = image_header(encoded(7, 12, "RGB", kind))
    assert header[:3] == (7, 12, "other")


@settings(deadline=None, max_examples=100)
@given(jpegs | st.sampled_from([encoded(30, 40, "RGBA", kind) for kind in ("PNG", "WEBP")]), st.floats(0, 1))
def test_an_image_cut_short_gives_its_size_or_a_valueerror_in_one_line(data, share):
    assert header_or_fault(data[: int(share * len(data))]) in (image_header(data), None)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"RIFF\0\0\0\0WEBPVP8X"]),
    st.binary(max_size=80),
)
def test_arbitrary_bytes_give_a_header_with_a_size_or_a_valueerror(start, rest):
    header = header_or_fault(start + rest)
    assert header is None or (header.height > 0 and header.width > 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"no image at all", "cannot identify image file"),
        (b"\xff\xd8\xff", "ends inside its header, after 3 bytes"),
        (encoded(8, 8)[:100], "ends inside its header, after 100 bytes"),
        (b"\xff\xd8\xff\xd9", "a JPEG without a frame header"),
        (b"\xff\xd8\xff\xe0\0\1", "a JPEG with a segment of 1 bytes at 2"),
        (encoded(8, 8, kind="PNG")[:20], "ends inside its header, after 20 bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG whose first chunk is not IHDR"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(10), "states a size of 0×0 pixels"),
    ],
)
def test_what_is_no_image_says_why(data, expected):
    with pytest.raises(ValueError, match=expected):
        image_header(data)


def test_a_header_needs_neither_torch_nor_pillow():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['PIL'] = None; from ast_dist.data.header import image_header;"
        "print(image_header(sys.stdin.buffer.read()).width)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=encoded(3, 5), capture_output=True, check=True)
    assert done.stdout == b"5\n"


@pytest.mark.parametrize(
    "inserted",
    [
        b"\xff\xc4\0\x05\1\2\3",  # a segment of Huffman tables, whose marker lies among those of frame headers
        b"\xff\xd0",  # a restart marker, which has no length
        b"\xff\x01",
        b"\x13\x37\x37",  # stray bytes
    ],
)
def test_what_decoders_pass_over_before_the_frame_header_is_passed_over(inserted):
    data = encoded(30, 40)
    assert image_header(data[:20] + inserted + data[20:]) == image_header(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("byte_order", [b"II", b"MM"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_pillows_where_it_asks_for_a_turn(kind, byte_order, orientation):
    exif = Image.Exif()
    exif.endian = "<" if byte_order == b"II" else ">"
    exif[0x010F], exif[0x0112] = "a camera", orientation
    data = encoded(9, 7, kind=kind, exif=exif.tobytes())
    assert byte_order in data
    assert exif_orientation(data, kind.lower()) == (orientation if 2 <= orientation <= 8 else 0)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.sampled_from(["jpeg", "png", "webp", "other"]))
def test_damaged_exif_data_ask_for_no_turn_or_one_of_seven(rest, kind):
    mark = {"jpeg": b"Exif\0\0", "png": b"eXIf", "webp": b"EXIF\0\0\0\0"}.get(kind, b"")
    assert exif_orientation(mark + b"II*\0" + rest, kind) in {0, *range(2, 9)}
    assert exif_orientation(mark + b"MM\0*\0\0\0\x08" + rest, kind) in {0, *range(2, 9)}
