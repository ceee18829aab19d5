"""Commit a folder of files in one instant, and tell a committed one from a damaged one. No torch in here.

A checkpoint is written into `stage-…`, then:

    1. every file is fsynced and hashed, the hashes go into manifest.json, which is fsynced, as is the folder
    2. the folder is renamed to its final name, and the parent folder is fsynced

A crash before the rename leaves only a stage folder, which nobody loads and the next save removes. A crash after it
leaves a complete checkpoint. What the disk or a person damages later is found by the hashes.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
_STAGE_PREFIX = "stage-"
_CORRUPT_PREFIX = ".corrupt-"
_PRUNED_PREFIX = ".pruned-"


class DamagedCheckpointError(RuntimeError):
    """A committed folder is not what its manifest says."""


def stage_path(folder: Path, name: str) -> Path:
    """Where the checkpoint `name` is written before it is committed."""
    return folder / f"{_STAGE_PREFIX}{name}"


def new_stage(folder: Path, name: str) -> Path:
    """Remove what crashed saves left behind and make an empty stage folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in (_STAGE_PREFIX, _PRUNED_PREFIX):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover)
    stage = stage_path(folder, name)
    stage.mkdir()
    return stage


def commit(stage: Path, final: Path, about: dict[str, Any]) -> None:
    """Make the stage folder the checkpoint `final`. about: JSON values to keep in the manifest.

    Raises OSError when the disk fails or is full; the previous checkpoints stand.
    """
    files = {path.name: _fsync_and_hash(path) for path in sorted(stage.iterdir())}
    manifest = stage / MANIFEST_NAME
    manifest.write_text(json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8")
    _fsync(manifest)
    _fsync(stage)
    # Rename last: a crash above this line leaves the previous checkpoint current.
    os.rename(stage, final)
    _fsync(final.parent)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file of a committed checkpoint against its manifest; return the manifest.

    Raises DamagedCheckpointError naming the first file that is missing, of another size or of another SHA-256.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({error!r})") from None
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpointError(f"{file}: {size:,} bytes, but {expected['bytes']:,} were committed")
        digest = _hash(file)
        if digest != expected["sha256"]:
            raise DamagedCheckpointError(
                f"{file}: SHA-256 {digest[:12]}…, not the committed {expected['sha256'][:12]}…"
            )
    return manifest


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, the newest last. Names sort by step."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def best(folder: Path, passed_over: Collection[str] = ()) -> str | None:
    """Name of the committed checkpoint with the highest accuracy in its manifest, the newest of equals.

    It counts as what its better weights reached: `val_acc1`, or `val_ema_acc1` of their average. passed_over: names
    that do not count.
    A manifest that cannot be read is passed over: whether a checkpoint is sound is asked when it is loaded.
    """
    scores = {}
    for checkpoint in committed(folder):
        if checkpoint.name in passed_over:
            continue
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
            known = [score for key in ("val_acc1", "val_ema_acc1") if (score := manifest.get(key)) is not None]
            if known:
                scores[checkpoint.name] = max(known)
    return max(scores, key=lambda name: (scores[name], name), default=None)


def quarantine(checkpoint: Path) -> Path:
    """Move a damaged checkpoint aside, so that nothing tries it again and a person may still look at it."""
    number = 0
    while (target := checkpoint.with_name(f"{_CORRUPT_PREFIX}{checkpoint.name}-{number}")).exists():
        number += 1
    os.rename(checkpoint, target)
    _fsync(checkpoint.parent)
    return target


def prune(folder: Path, keep_last: int, keep: set[str]) -> None:
    """Remove old checkpoints, but not the newest `keep_last` and those named in `keep`. Call it after a commit."""
    for checkpoint in committed(folder)[:-keep_last]:
        if checkpoint.name not in keep:
            # Renamed first: a crash in the middle must not leave half a checkpoint under a checkpoint's name.
            doomed = checkpoint.with_name(f"{_PRUNED_PREFIX}{checkpoint.name}")
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_and_hash(path: Path) -> dict[str, Any]:
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}
