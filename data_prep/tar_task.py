"""One tar to index, as a task that is not done twice: its record is kept until the whole index stands."""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist import __version__
from ast_dist.data.index import replaced_file
from data_prep.pool import advance
from data_prep.shard import FIELDS
from data_prep.tar_scan import TarRecord, scan_tar


@dataclass(frozen=True)
class TarTask:
    """path: the tar. name: what the manifest calls it. record: file for what was found in it."""

    path: Path
    name: str
    record: Path


def index_tar(task: TarTask) -> TarRecord:
    """Scan the tar and keep the record on disk. Raises what `scan_tar` raises."""
    record = scan_tar(task.path, task.name, advance)
    plain = {k: v for k, v in asdict(record).items() if k not in ("fields", "keys")}
    about = json.dumps({"version": __version__, "path": str(task.path), **plain})
    arrays: dict[str, Any] = {**record.fields, "keys": record.keys, "record": np.asarray(about)}
    with replaced_file(task.record) as file:
        np.savez(file, **arrays)
    return record


def load_record(task: TarTask) -> TarRecord | None:
    """What an earlier run found; None where there is none, or where the tar or this package changed since."""
    try:
        with np.load(task.record, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["record"]))
            version, path = about.pop("version"), about.pop("path")
            record = TarRecord(
                **{**about, "damaged": [tuple(pair) for pair in about["damaged"]]},
                fields={name: arrays[name] for name in FIELDS},
                keys=arrays["keys"],
            )
        stat = task.path.stat()
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # the tar is then read again
    same = (version, path, record.name) == (__version__, str(task.path), task.name)
    return record if same and (stat.st_size, stat.st_mtime_ns) == (record.bytes, record.modified_ns) else None
