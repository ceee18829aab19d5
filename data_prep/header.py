"""What an image says of itself before it is decoded, read from its bytes alone.

Pillow does this, too, but builds a whole image object for it; this is called once for every image of a conversion.
"""

import struct
from typing import Literal, NamedTuple

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_IN_JPEG = b"Exif\0\0"
# Markers of a JPEG (ITU-T T.81, table B.1): those that stand alone, those of a frame, and that of the first scan.
_ALONE = {0x01, *range(0xD0, 0xD9)}
_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_APP1 = 0xE1
_SCAN = 0xDA


class Header(NamedTuple):
    """An image's header.

    kind: the format, from the first bytes and never from a name; "other" is what only Pillow may know. height, width:
    pixels; 0 where this module cannot tell. channels: as stored, 0 where it cannot tell; a JPEG with 4 is CMYK or
    YCCK. bits: of a channel. has_exif: whether there are EXIF data, which may ask for a turn.
    """

    kind: Literal["jpg", "png", "webp", "other"]
    height: int = 0
    width: int = 0
    channels: int = 0
    bits: int = 8
    has_exif: bool = False


def read_header(data: bytes) -> Header:
    """Read the header of an encoded image. Never fails: what is damaged has no size."""
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:8] == _PNG_SIGNATURE:
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Header("webp", has_exif=b"EXIF" in data)
    return Header("other")


def _jpeg(data: bytes) -> Header:
    """Walk the segments up to the first scan; everything that matters stands before it."""
    height = width = channels = 0
    bits, has_exif = 8, False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        if marker == _SCAN:
            return Header("jpg", height, width, channels, bits, has_exif)
        if marker in _FRAME and at + 10 <= len(data):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
        elif marker == _APP1 and data[at + 4 : at + 10] == _EXIF_IN_JPEG:
            has_exif = True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return Header("jpg", 0, 0, channels, bits, has_exif)  # no scan: let a library say what is wrong


def _png(data: bytes) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return Header("png")
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return Header("png", height, width, bits=bits, has_exif=b"eXIf" in data)
