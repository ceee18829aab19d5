"""scikit-learn's digits: 1,797 real handwritten digits, 8×8 pixels, with no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
The 17 grey levels 0 … 16 are spread over 0 … 255 and stored as grey JPEGs of quality 100, ~430 bytes each. A decoded
pixel differs from its level by at most 1 of 255, where neighbouring levels are 16 apart, so nothing is lost.
"""

import io

import numpy as np

from ast_dist.counter_rng import STREAM_CONVERT, hash_ids
from ast_dist.errors import UserError
from data_prep.sources.listing import Listing, ReadMemory
from data_prep.sources.options import NO_OPTIONS, SourceOptions

VAL_SHARE = 0.2
# Not the command's seed: splits that were made with two different seeds must not overlap.
SPLIT_SEED = 1797


def list_samples(src: str, split: str, options: SourceOptions = NO_OPTIONS) -> Listing:
    """List the digits of one split: of each class a fifth, drawn once and for all, is `val`, the rest `train`.

    Raises UserError when scikit-learn is not installed, or when `src` is not the word `digits`.
    """
    if src != "digits":
        raise UserError(f"{src}: --format digits takes no folder. Write `digits` as SRC.")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("digits: scikit-learn is not installed. Install it: pip install 'ast-dist[demo]'") from None
    from PIL import Image

    data = load_digits()
    labels = data.target.astype(np.int32)
    chosen = np.flatnonzero(val_mask(labels) == (split == "val"))
    images: dict[str, bytes] = {}
    for row in chosen:
        buffer = io.BytesIO()
        pixels = np.rint(data.images[row] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=100)
        images[f"{labels[row]}/{row:04d}.jpg"] = buffer.getvalue()
    return Listing(
        format="digits",
        classes=[str(name) for name in data.target_names],
        names=list(images),
        labels=labels[chosen],
        sizes=np.asarray([len(image) for image in images.values()], np.int64),
        stamps=np.zeros(len(images), np.int64),
        read=ReadMemory(images),
    )


def val_mask(labels: np.ndarray) -> np.ndarray:
    """Draw a fifth of each class. labels: (N,) class numbers. Returns (N,) bool, the same for the same labels."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        drawn = np.argsort(hash_ids(rows, STREAM_CONVERT, SPLIT_SEED), kind="stable")
        mask[rows[drawn[: round(VAL_SHARE * len(rows))]]] = True
    return mask
