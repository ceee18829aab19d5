"""Rows on disk: metrics.jsonl, the truth that every view reads, and sessions.jsonl.

One strict JSON object a line, only ever appended to. A row is handed to the operating system in a single write, so
a killed process leaves whole rows and at most one torn line, the last; reading passes over it and opening for
writing cuts it off. The length in bytes goes into every checkpoint: after a restore, rows past it are cut, so that
a resumed run has each row once.
"""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ast_dist.errors import UserError

LARGEST = 1e200
_CHUNK_BYTES = 1 << 20


class History:
    """Append rows to a JSONL file.

    path: the file; made if absent. A torn last line, left by a kill or a full disk, is cut off when the next row comes.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._survey()

    def _survey(self) -> None:
        """Count the rows, and find where the last whole one ends."""
        self._length = self._num_rows = num_bytes = 0
        while chunk := os.pread(self._descriptor, _CHUNK_BYTES, num_bytes):
            self._num_rows += chunk.count(b"\n")
            if b"\n" in chunk:
                self._length = num_bytes + chunk.rindex(b"\n") + 1
            num_bytes += len(chunk)
        self._has_torn_line = self._length < num_bytes

    @property
    def length(self) -> int:
        """Bytes written so far: the number that belongs into a checkpoint."""
        return self._length

    @property
    def num_rows(self) -> int:
        """Rows in the file; the next row has this number, counted from 0."""
        return self._num_rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and hand it to the operating system at once.

        NaN and infinities become null, with their key kept: measured, but not a number. A key that is absent means
        not measured. Raises TypeError for a value that JSON cannot hold, OSError when the disk refuses; the file
        then ends at the row before.
        """
        line = encode(row)
        self._cut_torn_line()
        written = 0
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                os.write(self._descriptor, line[written:])  # a full disk took a part: this raises, and says why
        except OSError:
            os.ftruncate(self._descriptor, self._length)
            raise
        self._length += len(line)
        self._num_rows += 1

    def truncate(self, length: int) -> None:
        """Cut the rows past `length` bytes, the number that a restored checkpoint holds.

        Raises UserError when the file is shorter, or when a row does not end there: the file is then not the one
        that the checkpoint belongs to.
        """
        if self._length < length:
            raise UserError(
                f"{self.path}: {self._length:,} bytes, but the checkpoint was saved at {length:,}. "
                f"Restore the {self.path.name} of the run that the checkpoint comes from."
            )
        if length and os.pread(self._descriptor, 1, length - 1) != b"\n":
            raise UserError(
                f"{self.path}: no row ends at byte {length:,}, where the checkpoint was saved (the file has "
                f"{self._length:,}). Restore the {self.path.name} of the run that the checkpoint comes from."
            )
        os.ftruncate(self._descriptor, length)
        self._survey()

    def set_aside(self) -> Path:
        """Keep the file under another name, for a person to look at, and go on with an empty one."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        os.rename(self.path, aside)
        os.close(self._descriptor)
        self._open()
        return aside

    def _cut_torn_line(self) -> None:
        if self._has_torn_line:
            os.ftruncate(self._descriptor, self._length)
            self._has_torn_line = False

    def sync(self) -> int:
        """Flush to the disk itself and return the length, so that a checkpoint never states more than was kept."""
        os.fsync(self._descriptor)
        return self._length

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read(path: Path | str) -> list[dict[str, Any]]:
    """Read all whole rows; an absent file has none.

    A last line without its end is a write under way, or one cut short by a kill: passed over. Damage before that is
    not silent: the rows that can be read come back, under one RuntimeWarning that names the lines left out.
    """
    return [row for row, _ in stream(path)]


def stream(path: Path | str) -> Iterator[tuple[dict[str, Any], int]]:
    """As `read`, one row after the other, each with the byte behind its end: the file may be larger than the memory."""
    path = Path(path)
    end, num_rows, damaged = 0, 0, []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            end += len(line)
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the latter of what is nested too deeply
                row = None
            if isinstance(row, dict):
                num_rows += 1
                yield row, end
            else:
                damaged.append(number)
    if damaged:
        named = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        message = f"{path}: {len(damaged)} of {num_rows + len(damaged)} rows cannot be read (line {named}); left out."
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def as_number(value: Any) -> float | None:
    """A number, or None for anything else: rows may hold null, and what others have written into them.

    None as well for what is not finite, or so large that arithmetic with it would not be.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and -LARGEST < value < LARGEST else None


def encode(row: Mapping[str, Any]) -> bytes:
    """One row as one line of strict JSON, its end included. Raises TypeError naming the key it cannot hold."""
    values = {key: plain(value, key) for key, value in row.items()}
    return json.dumps(values, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def plain(value: Any, key: str = "") -> Any:
    """A value as JSON holds it: scalars of numpy and torch as numbers, NaN and infinities as None."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(inner): plain(item, f"{key}.{inner}") for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, key) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{key}: a row cannot hold a {type(value).__name__}.")
