"""Loose files opened once, many at a time: what they weigh, and what their headers say."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.facts import ImageFacts, image_facts
from data_prep.image import DamagedImage
from data_prep.pool import advance

THREADS = 8  # in each worker: on a network mount the time is spent waiting
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class FilesTask:
    """Some files: names below root."""

    root: str
    names: list[str]


@dataclass(frozen=True)
class CheckedFiles:
    """What the files are. size, height, width: (names,) int64, 0 where the file is left out. damaged: name and reason
    of each of those. unusual: how many images are odd, by what they are."""

    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    damaged: list[tuple[str, str]]
    unusual: dict[str, int]


def check_files(task: FilesTask) -> CheckedFiles:
    """Read every file's header. Raises UserError when a file that is there cannot be read."""
    rows = np.zeros((3, len(task.names)), np.int64)
    damaged: list[tuple[str, str]] = []
    unusual: Counter[str] = Counter()
    with ThreadPoolExecutor(THREADS) as threads:
        for row, found in enumerate(threads.map(lambda name: _facts(Path(task.root, name)), task.names)):
            advance()
            if isinstance(found, str):
                damaged.append((task.names[row], found))
                continue
            size, facts = found
            rows[:, row] = size, facts.height, facts.width
            if facts.unusual:
                unusual[facts.unusual] += 1
    return CheckedFiles(rows[0], rows[1], rows[2], damaged, dict(unusual))


def _facts(path: Path) -> tuple[int, ImageFacts] | str:
    """A file's size and facts, or what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEAD_BYTES)
            if len(data) < _HEAD_BYTES:
                return len(data), image_facts(data)
            size = path.stat().st_size
            try:
                if data[:4] != b"RIFF":  # a WebP's EXIF data stand at its end
                    return size, image_facts(data)
            except DamagedImage:
                pass  # a long profile may stand before the size
            data += file.read()
            return size, image_facts(data)
    except DamagedImage as error:
        return str(error)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        # Not a damaged image: another try may succeed, so it must not be left out for good.
        raise UserError(f"{path}: cannot be read ({error.strerror}). Mend it or move it away and run again.") from None
