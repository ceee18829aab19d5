"""Command-line arguments into a frozen dataclass, with every mistake told in one line."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

from ast_dist.errors import UserError

Parsed = TypeVar("Parsed")


def parse_arguments(kind: type[Parsed], argv: Sequence[str], prog: str) -> Parsed:
    """Let tyro build `kind` from `argv`, and turn its framed error into one line (its suggestions are kept).

    Raises UserError for anything that cannot be parsed. `--help` prints and raises SystemExit(0).
    """
    import tyro  # imported here: commands that only read a run need no parser

    argv = list(argv)
    if {"-h", "--help"} & set(argv):
        tyro.cli(kind, args=argv, prog=prog)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(captured), _wide_terminal():
            return tyro.cli(kind, args=argv, prog=prog)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UserError(_one_line(captured.getvalue()) or "the arguments cannot be parsed") from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(framed: str) -> str:
    """Take tyro's message out of its frame and join it to one line."""
    lines = []
    # The frame's first line is a title that the message repeats.
    for raw in re.sub(r"\x1b\[[0-9;]*m", "", framed).splitlines()[1:]:
        line = raw.strip(" |+│╭╮╰╯")
        is_rule = not line.strip("-─")
        is_pointer_to_help = line.startswith("For full helptext") or line.endswith("--help")
        if not (is_rule or is_pointer_to_help):
            lines.append(line)
        if line.startswith("Argument helptext"):
            lines.pop()
            break
    # "Error parsing gate: gate.p_min is …" names the key twice: our own messages start with it.
    return re.sub(r"^Error parsing \w+: (?=(\w+\.\w+|--\S+) is )", "", " ".join(lines))
