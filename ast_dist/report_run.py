"""What the report reads of a run: its files, none of them trusted, and what is wrong with them in words."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from ast_dist.config import FREE_BETWEEN_SESSIONS, Config
from ast_dist.errors import UserError
from ast_dist.fault.commit import set_aside
from ast_dist.report_rows import Rows
from ast_dist.track.history import as_number as as_number
from ast_dist.track.history import read, stream
from ast_dist.track.progress import PROGRESS_NAME, as_it_is_now, read_progress

METRICS_NAME, SESSIONS_NAME = "metrics.jsonl", "sessions.jsonl"
Row = Mapping[str, Any]
Held = TypeVar("Held")


@dataclass(frozen=True)
class Run:
    """A run as its files tell it.

    folder: as the user named it. name: told apart from the other runs of the report. rows: of metrics.jsonl, as
    columns. sessions: of sessions.jsonl. progress: of progress.json, as it is now. config: of config.yaml, nested,
    manifest's hashes included. env: of env.json. classes: of classes.json. notes: what could not be read, in sentences.
    """

    folder: Path
    name: str
    rows: Rows = field(default_factory=Rows)
    sessions: Sequence[Row] = ()
    progress: Row = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    env: Row = field(default_factory=dict)
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def epochs(self) -> list[Row]:
        """The rows of epochs that are done."""
        return self.rows.epochs

    @property
    def starts(self) -> list[Row]:
        """One row for each start of the training's processes."""
        return [row for row in self.sessions if "event" not in row]

    @property
    def warnings(self) -> list[str]:
        """The warnings that the run was told of, in their order."""
        return [str(row.get("text", "")) for row in self.sessions if row.get("event") == "warning"]

    @property
    def set_aside(self) -> list[Path]:
        """Checkpoints that were moved aside because they did not verify."""
        return set_aside(self.folder / "checkpoints")

    def setting(self, name: str) -> Any:
        """A setting by its dotted name; None where config.yaml does not hold it."""
        place: Any = self.config
        for part in name.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        return place

    def series(self, key: str, kind: str = "", x_key: str = "progress/epoch") -> tuple[np.ndarray, np.ndarray]:
        """Values of one key over another: x (N,) float64, y (N,) float64, NaN where a row has the key as null.

        kind: step or epoch, "" for both. Rows without either key are left out.
        """
        places, y = self.rows.column(key, kind)
        x = self.rows.dense(x_key, instead="epoch")[places]
        return x[np.isfinite(x)], y[np.isfinite(x)]

    def most_often(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """As `series`, of steps or, where no step tells, of epochs: an epoch's mean is no point among its steps."""
        x, y = self.series(key, "step")
        return (x, y) if x.size else self.series(key, "epoch")

    def gapped(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """As `series`, with NaN also where a row lacks the key: what is not there in some epochs."""
        x, y = self.rows.dense("progress/epoch", instead="epoch"), self.rows.dense(key)
        return x[np.isfinite(x)], y[np.isfinite(x)]

    def skipped_share(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples skipped so far over the passes, as a share of training everything: (N,) float64 each."""
        passes, skipped = self.series("cost/samples_skipped")
        total = as_number(self.progress.get("num_samples"))
        begun = passes > 0
        if total:
            return passes[begun], skipped[begun] / (total * passes[begun])
        epochs, trained = self.series("cost/samples_backwarded", "epoch")
        _, skipped = self.series("cost/samples_skipped", "epoch")
        if trained.size != skipped.size:
            return np.zeros(0), np.zeros(0)
        return epochs, skipped / np.maximum(trained + skipped, 1.0)

    def last(self, key: str) -> float | None:
        """The newest value of a key, None where it was never measured."""
        values = self.rows.numbers(key)
        return float(values[-1]) if values.size else None

    def best(self, key: str) -> float | None:
        """The highest value of a key, None where it was never measured."""
        values = self.rows.numbers(key)
        return float(values.max()) if values.size else None


def open_run(folder: Path, name: str = "") -> Run:
    """Read a run's files.

    Raises UserError when the folder is none, or holds neither progress.json nor metrics.jsonl. Everything else that is
    missing or damaged is a note: what can be read is reported.
    """
    notes: list[str] = []
    try:
        progress = as_it_is_now(folder, read_progress(folder))
    except UserError as error:
        if not (folder / METRICS_NAME).is_file() and not (folder / PROGRESS_NAME).is_file():
            raise
        progress = {}
        notes.append(str(error))
    rows = _read(folder / METRICS_NAME, notes, lambda path: Rows(row for row, _ in stream(path))) or Rows()
    sessions = _read(folder / SESSIONS_NAME, notes, read) or []
    env = _parsed(folder / "env.json", notes, dict)
    classes = _parsed(folder / "classes.json", notes, list)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        rows=rows,
        sessions=sessions,
        progress=progress,
        config=_parsed(folder / "config.yaml", notes, dict),
        env=env,
        classes=[str(name) for name in classes],
        notes=notes,
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def default_settings() -> dict[str, Any]:
    """Every setting's default by its dotted name; those without which nothing trains have an empty one."""
    found: dict[str, Any] = {}
    for item in fields(Config):
        made = item.default_factory() if callable(item.default_factory) else item.default
        found |= flat({item.name: asdict(made) if is_dataclass(made) and not isinstance(made, type) else made})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def is_free(name: str) -> bool:
    """Whether a setting says where and how safely a run trains, not what."""
    return name in FREE_BETWEEN_SESSIONS or name.split(".")[0] in FREE_BETWEEN_SESSIONS


def _read(path: Path, notes: list[str], read_rows: Callable[[Path], Held]) -> Held | None:
    """What `read_rows` finds in a file of rows; None where it cannot be read."""
    found = None
    with warnings.catch_warnings(record=True) as damage:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            found = read_rows(path)
        except OSError as error:
            notes.append(f"{path}: cannot be read ({error.strerror}).")
    notes += [str(warning.message) for warning in damage]
    if not path.is_file():
        notes.append(f"{path}: missing.")
    return found


def _parsed(path: Path, notes: list[str], kind: type) -> Any:
    """What a JSON or YAML file holds, an empty one of `kind` where it holds nothing of the kind."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        notes.append(f"{path}: missing.")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path}: cannot be read ({' '.join(str(error).split())}).")
    else:
        if isinstance(found, kind):
            return found
        notes.append(f"{path}: holds a {type(found).__name__}, no {kind.__name__}.")
    return kind()
