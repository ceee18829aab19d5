"""Commit a folder of files in one instant, and tell a committed one from a damaged one. No torch in here.

A checkpoint is written into `stage-…`, then:

    1. every file is fsynced and hashed, the hashes go into manifest.json, which is fsynced, as is the folder
    2. the folder is renamed to its final name, and the parent folder is fsynced

A crash before the rename leaves only a stage folder, which nobody loads and the next save removes. A crash after it
leaves a complete checkpoint. What the disk or a person damages later is found by the hashes; the manifest holds one of
itself.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from ast_dist.fault import retention
from ast_dist.fault.retention import Saved

MANIFEST_NAME = "manifest.json"
_OWN_HASH = "sha256_of_the_above"
_STAGE_PREFIX = "stage-"
_CORRUPT_PREFIX = ".corrupt-"
_PRUNED_PREFIX = ".pruned-"
# A person's copy beside them (step-….bak) is not taken for a checkpoint.
_NAME = re.compile(r"step-\d+(-evaluated)?")


class DamagedCheckpointError(RuntimeError):
    """A committed folder is not what its manifest says."""


class UnflushedError(OSError):
    """A checkpoint is committed, but a power cut might still undo its name."""


def stage_path(folder: Path, name: str) -> Path:
    """Where the checkpoint `name` is written before it is committed."""
    return folder / f"{_STAGE_PREFIX}{name}"


def new_stage(folder: Path, name: str) -> Path:
    """Remove what crashed saves left behind and make an empty stage folder."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _fsync(folder.parent)
    remove_leftovers(folder)
    stage = stage_path(folder, name)
    stage.mkdir()
    return stage


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and prunings that did not come to their end left behind: it holds the room of the next."""
    for prefix in (_STAGE_PREFIX, _PRUNED_PREFIX):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover)


def commit(stage: Path, final: Path, about: dict[str, Any], fence: Callable[[], None] = lambda: None) -> None:
    """Make the stage folder the checkpoint `final`. about: JSON values to keep in the manifest.

    fence: raises where this process may no longer write here; asked last of all. Raises OSError when the disk fails or
    is full; the previous checkpoints stand. Raises UnflushedError when it failed after the commit.
    """
    files = {path.name: _fsync_and_hash(path) for path in sorted(stage.iterdir())}
    manifest = stage / MANIFEST_NAME
    manifest.write_bytes(manifest_bytes({**about, "files": files}))
    _fsync(manifest)
    _fsync(stage)
    fence()
    # Rename last: a crash above this line leaves the previous checkpoint current.
    os.rename(stage, final)
    try:
        _fsync(final.parent)
    except OSError as error:
        raise UnflushedError(*error.args) from error


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """What a manifest of this content looks like: with a hash of itself last."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, _OWN_HASH: digest}, indent=1).encode() + b"\n"


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file of a committed checkpoint against its manifest; return the manifest.

    Raises DamagedCheckpointError naming the first file that is missing, of another size or of another SHA-256, and
    OSError where the disk does not answer, which says nothing of what lies there.
    """
    manifest = read_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        if file.is_symlink() or not file.is_file():
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


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, once it agrees with its own hash to the byte.

    Raises DamagedCheckpointError, and OSError where the disk does not answer.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({error!r})") from None
    try:
        content = {key: value for key, value in json.loads(raw).items() if key != _OWN_HASH}
        is_own = raw == manifest_bytes(content)
        names, entries = list(content["files"]), list(content["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({error!r})") from None
    if not is_own:
        raise DamagedCheckpointError(f"{path}: is not what was committed")
    if any(Path(name).name != name for name in names):
        raise DamagedCheckpointError(f"{path}: names files outside of its folder")
    if not all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in entries
    ):
        raise DamagedCheckpointError(f"{path}: lacks sizes or hashes")
    return content


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, the newest last: by step, whatever the number of its digits, then by name."""

    def place(checkpoint: Path) -> tuple[int, str]:
        digits = checkpoint.name.removeprefix("step-").split("-")[0]
        return len(digits), checkpoint.name

    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=place)


def saved(folder: Path) -> list[Saved]:
    """What the manifests of the committed checkpoints say, the newest last.

    One that cannot be read is left out, and so never removed: it may be the best, and its tensors may be sound.
    """
    found = []
    for checkpoint in committed(folder):
        try:
            about = read_manifest(checkpoint)
        except (DamagedCheckpointError, OSError):
            continue
        known = [score for key in ("val_acc1", "val_ema_acc1") if (score := _number(about.get(key))) is not None]
        found.append(Saved(checkpoint.name, max(known, default=None), _number(about.get("total_s"))))
    return found


def best(folder: Path, passed_over: Collection[str] = ()) -> str | None:
    """Name of the committed checkpoint of the highest accuracy, the newest of equals; None where none was evaluated.

    passed_over: names that do not count.
    """
    found = retention.best([item for item in saved(folder) if item.name not in passed_over])
    return found.name if found else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def set_aside(folder: Path) -> list[Path]:
    """Damaged checkpoints that were moved aside."""
    return sorted(folder.glob(f"{_CORRUPT_PREFIX}*"))


def quarantine(checkpoint: Path) -> Path:
    """Move a damaged checkpoint aside, so that nothing tries it again and a person may still look at it."""
    number = 0
    while (target := checkpoint.with_name(f"{_CORRUPT_PREFIX}{checkpoint.name}-{number}")).exists():
        number += 1
    os.rename(checkpoint, target)
    _fsync(checkpoint.parent)
    return target


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove checkpoints. Call it after a commit, with what nobody would miss."""
    for name in names:
        # Renamed first: a crash in the middle must not leave half a checkpoint under a checkpoint's name.
        doomed = folder / f"{_PRUNED_PREFIX}{name}"
        os.rename(folder / name, doomed)
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
