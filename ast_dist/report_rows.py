"""The numbers of metrics.jsonl, column by column: a run of millions of rows is a few hundred MB, not a dict a row."""

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ast_dist.track.history import LARGEST

Row = Mapping[str, Any]
_KINDS = {"step": 1, "epoch": 2}


class Rows:
    """Rows that are read once, one after the other, and kept as numbers.

    What is there and is no number (null, text, what is not finite or too large to reckon with) is kept as NaN.

    rows: of metrics.jsonl. epochs: those of kind "epoch", as they came.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.epochs: list[Row] = []
        self._kinds = bytearray()
        self._places: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        for place, row in enumerate(rows):
            kind = row.get("kind")
            self._kinds.append(1 if kind == "step" else 2 if kind == "epoch" else 0)
            if kind == "epoch":
                self.epochs.append(row)
            for key, value in row.items():
                values = self._values.get(key)
                if values is None:
                    values = self._values[key] = array("d")
                    self._places[key] = array("I")
                self._places[key].append(place)
                # `as_number` without a call, of which there would be tens of millions.
                is_number = (type(value) is float or type(value) is int) and -LARGEST < value < LARGEST
                values.append(value if is_number else math.nan)

    def __len__(self) -> int:
        return len(self._kinds)

    def column(self, key: str, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Which rows have a key, counted from 0, (N,) int64, and its values there, (N,) float64.

        kind: step or epoch, "" for all rows.
        """
        places = np.array(self._places.get(key, ()), np.int64)
        values = np.array(self._values.get(key, ()), np.float64)
        if not kind:
            return places, values
        is_kind = np.frombuffer(self._kinds, np.uint8)[places] == _KINDS[kind]
        return places[is_kind], values[is_kind]

    def dense(self, key: str, instead: str = "") -> np.ndarray:
        """A value for each row, (rows,) float64; NaN where a row lacks the key, and `instead`, too."""
        found = self.dense(instead) if instead else np.full(len(self), np.nan)
        places, values = self.column(key)
        found[places] = values
        return found

    def together(self, *keys: str) -> tuple[np.ndarray, ...]:
        """Values of several keys, (N,) float64 each, in the rows in which all of them are numbers."""
        columns = [self.dense(key) for key in keys]
        is_known = np.isfinite(columns).all(axis=0)
        return tuple(column[is_known] for column in columns)

    def numbers(self, key: str) -> np.ndarray:
        """All that is a number under a key, (N,) float64, in the rows' order."""
        _, values = self.column(key)
        return values[np.isfinite(values)]
