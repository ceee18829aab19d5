"""The images in every loader's format, made once and outside all timed parts."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

from ast_dist.data.index import MANIFEST_NAME, Index
from ast_dist.errors import UserError
from data_prep import make_shards

# Small shards, as chunks are in the other formats: a loader that splits shards between its workers needs many.
_SHARD_MB = 16


def copy_images(images: Path, folder: Path, at_least: int) -> tuple[Path, int]:
    """Copy images until there are `at_least` so many, so that no epoch ends within a timed part.

    images: one folder per class, or its parent with a folder train. Copies are real ones: links would leave the
    bytes in the processor's cache, which no training set fits. Returns folder/images and the number of files in it.
    Raises UserError when there are no images, or when `folder` holds copies of others, or another number of them.
    """
    root = images / "train" if (images / "train").is_dir() else images
    files = sorted(path for path in root.glob("*/*") if path.is_file()) if root.is_dir() else []
    if not files:
        raise UserError(f"{images}: no images there. It must hold one folder of images per class.")
    copies = max(1, -(-at_least // len(files)))

    def make(target: Path) -> None:
        for path in files:
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                shutil.copyfile(path, target / path.parent.name / f"{copy:03d}-{path.name}")

    said = f"{copies} × {len(files)} files of {root.resolve()}"
    note = folder / "images.txt"
    if note.is_file() and (held := note.read_text(encoding="utf-8")) != said:
        raise UserError(f"{folder}: holds copies already ({held}), but {said} are asked for. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(said, encoding="utf-8")
    return once(folder / "images", make), copies * len(files)


def shard_set(images: Path, folder: Path, resize_short: int | None = None) -> Index:
    """Our shards of the images, which webdataset and DALI read too. Returns their index."""
    if not (folder / "train" / MANIFEST_NAME).is_file():
        resized = ["--resize-short", str(resize_short)] if resize_short else []
        with contextlib.redirect_stdout(io.StringIO()):
            options = ["--split", "train", "--shard-mb", str(_SHARD_MB), "--no-decode-check", *resized]
            make_shards.main([str(images), str(folder), *options])
    return Index.open(folder / "train")


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder, or take the one that an earlier run has made whole."""
    if not target.is_dir():
        unfinished = target.with_name(f"{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(target)
    return target
