"""One HTML file on one run or several: plots, faults survived, settings, the samples that matter. Needs no network.

Usage: `python -m ast_dist.report RUN [RUN …] [--out FILE.html] [--data.train DIR]`

It goes to RUN/report.html of the first run unless --out names another file. A run that still trains is not disturbed:
its files are only read. Opening the file loads nothing from anywhere and runs no script.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ast_dist import __version__
from ast_dist.errors import UserError, run_command
from ast_dist.report_comparison import comparison
from ast_dist.report_gallery import samples
from ast_dist.report_page import links, page, paragraph, section
from ast_dist.report_run import Run, open_run
from ast_dist.report_samples import Memory
from ast_dist.report_sections import configuration, curves, faults, status
from ast_dist.track.progress import replace_atomically

PROG = "python -m ast_dist.report"
REPORT_NAME = "report.html"
SUFFIXES = (".html", ".htm")


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError, in one line, for what the user can mend."""
    parser = argparse.ArgumentParser(prog=PROG, description="Write one self-contained HTML file on one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, as --run-dir named it")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where to; unless given, {REPORT_NAME} in the first RUN"
    )
    parser.add_argument(
        "--data.train",
        dest="train",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where training shards lie that were moved since; may be given several times",
    )
    arguments = parser.parse_args(list(argv))
    path = arguments.out or arguments.runs[0] / REPORT_NAME
    runs = open_runs(arguments.runs)
    check_target(path)
    content = render(runs, arguments.train).encode(errors="replace")  # half of a character pair is none
    try:
        replace_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: {len(content):,} bytes cannot be written ({error.strerror}). Name another file by --out."
        ) from None
    print(f"{path}: {len(content):,} bytes. Open it in a browser; it needs no network.")
    return 0


def check_target(path: Path) -> None:
    """Judge whether the report can be written there. Raises UserError; changes nothing."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--out {path}: a report is HTML, and replaces what stands there. Name a file that ends in .html."
        )
    if path.is_dir():
        raise UserError(f"--out {path}: this is a folder. Name a file in it, for instance {path / REPORT_NAME}.")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}. Make it, or name another file.")


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs, and give each a name of its own. Raises UserError where one is none, or is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"{folders[i]}: this run is named twice. Name each run once.")
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [open_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def render(runs: Sequence[Run], data_train: Sequence[Path] = ()) -> str:
    """The report's HTML. runs: at least one. data_train: folders in which moved training shards are looked for."""
    now = datetime.now(UTC)
    title = f"Report: {' and '.join(run.name for run in runs)}"
    is_one = len(runs) == 1
    parts, targets = [], {}
    if not is_one:
        parts.append(section("Comparison", comparison(runs), 2, "comparison"))
        targets["comparison"] = "Comparison"
    for number, run in enumerate(runs, start=1):
        prefix = "" if is_one else f"run-{number}-"
        own = _parts(run, data_train, 2 if is_one else 3, prefix)
        if is_one:
            parts += own.values()
            targets |= {anchor: _TITLES[anchor] for anchor in own}
        else:
            parts.append(section(run.name, "".join(own.values()), 2, f"run-{number}"))
            targets[f"run-{number}"] = run.name
    written = f"Written {now:%Y-%m-%d %H:%M:%S} UTC by ast_dist {__version__} from the runs' own files."
    head = section(title, paragraph(written, "soft") + links(targets), 1, "top")
    return page(title, ["<main>\n", head, *parts, "</main>\n"])


_TITLES = {
    "status": "Status",
    "curves": "Curves",
    "faults": "Sessions, and the faults survived",
    "samples": "Samples",
    "configuration": "Configuration",
}


def _parts(run: Run, data_train: Sequence[Path], level: int, prefix: str) -> dict[str, str]:
    """The parts of one run's report, in their order, by their anchors."""
    memory, damaged, said = _remembered(run)
    bodies = {
        "status": status(run),
        "curves": curves(run),
        "faults": faults(run, damaged),
        "samples": samples(run, memory, said, data_train, level + 1),
        "configuration": configuration(run),
    }
    return {name: section(_TITLES[name], body, level, prefix + name) for name, body in bodies.items()}


def _remembered(run: Run) -> tuple[Memory | None, int | None, list[str]]:
    """As `report_memory.read_memory`, without waiting for torch where there is no checkpoint to read with it."""
    if not any((run.folder / "checkpoints").glob("step-*")):
        return None, None, ["No checkpoint is saved, and so nothing is known of single samples."]
    from ast_dist.report_memory import read_memory

    return read_memory(run)


if __name__ == "__main__":
    sys.exit(run_command(main))
