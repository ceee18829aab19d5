"""What the tests of sources share: small images, and commands that must be refused."""

import io

import numpy as np
import pytest
from PIL import Image

from ast_dist.errors import UserError
from data_prep import make_shards
from data_prep.sources import detect_format, list_samples
from data_prep.sources.options import NO_OPTIONS


def pixels(number, height=6, width=8, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def jpeg(number):
    return encoded(pixels(number))


def listed(src, split="train", options=NO_OPTIONS):
    """The listing of a source whose format is found out."""
    return list_samples(detect_format(str(src)), str(src), split, options)


def by_name(listing):
    """Name → (class, bytes) of every sample of a listing."""
    labels = [listing.classes[label] for label in listing.labels.tolist()]
    return {name: (label, listing.read(name)) for name, label in zip(listing.names, labels, strict=True)}


def not_listed(src, split="train", options=NO_OPTIONS):
    """The one line that a source is refused with."""
    with pytest.raises(UserError) as caught:
        listed(src, split, options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def convert(src, dst, *options, split="train"):
    return make_shards.main([str(src), str(dst), "--split", split, "--workers=1", *options])
