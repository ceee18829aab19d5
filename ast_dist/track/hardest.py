"""The samples that a run finds hardest, with their images: for a table that a person looks through.

Choosing them is quick and done where the gate's memory lies; reading and decoding is for a thread beside the training.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from ast_dist.data.index import Index
from ast_dist.data.read import DamagedSampleError, Reader

MOST_SAMPLES = 32
IMAGE_PX = 96


@dataclass(frozen=True)
class Hardest:
    """The samples of the highest significance, the hardest first, as they were when this was made.

    index: of the training set, on a local disk. ids: (n,) int64, n at most 32. significance: (n,) float32, nats.
    visits: (n,) int32, how often each was trained.
    """

    index: Index
    ids: np.ndarray
    significance: np.ndarray
    visits: np.ndarray

    COLUMNS: ClassVar[tuple[str, ...]] = ("sample", "class", "significance", "visits")

    @classmethod
    def of(cls, index: Index, significance: np.ndarray, visits: np.ndarray, most: int = MOST_SAMPLES) -> "Hardest":
        """Choose among all samples. significance: (num_samples,) float32, NaN where never seen. visits: int32."""
        scores = np.where(np.isfinite(significance), significance, np.float32(-np.inf))
        count = min(most, int(np.isfinite(significance).sum()))
        ids = np.argpartition(-scores, count - 1)[:count] if count else np.zeros(0, dtype=np.int64)
        ids = ids[np.lexsort((ids, -scores[ids]))]
        return cls(index, ids, significance[ids].copy(), visits[ids].copy())

    def rows(self) -> Iterator[tuple[Image.Image, str, str, float, int]]:
        """Each sample's image, 96 pixels on its longer side, and its key, class, significance and visits.

        Damaged samples are left out. Raises OSError where the disk does not answer.
        """
        # A reader of its own: the loader's counts what training reads, and is closed when it is done.
        reader = Reader(self.index)
        classes = self.index.manifest["classes"]
        try:
            for sample_id, score, visits in zip(self.ids, self.significance, self.visits, strict=True):
                try:
                    data = reader.read(int(sample_id))
                except DamagedSampleError:
                    continue
                try:
                    image = _thumbnail(data)
                except Exception:  # Pillow raises of many kinds; what training cannot decode, it tells itself
                    continue
                label = int(self.index.label[sample_id])
                name = str(classes[label]) if label < len(classes) else str(label)
                yield image, self.index.key(int(sample_id)), name, float(score), int(visits)
        finally:
            reader.close()


def _thumbnail(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (IMAGE_PX, IMAGE_PX))  # a JPEG is decoded at a fraction of its size: several times faster
        small = image.convert("RGB")
    small.thumbnail((IMAGE_PX, IMAGE_PX))
    return small
