"""dashboard.png: the whole run on one picture, drawn from its files.

    python -m ast_dist.track.dashboard RUN

Twice as tall as it is wide, so that it fills a phone's screen and can be read there without zooming; readable in
black and white, too. What was not measured is said to be so.
"""

import argparse
import io
import os
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ast_dist.errors import UserError, run_command
from ast_dist.track import dashboard_panels as panels
from ast_dist.track.curves import TITLE_PT, Record, add_legend
from ast_dist.track.dashboard_head import HEAD_PX, draw_head
from ast_dist.track.history import read
from ast_dist.track.progress import as_it_is_now, read_progress, replace_atomically

DASHBOARD_NAME = "dashboard.png"
DPI = 100
WIDTH_PX, ROW_PX = 1200, 450
ROWS: tuple[tuple[panels.Panel, ...], ...] = (
    (panels.draw_accuracy,),
    (panels.draw_savings, panels.draw_rate),
    (panels.draw_threshold, panels.draw_time),
    (panels.draw_progress, panels.draw_loss),
)
HEIGHT_PX = HEAD_PX + len(ROWS) * ROW_PX
# Room for the numbers of the scales: left of each panel, right of it, and below; and between rows.
SCALE_PX, RIGHT_SCALE_PX, BELOW_PX, GAP_PX = 95, 85, 68, 22


def render(run_dir: Path | str) -> Path:
    """Draw the run and put the picture in the place of RUN/dashboard.png, WIDTH_PX by HEIGHT_PX. Returns its path.

    Raises UserError when RUN is not a folder, OSError when the picture cannot be written.
    """
    picture = io.BytesIO()
    draw(run_dir).savefig(picture, format="png")
    path = Path(run_dir) / DASHBOARD_NAME
    replace_atomically(path, picture.getvalue())
    return path


def draw(run_dir: Path | str) -> Figure:
    """Draw what the run has written so far: a head with its status, and seven panels.

    Any of metrics.jsonl, sessions.jsonl and progress.json may be missing or empty; damaged rows are left out, and
    the head says so. Raises UserError when RUN is not a folder.
    """
    run_dir = Path(run_dir)
    record, damage = read_record(run_dir)
    figure = Figure(figsize=(WIDTH_PX / DPI, HEIGHT_PX / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    draw_head(figure, run_dir.resolve().name, record, damage, datetime.now(UTC))
    for number, row in enumerate(ROWS):
        for column, draw_one in enumerate(row):
            axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
            title = panels.draw_panel(axes, record, draw_one)
            # Curves of the progress panel have short names, those over the whole width have room.
            add_legend(axes, columns=4 if len(row) == 1 else 2 if draw_one is panels.draw_progress else 1)
            slot_px = WIDTH_PX // len(row)
            _place(axes, title, column * slot_px, HEAD_PX + number * ROW_PX, slot_px)
    return figure


def read_record(run_dir: Path) -> tuple[Record, list[str]]:
    """A run's files, and what of them could not be read. Raises UserError when RUN is not a folder."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder. Name the folder that --run-dir named.")
    with warnings.catch_warnings(record=True) as damage:
        warnings.simplefilter("always", RuntimeWarning)
        rows, sessions = read(run_dir / "metrics.jsonl"), read(run_dir / "sessions.jsonl")
    try:
        progress = as_it_is_now(run_dir, read_progress(run_dir))
    except UserError as error:
        progress = {"state": "not begun", "message": str(error)}
    return Record(rows, sessions, progress), [str(warning.message) for warning in damage]


def _place(axes: Axes, title: str, left_px: int, top_px: int, width_px: int) -> None:
    """Put a panel into its slot of the picture, below its title and its legend."""
    figure, legend = axes.get_figure(root=True), axes.get_legend()
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    legend_px = legend.get_window_extent(renderer).height if legend else 0.0
    above_px = TITLE_PT * DPI / 72 + legend_px + 14
    bottom_px = HEIGHT_PX - top_px - ROW_PX + BELOW_PX
    axes.set_position(
        (
            (left_px + SCALE_PX) / WIDTH_PX,
            bottom_px / HEIGHT_PX,
            (width_px - SCALE_PX - RIGHT_SCALE_PX) / WIDTH_PX,
            (ROW_PX - BELOW_PX - above_px - GAP_PX) / HEIGHT_PX,
        )
    )
    axes.set_title(title, fontsize=TITLE_PT, fontweight="bold", loc="left", pad=(legend_px + 4) * 72 / DPI)


def main(argv: list[str]) -> None:
    """Draw one run's dashboard and print its path."""
    parser = argparse.ArgumentParser(prog="python -m ast_dist.track.dashboard", description="Draw RUN/dashboard.png.")
    parser.add_argument("run", help="the run's folder, as --run-dir named it")
    arguments = parser.parse_args(argv)
    os.nice(10)
    print(render(arguments.run))


if __name__ == "__main__":
    sys.exit(run_command(main))
