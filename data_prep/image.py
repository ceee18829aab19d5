"""One image from its source to its shard: judged once, and left as it is where all readers agree on it."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ast_dist.data.header import exif_orientation, image_header, image_kind

if TYPE_CHECKING:
    from PIL import Image

JPEG_QUALITY = 95
# What files of images end in; what is inside decides how they are stored.
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
# What Pillow may open. It knows more formats, but some start other programs, and none is one of photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# What Pillow writes to PNG as it is; the last three have 16 bits, which are reduced afterwards.
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B"}


class DamagedImage(Exception):
    """An image that cannot be decoded; the message says why, in one line."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it goes into a shard.

    data: encoded bytes. extension: jpg, png or webp. height, width: pixels, as
    `torchvision.io.decode_image(data, mode="RGB")` gives them. rewritten: what was changed; empty where the bytes
    are the source's own.
    """

    data: bytes
    extension: str
    height: int
    width: int
    rewritten: str = ""


def store_image(
    data: bytes, resize_short: int | None = None, jpeg_quality: int = JPEG_QUALITY, decode: bool = True
) -> StoredImage:
    """Judge one image and decide what is stored.

    data: encoded bytes; they alone say what format this is. resize_short: pixels to which a longer short side is
    reduced (Lanczos). jpeg_quality: 1 … 100, where a JPEG is encoded again. decode: decode the image, whole, to see
    whether that works; otherwise height and width come from its header.

    The bytes stay untouched, with these exceptions, with and without `decode`:
    - Images whose EXIF data ask for a turn are turned upright: some readers follow EXIF, others do not, and a crop
      box must mean the same for all.
    - JPEGs in CMYK or YCCK become RGB: not every decoder reads them, and those that do disagree on the colours.
    - Larger images are reduced where `resize_short` says so.
    - Formats that torchvision does not read (BMP, GIF, PPM, TIFF) become PNG, of an animation the first picture.
    - PNGs with 16 bits a channel are brought to 8, since decoders disagree on their type.
    PNG stays PNG, everything else that is encoded again becomes JPEG. Grey images stay grey: all decoders expand them.
    Raises DamagedImage.
    """
    if not data:
        raise DamagedImage("empty file")
    rewritten: list[str] = []
    kind = image_kind(data)
    if kind == "other":
        data, kind = _as_png(data), "png"
        rewritten.append("as PNG")
    extension = _EXTENSIONS[kind]
    try:
        header = image_header(data)
    except ValueError as error:
        if decode:
            decode_rgb(data)  # says more of what is wrong
        raise DamagedImage(str(error)) from None
    turn = exif_orientation(data, kind)
    is_cmyk = kind == "jpeg" and header.components == 4
    is_wide = kind == "png" and header.bits == 16
    is_large = resize_short is not None and min(header.height, header.width) > resize_short
    if not (decode or turn or is_large or is_cmyk or is_wide):
        return StoredImage(data, extension, header.height, header.width, " and ".join(rewritten))

    source = pixels = decode_rgb(data)
    if pixels.dtype != np.uint8:
        pixels = _to_8_bits(pixels)
        rewritten.append("with 8 bits")
    if is_cmyk:
        rewritten.append("from CMYK")
    if turn:
        pixels = _upright(pixels, turn)
        rewritten.append("turned upright")
    if resize_short and min(pixels.shape[:2]) > resize_short:
        pixels = _resized(pixels, resize_short)
        rewritten.append(f"short side {resize_short} px")
    if is_cmyk or pixels is not source:
        extension = "png" if extension == "png" else "jpg"
        data = _encode(pixels, extension, jpeg_quality)
    height, width = pixels.shape[:2]
    return StoredImage(data, extension, height, width, " and ".join(rewritten))


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode an image as training does. Returns (H, W, 3), uint8 (uint16 for PNGs with 16 bits a channel).

    EXIF orientation is not followed. Raises DamagedImage.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_image

    if not data:
        raise DamagedImage("empty file")
    try:
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        # "decode_jpeg, /build/…/decode_jpeg.cpp:171, Image is incomplete or truncated": only the last part says why.
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])
        raise DamagedImage(reason.strip()) from None
    if pixels.ndim != 3:
        raise DamagedImage(f"{pixels.shape[0]} pictures in one file")
    return pixels.permute(1, 2, 0).numpy()


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 2 … 8 (EXIF 2.32, section 4.6.4). pixels: (H, W, 3)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    # After the exchange of rows and columns, which of the two axes run backwards.
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _resized(pixels: np.ndarray, short_px: int) -> np.ndarray:
    from PIL import Image

    height, width = pixels.shape[:2]
    short = min(height, width)
    size = (max(1, round(width * short_px / short)), max(1, round(height * short_px / short)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _encode(pixels: np.ndarray, extension: str, jpeg_quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if extension == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=jpeg_quality)
    return buffer.getvalue()


def _as_png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    try:
        with _quiet():
            image = _open(data)
            if image.mode == "F" and np.asarray(image).max() <= 1:
                raise DamagedImage("floating-point values of at most 1, which 8 bits would make black")
            if image.mode not in _PNG_MODES:
                image = image.convert("RGB")
            image.save(buffer, "PNG")
    except DamagedImage:
        raise
    except Exception as error:  # noqa: BLE001 - what Pillow raises for a broken file depends on its format
        raise DamagedImage(_first_line(error)) from None
    return buffer.getvalue()


def _open(data: bytes) -> "Image.Image":
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # these are the person's own files, however large
    return Image.open(io.BytesIO(data), formats=_FORMATS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of odd metadata without naming the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    # "cannot identify image file <_io.BytesIO object at 0x7f…>": the address would differ from run to run.
    text = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
    return text.splitlines()[0] if text else type(error).__name__
