"""What an index states of an image that stays as it is, from its header."""

from typing import NamedTuple

from ast_dist.data.header import exif_orientation, image_header
from data_prep.image import DamagedImage

# What training decodes. Other images would have to be stored anew, which is what make_shards does without --index-only.
DECODED_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
WIDE_PNG = "PNG of 16 bits, which training does not decode; convert the set"
# What comes of images that are unusual, by ImageFacts.unusual.
WARNINGS = {"turned by EXIF": "decoders do not turn them", "CMYK": "decoders disagree on their colours"}


class ImageFacts(NamedTuple):
    """height, width: pixels, EXIF not followed. unusual: a key of WARNINGS, or empty."""

    height: int
    width: int
    unusual: str


def image_facts(data: bytes) -> ImageFacts:
    """Judge an image by its header; `data` is all of it. Raises DamagedImage when it is none that training decodes."""
    try:
        header = image_header(data)
    except ValueError as error:
        raise DamagedImage(str(error)) from None
    if header.kind == "other":
        raise DamagedImage("neither JPEG nor PNG nor WebP")
    if header.kind == "png" and header.bits == 16:
        raise DamagedImage(WIDE_PNG)
    unusual = ""
    if exif_orientation(data, header.kind):
        unusual = "turned by EXIF"
    elif header.kind == "jpeg" and header.components == 4:
        unusual = "CMYK"
    return ImageFacts(header.height, header.width, unusual)
