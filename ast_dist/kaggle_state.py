"""The state that a Kaggle session goes on from: which checkpoint, whether there is room, and how it gets here.

A notebook that is started again finds what it saved before in an attached input, which is read-only: the run is copied
to /kaggle/working, to a temporary name first, and renamed last. Needs no torch.
"""

import contextlib
import math
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ast_dist.config import Config, differences
from ast_dist.errors import UserError
from ast_dist.fault import commit
from ast_dist.fault.commit import DamagedCheckpointError
from ast_dist.fault.lease import LEASE_NAME
from ast_dist.kaggle_inputs import copy_folder
from ast_dist.run_dir import CONFIG_NAME, archive, checkpoints_path, identity
from ast_dist.track.history import read as read_rows

_COPYING = ".copying-"
GB = 1e9
# Metrics, pictures, W&B's files and an index of ImageNet's folders.
_REST_GB = 0.5
_NAMED_DIFFERENCES = 4
# Of a session on a GPU, should nobody have set a shorter one.
LONGEST_H = 12.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read whole and agrees with its manifest.

    run: its run directory. num_bytes: of its files. total_s: of training until then, None where unknown.
    """

    run: Path
    checkpoint: Path
    num_bytes: int
    total_s: float | None

    @property
    def sessions(self) -> int:
        """Sessions that the run has had."""
        starts = [row.get("session") for row in read_rows(self.run / "sessions.jsonl") if "event" not in row]
        return max((number for number in starts if isinstance(number, int)), default=0)


def differing(run: Path, wanted: dict[str, Any]) -> list[str]:
    """The settings in which a run differs from the one wanted. wanted: as `run_dir.fingerprint` gives it."""
    path = run / CONFIG_NAME
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"{path} cannot be read ({' '.join(str(error).split())})"]
    if not isinstance(old, dict):
        return [f"{path} holds no configuration"]
    data, old_data = wanted["data"], old.get("data")
    if data["shuffle_block_shards"] < 0 and isinstance(old_data, dict):
        # "Automatic" is settled by who trains; the run has written down as what.
        settled = old_data.get("shuffle_block_shards", -1)
        wanted = {**wanted, "data": {**data, "shuffle_block_shards": settled}}
    return differences(old, wanted)


def newest(
    runs: Sequence[Path],
    wanted: dict[str, Any],
    own: Path,
    tell: Callable[[str], None],
    is_named: bool = False,
) -> Saved | None:
    """The newest sound checkpoint of the runs with the wanted configuration; None where there is no such run.

    runs: run directories. own: where this run lives, found or not; of equals it comes first, and another run than the
    one that has saved there does not take its place. is_named: whether its name was asked for, so that runs of other
    names are none of it. What is passed over is told. Raises UserError where the run that stands in `own`, or, when no
    other one fits, an attached run of the same name has another configuration, and where all checkpoints are damaged.
    """
    fitting, others = [], {}
    for run in runs:
        if is_named and run.name != own.name:
            tell(f"passed over {run}: its name is not {own.name}")
            continue
        if changed := differing(run, wanted):
            others[run] = changed
        else:
            fitting.append(run)
    for run, changed in others.items():
        if run == own or (run.name == own.name and not fitting):
            raise UserError(_other(run, changed))
        tell(f"passed over {run}: a run with another configuration ({_named(changed)})")
    fitting = _of_one_run(fitting, own, tell)
    candidates = [(run, path) for run in fitting for path in commit.committed(checkpoints_path(run))]
    candidates.sort(key=lambda pair: (_place(pair[1]), pair[0] == own), reverse=True)
    damaged: list[str] = []
    for run, checkpoint in candidates:
        try:
            manifest = commit.verify(checkpoint)
        except (DamagedCheckpointError, OSError) as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            tell(f"warning: {text}; taking {checkpoint}, the one before")
        total_s = manifest.get("total_s")
        num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
        return Saved(run, checkpoint, num_bytes, float(total_s) if isinstance(total_s, int | float) else None)
    if damaged:
        raise UserError(
            f"{candidates[0][0]}: none of the {len(damaged)} checkpoints here is sound. The newest: {damaged[0]}. "
            "Attach a sound copy, or start anew with resume='never'."
        )
    return None


def _of_one_run(fitting: Sequence[Path], own: Path, tell: Callable[[str], None]) -> list[Path]:
    """The runs without those that are another run than the one in `own`, whose steps do not compare with its steps."""
    there = identity(own) if own in fitting else None
    kept = []
    for run in fitting:
        if there and identity(run) not in (there, None):
            tell(
                f"passed over {run}: another run of this configuration than the one in {own}, which goes on. To go on "
                "with the other one, move that folder out of working"
            )
        else:
            kept.append(run)
    return kept


def _place(checkpoint: Path) -> tuple[int, str]:
    digits = checkpoint.name.removeprefix("step-").split("-")[0]
    return int(digits), checkpoint.name


def _named(changed: Sequence[str]) -> str:
    more = f"; and {len(changed) - _NAMED_DIFFERENCES} more" if len(changed) > _NAMED_DIFFERENCES else ""
    return "; ".join(changed[:_NAMED_DIFFERENCES]) + more


def _other(run: Path, changed: Sequence[str]) -> str:
    return (
        f"{run}: this run was made with another configuration ({_named(changed)}). Use the old values to go on with "
        "it, another run_name for a new run, or resume='never' to start anew."
    )


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed, and what goes meanwhile is nothing."""
    total = 0
    for place in (path, *(Path(parent, name) for parent, _, names in os.walk(path) for name in names)):
        with contextlib.suppress(FileNotFoundError):
            about = place.lstat()
            total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total


