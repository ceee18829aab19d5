"""The folder a split is written to: refused where it holds something else, held alone while it is written."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from ast_dist.data.index import MANIFEST_NAME, read_manifest
from ast_dist.errors import UserError
from data_prep.pool import counted

# The state of a run that did not finish lies in a folder of its own, under one name where shards are written and under
# another where only an index is: a conversion clears away shards that it has no record of, and must never take tars
# that were merely indexed for its own.
UNFINISHED = ".unfinished"
INDEXING = ".indexing"


def refuse_finished(folder: Path) -> None:
    """Raise UserError when there is a finished set in the folder."""
    if not (folder / MANIFEST_NAME).is_file():
        return
    try:
        manifest, _ = read_manifest(folder)
    except UserError:
        raise UserError(
            f"{folder}: holds a set already, though its {MANIFEST_NAME} cannot be read. Choose another DST, or delete "
            "that folder to make it anew."
        ) from None
    shards = manifest["shards"]
    where = f" in {counted(len(shards), 'shard')}" if shards else ""
    # Where tars lie beside their index, the folder holds the only copy of the data.
    doomed = f"its {MANIFEST_NAME}" if manifest.get("source") == "wds" else "that folder"
    raise UserError(
        f"{folder}: holds a finished set already ({manifest['num_samples']:,} samples{where}). Choose another DST, or "
        f"delete {doomed} to make it anew."
    )


def refuse_foreign(folder: Path, state: str) -> None:
    """Raise UserError when the folder holds files, unless a run whose state lies under `state` left them."""
    if not folder.exists() or (folder / state).is_dir():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: a file, but the shards need a folder there. Choose another DST.")
    held = sorted(path.name for path in folder.iterdir())
    if INDEXING in held or UNFINISHED in held:
        raise UserError(
            f"{folder}: holds what another command began and did not finish. Run that command again, choose another "
            "DST, or empty that folder."
        )
    if held:
        raise UserError(
            f"{folder}: holds {len(held):,} files that make_shards did not write ({held[0]}, …). Choose another DST, "
            "or empty that folder."
        )


@contextlib.contextmanager
def held_alone(folder: Path, state: str) -> Iterator[list[Path]]:
    """Make the split's folder and hold it alone. Yields the folders that were made, innermost first."""
    created = [path for path in [folder, *folder.parents] if not path.exists()]
    unfinished = folder / state
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock = (unfinished / "lock").open("wb")
    except OSError as error:
        remove_empty(created)
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another DST.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another make_shards is writing there. Wait for it, or choose another DST."
            ) from None
        except OSError:
            pass  # a file system without locks: then nobody but the person can see to it that one run writes
        try:
            refuse_finished(folder)  # the run that held the lock before may have just finished
        except UserError:
            shutil.rmtree(unfinished, ignore_errors=True)  # another run that waited may be removing it, too
            raise
        yield created


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty."""
    for path in folders:
        with contextlib.suppress(OSError):  # not there, or somebody else put something in it meanwhile
            path.rmdir()
