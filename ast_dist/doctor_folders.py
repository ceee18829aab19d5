"""The doctor's look at folders: data sets that are to be trained on, and the disk below a run directory."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ast_dist.errors import UserError

MIN_DISK_GB = 2.0  # three checkpoints of a ResNet-50 with its optimizer and the one being written
_DEFAULT_KEEP_LAST = 3
# Besides the newest ones: the best, and the one that is being written before an older one goes.
_CHECKPOINTS_BESIDE = 2


@dataclass(frozen=True)
class Check:
    """One finding. status: "warn" runs, perhaps not as wanted; "FAIL" does not run. remedy: what to do, or ""."""

    name: str
    status: Literal["ok", "warn", "FAIL"]
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.name:13}  {self.detail}" + (f" → {self.remedy}" if self.remedy else "")


def check_disk(folder: Path) -> Check:
    """Free space where the command was typed: the run directory usually lies there."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    detail = f"{free_gb:.1f} GB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "warn", f"{folder} is not writable", "name a writable --run-dir")
    if free_gb < MIN_DISK_GB:
        return Check("disk", "warn", f"{detail}, below {MIN_DISK_GB:g} GB", "make room, or put --run-dir elsewhere")
    return Check("disk", "ok", detail)


def check_run_dir(run_dir: Path) -> Check:
    """Free space where a run's checkpoints go, against what they need.

    run_dir: as --run-dir names it; it need not be there yet. A run that has saved needs room for its newest checkpoint
    keep_last + 2 times (the best, and the one being written), less what already stands there; those that
    checkpoint.keep_every_h keeps come on top. Before the first save the need is unknown.
    """
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not folder.is_dir():
        return Check("run dir", "FAIL", f"{folder} is a file", "name a folder as --run-dir")
    if not os.access(folder, os.W_OK):
        return Check("run dir", "FAIL", f"{folder} is not writable", "name a writable --run-dir")
    free_bytes = shutil.disk_usage(folder).free
    there = f"{free_bytes / 1e9:,.1f} GB free in {folder}"
    sizes = _checkpoint_sizes(run_dir)
    if not sizes:
        if free_bytes / 1e9 < MIN_DISK_GB:
            remedy = "make room, or put --run-dir elsewhere"
            return Check("run dir", "warn", f"{there}, below {MIN_DISK_GB:g} GB; nothing saved there yet", remedy)
        return Check("run dir", "ok", f"{there}; nothing saved there yet")
    keep_last = _keep_last(run_dir)
    needed = max(0, (keep_last + _CHECKPOINTS_BESIDE - len(sizes)) * sizes[-1])
    # However many stand there, one more is written before an older one goes.
    needed = max(needed, sizes[-1])
    detail = (
        f"{there}; {len(sizes)} checkpoints, the newest {sizes[-1] / 1e6:,.1f} MB, need {needed / 1e6:,.1f} MB more"
    )
    if free_bytes < sizes[-1]:
        return Check("run dir", "FAIL", detail, "make room: the next save does not fit")
    if free_bytes < needed:
        return Check("run dir", "warn", detail, f"make room, or lower --checkpoint.keep-last {keep_last}")
    return Check("run dir", "ok", detail)


def _checkpoint_sizes(run_dir: Path) -> list[int]:
    """Bytes of each committed checkpoint, the newest last."""
    from ast_dist.fault.commit import committed

    folders = committed(run_dir / "checkpoints")
    return [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders]


def _keep_last(run_dir: Path) -> int:
    import yaml

    try:
        settings: Any = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return int(settings["checkpoint"]["keep_last"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return _DEFAULT_KEEP_LAST


def splits_at(location: str) -> list[str]:
    """The splits that a location stands for: itself, or those in the folders below, where it has no manifest."""
    from ast_dist.data.index import MANIFEST_NAME

    folder = Path(location)
    if "://" in location or (folder / MANIFEST_NAME).exists():
        return [location]
    return [str(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST_NAME}"))] or [location]


def probe_data(location: str) -> Iterator[Check]:
    """Open the splits there, as training does, and decode the first sample of each.

    location: folder or URL of a split, or a folder of splits. What the index states is compared with the manifest and
    with the sizes of the shards; `data_prep.check_shards` reads all of it.
    """
    for split in splits_at(location):
        try:
            yield _check_split(split)
        except UserError as error:
            yield Check("data", "FAIL", str(error))


def _check_split(location: str) -> Check:
    from ast_dist.data.decode_torch import decode
    from ast_dist.data.read import DamagedSampleError
    from ast_dist.data.remote import open_index, open_reader
    from ast_dist.data_config import DataConfig

    config = DataConfig()
    index = open_index(location, config)
    if not index.num_samples:
        return Check("data", "FAIL", f"{location} holds no samples", "run data_prep.make_shards again")
    lowest, highest = int(index.label.min()), int(index.label.max())
    if lowest < 0 or highest >= index.num_classes:
        detail = f"{location}: labels go from {lowest} to {highest}, but the manifest names {index.num_classes} classes"
        return Check("data", "FAIL", detail, "run data_prep.make_shards again")
    reader = open_reader(index, config)
    try:
        image = decode(reader.read(0), 0, index.key(0))
    except (DamagedSampleError, OSError) as error:
        return Check("data", "FAIL", f"{location}: {error}", f"look at all of it: data_prep.check_shards {location}")
    finally:
        reader.close()
    size = f"{index.num_samples:,} samples of {index.num_classes} classes"
    of = f"{len(index.manifest['shards']):,} shards" if index.layout == "shards" else "loose files"
    _, height, width = image.shape
    return Check("data", "ok", f"{location}: {size} in {of}, the first decodes ({height} × {width})")
