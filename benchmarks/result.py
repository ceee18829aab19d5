"""Result files, benchmarks/results/NAME.json: written after every row, so that a run cut short leaves what it has.

Their content is what `ast_dist.result_file` describes. A row that was not measured says why under "skipped", one
that failed under "error".
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ast_dist.result_file import CHECKOUT as ROOT
from ast_dist.result_file import describe_result, git_commit, machine, rounded, software, write_result

__all__ = ["RESULTS", "ROOT", "ResultFile", "git_commit", "load", "machine", "measured", "software"]

RESULTS = ROOT / "benchmarks" / "results"


class ResultFile:
    """One benchmark's result file.

    path: where it lands; its folder is made. benchmark: NAME. command: what was run, with words such as TRAIN in the
    place of folders. commit: what was measured; None asks git.
    """

    def __init__(self, path: Path, benchmark: str, command: str, commit: str | None = None) -> None:
        self.path = path
        self.content = describe_result(benchmark, command, commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(self.path, self.content)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and replace the file in one step. Floats are kept to four significant digits."""
        self.rows.append({key: rounded(value) for key, value in row.items()})
        write_result(self.path, self.content)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows in the place of those so far, where later rounds change earlier figures."""
        self.content["rows"] = [{key: rounded(value) for key, value in row.items()} for row in rows]
        write_result(self.path, self.content)


def load(path: Path) -> dict[str, Any]:
    """Read a result file. Raises OSError or ValueError when it cannot be read."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def measured(rows: Iterable[Mapping[str, Any]], measure: str) -> list[Mapping[str, Any]]:
    """The rows of one measure that hold figures: neither skipped nor failed."""
    return [row for row in rows if row["measure"] == measure and not {"skipped", "error"} & row.keys()]
