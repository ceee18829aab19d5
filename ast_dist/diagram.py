"""Two drawings: architecture.svg (the system) and sundew.svg (the gate's process, with a run's real numbers).

    python -m ast_dist.diagram OUT [--run RUN]

OUT: folder for the two files, made if absent. RUN: the run whose numbers they show; OUT itself where that is a run's
folder. Without a run, letters stand for the numbers. Needs no GPU and no torch, and never touches the run.
"""

import argparse
import os
import sys
from pathlib import Path

from ast_dist.diagram_architecture import architecture_svg
from ast_dist.diagram_numbers import read_numbers
from ast_dist.diagram_sundew import sundew_svg
from ast_dist.errors import UserError, described, run_command
from ast_dist.track.progress import PROGRESS_NAME, replace_atomically

ARCHITECTURE_NAME, SUNDEW_NAME = "architecture.svg", "sundew.svg"


def write_diagrams(out: Path | str, run_dir: Path | str | None = None) -> list[Path]:
    """Write both drawings into a folder and return their paths.

    run_dir: the run whose numbers are shown; None takes `out` where that is a run, and letters otherwise. Raises
    UserError when run_dir is not a run, or when `out` cannot be written.
    """
    out = Path(out)
    if run_dir is None and (out / PROGRESS_NAME).is_file():
        run_dir = out
    numbers = None if run_dir is None else read_numbers(Path(run_dir))
    drawn = {ARCHITECTURE_NAME: architecture_svg(numbers), SUNDEW_NAME: sundew_svg(numbers)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in drawn.items():
            replace_atomically(out / name, text.encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({described(error)}). Name another folder.") from None
    return [out / name for name in drawn]


def main(argv: list[str]) -> int:
    """Write the drawings and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m ast_dist.diagram", description="Draw the system and the gate.")
    parser.add_argument("out", metavar="OUT", help="folder for architecture.svg and sundew.svg; a run's own will do")
    parser.add_argument("--run", help="the run whose numbers are shown (OUT, where that is a run)")
    arguments = parser.parse_args(argv)
    os.nice(10)
    for path in write_diagrams(arguments.out, arguments.run):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
