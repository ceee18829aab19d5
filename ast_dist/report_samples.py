"""The samples that the report shows: which, and how they look."""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ast_dist.data.index import Index
from ast_dist.data.read import DamagedSampleError, Reader
from ast_dist.errors import UserError
from ast_dist.report_run import Run

MAX_SAMPLES = 24
SIDE_PX = 96


@dataclass(frozen=True)
class Memory:
    """What a checkpoint's gate remembers of every sample.

    checkpoint: its name. significance: (N,) float32, nats, NaN where never seen. visits, last_epoch: (N,) int32, epochs
    counted from 0. streak: (N,) int32, visits in a row at the top with flat loss, None where the gate watched for none.
    suspects: (N,) bool, those that the gate had set aside when it last planned; None where it watched for none.
    """

    checkpoint: str
    significance: np.ndarray
    visits: np.ndarray
    last_epoch: np.ndarray
    streak: np.ndarray | None = None
    suspects: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One sample to show.

    streak: visits in a row at the top, of a suspect. image: a JPEG of at most 96 pixels a side, its longer one `side`;
    empty where `problem` says why there is none.
    """

    sample_id: int
    significance: float
    visits: int
    last_epoch: int
    streak: int | None = None
    key: str = ""
    class_name: str = ""
    image: bytes = b""
    problem: str = ""
    side: int = 0

    @property
    def source(self) -> str:
        """The picture as a data: URL."""
        return "data:image/jpeg;base64," + base64.b64encode(self.image).decode()


@dataclass(frozen=True)
class Gallery:
    """The samples of one group, worst first or best first, and how many belong to the group in all."""

    samples: Sequence[Sample]
    count: int


def most_significant(memory: Memory) -> Gallery:
    """The samples with the highest significance, the highest first."""
    order = _by_significance(memory)[::-1]
    return _gallery(memory, order[: _share(order)], order.size)


def least_significant(memory: Memory) -> Gallery:
    """The samples with the lowest significance, the lowest first."""
    order = _by_significance(memory)
    return _gallery(memory, order[: _share(order)], order.size)


def hard_tail(memory: Memory) -> Gallery | None:
    """Suspected wrong labels, those that stayed at the top for longest first; None where the gate watched for none."""
    if memory.suspects is None or memory.streak is None:
        return None
    ids = np.flatnonzero(memory.suspects)
    order = ids[np.lexsort((ids, -np.nan_to_num(memory.significance[ids]), -memory.streak[ids]))]
    found = _gallery(memory, order[:MAX_SAMPLES], order.size)
    return Gallery(
        [replace(sample, streak=int(memory.streak[sample.sample_id])) for sample in found.samples], found.count
    )


def find_index(run: Run, folders: Sequence[Path], num_samples: int) -> tuple[Index | None, str]:
    """The run's training set: where its configuration says, or in one of `folders`.

    Returns the index, or None and why, in one sentence.
    """
    manifest = run.setting("manifest.train")
    reasons = []
    stated = run.setting("data.train")
    for place in [*([stated] if isinstance(stated, str) and stated else []), *map(str, folders)]:
        if "://" in place:
            reasons.append(f"{place} is a URL, and the report fetches nothing")
            continue
        if not Path(place).is_dir():
            reasons.append(f"{place} is not there")
            continue
        try:
            index = Index.open(place)
        except UserError as error:
            reasons.append(str(error).rstrip("."))
            continue
        if index.is_remote:
            reasons.append(f"the shards of {place} lie behind a URL, and the report fetches nothing")
        elif index.num_samples != num_samples:
            reasons.append(f"{place} holds {index.num_samples:,} samples, the checkpoint knows {num_samples:,}")
        elif isinstance(manifest, str) and index.hash != manifest:
            reasons.append(f"{place} holds another data set than the run was trained on")
        else:
            return index, ""
    found = "; ".join(reasons) or "config.yaml names no training shards"
    return None, f"No pictures: {found}. Name the folder of the training shards: --data.train DIR."


def with_pictures(gallery: Gallery, index: Index, classes: Sequence[str]) -> Gallery:
    """The same samples with their keys, class names and pictures.

    classes: names by class number; where they are too few, the index's own. A sample that cannot be read or decoded
    says so.
    """
    names = classes if len(classes) >= index.num_classes else [str(name) for name in index.manifest["classes"]]
    reader = Reader(index)
    try:
        return Gallery([_shown(sample, index, reader, names) for sample in gallery.samples], gallery.count)
    finally:
        reader.close()


def thumbnail(data: bytes) -> tuple[bytes, int]:
    """A JPEG of at most SIDE_PX pixels a side, and its longer side. Smaller images keep their size.

    EXIF turns are not followed: the model does not see them either. Raises whatever Pillow raises for such bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
            opened.draft("RGB", (2 * SIDE_PX, 2 * SIDE_PX))
            image = opened.convert("RGB")
    image.thumbnail((SIDE_PX, SIDE_PX))
    side = max(image.size)
    buffer = io.BytesIO()
    # Colours of neighbouring pixels are shared in a JPEG, which shows in images of a few pixels.
    image.save(buffer, "JPEG", quality=82, subsampling=0 if side < SIDE_PX else 2, optimize=True)
    return buffer.getvalue(), side


def _shown(sample: Sample, index: Index, reader: Reader, names: Sequence[str]) -> Sample:
    label = int(index.label[sample.sample_id])
    key = bytes(index.keys[sample.sample_id]).decode(errors="replace")
    named = replace(sample, key=key, class_name=names[label] if 0 <= label < len(names) else f"class {label}")
    try:
        data = reader.read(sample.sample_id)
    except (DamagedSampleError, OSError) as error:
        return replace(named, problem=str(error))
    try:
        image, side = thumbnail(data)
    except Exception as error:  # noqa: BLE001 - what Pillow raises for a broken file depends on its format
        return replace(named, problem=f"does not decode ({type(error).__name__})")
    return replace(named, image=image, side=side)


def _by_significance(memory: Memory) -> np.ndarray:
    """Ids of the samples seen, the least significant first."""
    seen = np.flatnonzero(np.isfinite(memory.significance))
    return seen[np.argsort(memory.significance[seen], kind="stable")]


def _share(order: np.ndarray) -> int:
    """How many to show at either end: no sample of a small set at both."""
    return min(MAX_SAMPLES, max(1, order.size // 2)) if order.size else 0


def _gallery(memory: Memory, ids: np.ndarray, count: int) -> Gallery:
    samples = [
        Sample(
            sample_id=i,
            significance=float(memory.significance[i]),
            visits=int(memory.visits[i]),
            last_epoch=int(memory.last_epoch[i]),
        )
        for i in ids.tolist()
    ]
    return Gallery(samples, int(count))
