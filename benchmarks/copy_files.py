"""The least that a conversion must do: read every file, hash it, write it into a large one, wait for the disk.

`python -m benchmarks.copy_files IMAGES FOLDER WORKERS`: a command of its own, so that it starts as a conversion does.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from ast_dist.data.index import replaced_file
from data_prep.pool import advance, run_tasks
from data_prep.sources.imagefolder import list_samples
from data_prep.sources.listing import Reader

_FILE_BYTES = 256_000_000


@dataclass(frozen=True)
class _Copy:
    path: Path
    names: list[str]
    read: Reader


def main(images: str, folder: str, workers: int) -> None:
    """Copy all images into a few files, in that many processes."""
    listing = list_samples(images, "train")
    names, parts = listing.names, max(workers, int(listing.sizes.sum()) // _FILE_BYTES)
    tasks = [_Copy(Path(folder, f"{part}.bin"), names[part::parts], listing.read) for part in range(parts)]
    run_tasks(_copy, tasks, lambda *_: None, workers=workers, total=len(names), label="copy")


def _copy(task: _Copy) -> str:
    digest = hashlib.sha256()
    with replaced_file(task.path) as file:
        for name in task.names:
            data = task.read(name)
            digest.update(data)
            file.write(data)
            advance()
    return digest.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