def too_full(working: Path, limit_gb: float) -> str | None:
    """What to tell where a folder holds more than Kaggle keeps; None where it does not."""
    held = bytes_of(working)
    if held <= limit_gb * GB:
        return None
    return f"{held / GB:.2f} GB are in {working}, but Kaggle keeps {limit_gb:g} GB. {_largest(working)}"


def make_room(
    working: Path, run_dir: Path, config: Config, checkpoint_bytes: int, limit_gb: float, goes_on: bool
) -> str:
    """Say in words that /kaggle/working holds what is there and what the run will need. Raises UserError otherwise.

    run_dir: nobody trains there now. checkpoint_bytes: of one checkpoint. limit_gb: what Kaggle keeps. goes_on: whether
    the run that stands in run_dir goes on there, so that its checkpoints make room for new ones. What a kill in
    mid-copy or in mid-save left is removed; nothing else is.
    """
    checkpoints = checkpoints_path(run_dir)
    shutil.rmtree(run_dir.with_name(f"{_COPYING}{run_dir.name}"), ignore_errors=True)
    if checkpoints.is_dir():
        commit.remove_leftovers(checkpoints)
    held = bytes_of(working)
    # The newest ones, the best, and the one that is being written before an older one goes.
    saving = config.checkpoint
    count = saving.keep_last + 2
    if saving.keep_every_h:
        count += math.ceil((config.session.hours or LONGEST_H) / saving.keep_every_h)
    replaced = bytes_of(checkpoints) if goes_on and checkpoints.is_dir() else 0
    more = max(0.0, count * checkpoint_bytes + _REST_GB * GB - replaced)
    free = shutil.disk_usage(working).free
    room = f"{held / GB:.2f} GB are in {working}, and the run needs up to {more / GB:.2f} GB more"
    if held + more > limit_gb * GB or more > free:
        limit = f"Kaggle keeps {limit_gb:g} GB" if held + more > limit_gb * GB else f"{free / GB:.2f} GB are free"
        raise UserError(
            f"{room}, but {limit}. {_largest(working)}, or lower checkpoint.keep_last ({saving.keep_last})."
        )
    return f"{room}, of {limit_gb:g} GB"


def _largest(working: Path) -> str:
    sizes = {path: bytes_of(path) for path in working.iterdir()}
    if not sizes:
        return "Use a smaller model"
    path = max(sizes, key=lambda path: sizes[path])
    return f"Delete what is not needed (the largest is {path}, {sizes[path] / GB:.2f} GB)"


def carry_over(saved: Saved, run_dir: Path) -> Path | None:
    """Make a copy of a run the one in `run_dir`: its files, the sound checkpoint and the best one.

    What stood in run_dir is moved aside; returns where to, None where nothing stood there. Nobody may train there now.
    Raises UserError when the copy is not what was saved, or cannot be written; nothing has changed then.
    """
    draft = run_dir.with_name(f"{_COPYING}{run_dir.name}")
    shutil.rmtree(draft, ignore_errors=True)
    folder = checkpoints_path(saved.run)
    wanted = [saved.checkpoint.name]
    best = commit.best(folder)
    if best and best != saved.checkpoint.name and _is_sound(folder / best):
        wanted.append(best)
    try:
        draft.mkdir(parents=True)
        for path in sorted(saved.run.iterdir()):
            if path.is_file() and path.name != LEASE_NAME and not path.name.startswith("."):
                shutil.copyfile(path, draft / path.name)
        # W&B's own logs tell a session without a network which rows are in them already.
        for log in sorted(saved.run.glob("wandb/*run-*/*.wandb*")):
            copy = draft / log.relative_to(saved.run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, copy)
        for name in wanted:
            copy_folder(folder / name, checkpoints_path(draft) / name)
            commit.verify(checkpoints_path(draft) / name)
        aside = archive(run_dir) if run_dir.is_dir() and any(run_dir.iterdir()) else None
        # Rename last: a kill above this line leaves the input as it is, and the next start copies it again.
        os.rename(draft, run_dir)
    except (OSError, DamagedCheckpointError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(f"{saved.run}: cannot be copied to {run_dir} ({error}). Run the cell again.") from None
    return aside


def _is_sound(checkpoint: Path) -> bool:
    try:
        commit.verify(checkpoint)
    except (DamagedCheckpointError, OSError):
        return False
    return True
