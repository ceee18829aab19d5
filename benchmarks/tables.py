"""The tables of README, from benchmarks/results: `python -m benchmarks.tables [--check]`.

README holds a pair of marks for each, and what stands between them is replaced:

    <!-- table:gpu-step -->
    …
    <!-- end -->

With --check nothing is written, and the exit code is 1 when a table does not show what the results say.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_dist.arguments import parse_arguments
from ast_dist.data.index import replaced_file
from ast_dist.errors import UserError, run_command
from benchmarks.result import RESULTS, ROOT, load, measured
from benchmarks.table_columns import TABLES, Table

_MARKS = re.compile(r"(<!-- table:(?P<name>\S+) -->\n)(?P<body>.*?)(?=<!-- end -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- table:\S+ -->")


@dataclass(frozen=True)
class Arguments:
    """Write README's tables from the result files."""

    check: bool = False
    """Write nothing; exit with 1 when a table is out of date."""
    readme: Path = ROOT / "README.md"
    """The file that holds the marks."""
    results: Path = RESULTS
    """Folder of the result files."""


def main(argv: list[str]) -> int:
    """Replace the tables, or judge them. Returns the exit code."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.tables")
    try:
        before = arguments.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{arguments.readme}: cannot be read ({error.strerror}).") from None
    marks = list(_MARKS.finditer(before))
    openings = len(_OPENING.findall(before))
    if openings != len(marks) or any(_OPENING.search(mark["body"]) for mark in marks):
        raise UserError(
            f"{arguments.readme}: {openings} marks `<!-- table:NAME -->`, but not each has its own `<!-- end -->`."
        )
    stale = []
    after, position = "", 0
    for mark in marks:
        body = f"\n{_from_results(mark['name'], arguments.readme, arguments.results)}\n\n"
        if body != mark["body"]:
            stale.append(mark["name"])
        after += before[position : mark.start("body")] + body
        position = mark.end("body")
    after += before[position:]
    if arguments.check:
        if stale:
            print(f"{arguments.readme}: out of date: {', '.join(stale)}. Run: python -m benchmarks.tables")
        return 1 if stale else 0
    if stale:
        with replaced_file(arguments.readme) as file:
            file.write(after.encode())
    print(f"{arguments.readme}: {len(marks)} tables, {len(stale)} changed")
    return 0


def render(table: Table, content: Mapping[str, Any]) -> str:
    """A table in Markdown, with a line that says where the figures are from.

    content: a result file. Columns that no row has are left out; a value that a row lacks shows as –.
    """
    rows = measured(content["rows"], table.measure)
    columns = [column for column in table.columns if any(row.get(column.key) is not None for row in rows)]
    cells = [[column.heading for column in columns]]
    for row in rows:
        cells.append(["–" if row.get(column.key) is None else column.show(row[column.key]) for column in columns])
    is_number = [not any(isinstance(row.get(column.key), str | bool) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_row(line, widths, is_number) for line in cells]
    rule = "|".join(
        f" {'-' * (width - 1)}: " if right else f" {'-' * width} " for width, right in _pairs(widths, is_number)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:], "", _source(content, rows)])


def render_all(content: Mapping[str, Any]) -> str:
    """Every table that a result file has rows for, under its name."""
    file = content["benchmark"].removesuffix("-toy")
    shown = [
        f"{name}\n{render(table, content)}\n"
        for name, table in TABLES.items()
        if table.file == file and measured(content["rows"], table.measure)
    ]
    return "\n".join(shown)


def _from_results(name: str, readme: Path, results: Path) -> str:
    table = TABLES.get(name)
    if table is None:
        raise UserError(f"{readme}: no such table: {name}. There are: {', '.join(TABLES)}.")
    path = results / f"{table.file}.json"
    try:
        content = load(path)
        if not measured(content["rows"], table.measure):
            raise UserError(
                f"{path}: holds no rows of {table.measure}, which {readme}'s table {name} shows. Run its benchmark: "
                f"{content['command']}"
            )
        return render(table, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: cannot be read ({error!r}), but {readme} shows it as {name}. Run the benchmark: "
            f"python -m benchmarks.{table.file}"
        ) from None


def _pairs(widths: list[int], is_number: list[bool]) -> list[tuple[int, bool]]:
    return list(zip(widths, is_number, strict=True))


def _row(cells: list[str], widths: list[int], is_number: list[bool]) -> str:
    shown = [
        f" {cell:>{width}} " if right else f" {cell:<{width}} "
        for cell, (width, right) in zip(cells, _pairs(widths, is_number), strict=True)
    ]
    return f"|{'|'.join(shown)}|"


def _source(content: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """Where the figures are from; rows that were kept from an earlier run name their own date, commit and command."""
    machine, versions = content["machine"], content["versions"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    runs = {}
    for about in ({**content, **row} for row in rows):
        commit = f", commit {about['commit']}" if about["commit"] else ""
        runs[f"{about['date'][:10]}{commit}: `{about['command']}`"] = None
    return f"{device}, torch {versions['torch']}, {'; '.join(runs)}"


if __name__ == "__main__":
    sys.exit(run_command(main))
