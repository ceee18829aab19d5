"""What an encoded image says of itself in its first bytes: kind and size, without decoding it.

    >>> image_header(jpeg_bytes)
    Header(height=375, width=500, kind='jpeg', components=3, bits=8, adobe_transform=None)

For data whose index does not know height and width, and for decoders that must know what they are given. JPEG, PNG
and WebP are parsed here, in a few microseconds; everything else is left to Pillow, which is imported only then.
Sources: ITU-T T.81, annex B (JPEG); PNG specification, section 11.2.2; RFC 9649 and RFC 6386 (WebP).
"""

import io
import struct
from typing import Literal, NamedTuple

_SIZE_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOFn; the three are DHT, JPG and DAC
_BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # a stuffed byte, TEM, RSTn and SOI: no length follows
_NAMED_RGB = 0  # as an Adobe segment would state it
_APP1, _APP14, _EOI, _SOS = 0xE1, 0xEE, 0xD9, 0xDA
_PNG_START = b"\x89PNG\r\n\x1a\n"
_EXIF_START = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type; a palette's colours have three


class Header(NamedTuple):
    """The size and make of an encoded image.

    height, width: pixels as they are stored, so an EXIF orientation is not followed. kind: the format. components:
    channels of the decoded image before any conversion; of a JPEG 1 (grey), 3 or 4 (CMYK). bits: a channel's.
    adobe_transform: of a JPEG with an Adobe segment, its colour transform: 0 (RGB or CMYK), 1 (YCbCr) or 2 (YCCK); 0,
    too, where the components are named R, G and B.
    """

    height: int
    width: int
    kind: "Kind"
    components: int
    bits: int
    adobe_transform: int | None = None


Kind = Literal["jpeg", "png", "webp", "other"]


def image_kind(data: bytes) -> Kind:
    """The format of an encoded image by how it begins; "other" is what only Pillow may know."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == _PNG_START:
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "other"


def image_header(data: bytes) -> Header:
    """Read the header of an encoded image. data: its first bytes, or all of them.

    Whether the rest can be decoded is not asked. Raises ValueError, in one line, for what is no image and for an
    image that ends before its size is stated.
    """
    try:
        header = {"jpeg": _jpeg, "png": _png, "webp": _webp, "other": _other}[image_kind(data)](data)
    except IndexError:
        raise ValueError(f"ends inside its header, after {len(data):,} bytes") from None
    if not (header.height and header.width):
        raise ValueError(f"states a size of {header.width}×{header.height} pixels")
    return header


def exif_orientation(data: bytes, kind: str) -> int:
    """The turn that an image's EXIF data ask for: 2 … 8 (EXIF 2.32, section 4.6.4), or 0 for none.

    data: the encoded image. kind: as `image_header` says. Damaged EXIF data ask for nothing, as decoders see it.
    """
    at = _exif_at(data, kind)
    if not at:
        return 0
    if data[at : at + 6] == _EXIF_START:
        at += 6
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[at : at + 4])
    if order is None:
        return 0
    try:
        (first,) = struct.unpack_from(f"{order}I", data, at + 4)
        (count,) = struct.unpack_from(f"{order}H", data, at + first)
        for entry in range(at + first + 2, at + first + 2 + 12 * count, 12):
            tag, kind_of_value, values, value = struct.unpack_from(f"{order}HHIH", data, entry)
            if tag == _ORIENTATION_TAG:
                return value if (kind_of_value, values) == (3, 1) and 2 <= value <= 8 else 0
    except struct.error:  # the data end early
        return 0
    return 0


def _exif_at(data: bytes, kind: str) -> int:
    """Where EXIF data begin; 0 where there are none."""
    if kind == "png":
        return data.find(b"eXIf") + 4 if b"eXIf" in data else 0
    if kind == "webp":  # the chunk's size stands between its name and its data
        return data.find(b"EXIF") + 8 if b"EXIF" in data else 0
    at = 2
    while kind == "jpeg" and at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != _SOS:
        marker = data[at + 1]
        if marker == _APP1 and data[at + 4 : at + 10] == _EXIF_START:
            return at + 4
        at += 1 if marker == 0xFF else 2 if marker in _BARE_MARKERS else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def _jpeg(data: bytes) -> Header:
    adobe_transform = None
    at = 2
    while True:
        if data[at] != 0xFF:  # libjpeg skips to the next marker, so files with a few stray bytes decode
            at = data.find(b"\xff", at)
            if at < 0:
                raise IndexError
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _SIZE_MARKERS:
            # libjpeg's rule where no Adobe segment states the colours: components named R, G and B are not YCbCr.
            is_named_rgb = data[at + 10 : at + 17 : 3] == b"RGB"
            return Header(
                height=data[at + 5] << 8 | data[at + 6],
                width=data[at + 7] << 8 | data[at + 8],
                kind="jpeg",
                components=data[at + 9],
                bits=data[at + 4],
                adobe_transform=_NAMED_RGB if is_named_rgb and adobe_transform is None else adobe_transform,
            )
        elif marker in _BARE_MARKERS:
            at += 2
        elif marker in (_SOS, _EOI):
            raise ValueError("a JPEG without a frame header")
        else:
            length = data[at + 2] << 8 | data[at + 3]
            if length < 2:
                raise ValueError(f"a JPEG with a segment of {length} bytes at {at:,}")
            if marker == _APP14 and length >= 14 and data[at + 4 : at + 9] == b"Adobe":
                adobe_transform = data[at + 15]
            at += 2 + length  # a thumbnail's own frame header lies inside a segment and is passed over with it


def _png(data: bytes) -> Header:
    if len(data) < 26:
        raise IndexError
    if data[12:16] != b"IHDR":
        raise ValueError("a PNG whose first chunk is not IHDR")
    if data[25] not in _PNG_CHANNELS:
        raise ValueError(f"a PNG of unknown colour type {data[25]}")
    return Header(
        height=int.from_bytes(data[20:24]),
        width=int.from_bytes(data[16:20]),
        kind="png",
        components=_PNG_CHANNELS[data[25]],
        bits=data[24],
    )


def _webp(data: bytes) -> Header:
    if len(data) < 30:
        raise IndexError
    chunk = data[12:16]
    if chunk == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise ValueError("a WebP without a key frame")
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return Header(height, width, "webp", 3, 8)
    if chunk == b"VP8L":
        if data[20] != 0x2F:
            raise ValueError("a WebP without a lossless frame")
        packed = int.from_bytes(data[21:25], "little")
        return Header((packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1, "webp", 4 if packed >> 28 & 1 else 3, 8)
    if chunk == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return Header(height, width, "webp", 4 if data[20] & 0x10 else 3, 8)
    raise ValueError(f"a WebP of unknown kind {chunk!r}")


def _other(data: bytes) -> Header:
    if not data:
        raise ValueError("empty file")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            bits = 16 if image.mode.startswith("I;16") else 32 if image.mode in ("I", "F") else 8
            return Header(image.height, image.width, "other", len(image.getbands()), bits)
    except Exception as error:  # noqa: BLE001 - what Pillow raises depends on the format
        # "cannot identify image file <_io.BytesIO object at 0x7f…>": the address says nothing.
        reason = " ".join(str(error).split()).partition(" <_io.BytesIO")[0]
        raise ValueError(reason or type(error).__name__) from None
