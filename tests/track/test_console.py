"""The console: live bars on a terminal, one plain line a row anywhere else."""

import io
import itertools
import os
import re
import subprocess
import sys
import termios

import nbformat
import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient

from ast_dist.track.console import Console, filled, plain_line, short_line

SHOW = """
import json, sys
from ast_dist.track.console import Console
console = Console(epochs=30, quiet="quiet" in sys.argv)
console.start({"run": "runs/1", "model": "small_cnn"})
for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    (console.epoch if row["kind"] == "epoch" else console.step)(row)
console.message("a message")
console.warn("a warning")
if "killed" in sys.argv:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
console.close({"state": "finished"})
"""


def show_in_a_pipe(run_dir, *options, **environment):
    command = [sys.executable, "-c", SHOW, str(run_dir / "metrics.jsonl"), *options]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


def show_on_a_terminal(run_dir, *options, columns=80, **environment):
    """Run on a pseudo-terminal so many columns wide, and return what it wrote there."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    env = {**kept, "TERM": "xterm"}
    command = [sys.executable, "-c", SHOW, str(run_dir / "metrics.jsonl"), *options]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env | environment) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says EIO when the last holder of the other end is gone
                break
            written += piece
            if not piece:
                break
        os.close(ours)
        process.wait()
    return written.decode()


def screen_of(written, columns):
    """The lines that a person sees, the ones that scrolled away included."""
    screen = pyte.HistoryScreen(columns, 24, history=10_000, ratio=1)
    pyte.Stream(screen).feed(written)
    scrolled = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*scrolled, *screen.display]]


def test_a_pipe_gets_one_line_a_row_and_no_escape_code(make_run):
    run_dir = make_run(epochs_done=5)
    num_rows = len((run_dir / "metrics.jsonl").read_text().splitlines())
    shown = show_in_a_pipe(run_dir, TERM="xterm")
    rows = [line for line in shown.stdout.splitlines() if line.startswith("epoch ")]
    assert len(rows) == num_rows == 10
    assert shown.stdout.splitlines()[:2] == ["run    runs/1", "model  small_cnn"]
    assert shown.stdout.splitlines()[-2:] == ["a message", "state  finished"]
    assert shown.stderr == "warning: a warning\n"
    assert "\x1b" not in shown.stdout + shown.stderr
    assert shown.stdout.isascii()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_plain_text_gets_the_lines_of_a_pipe(make_run, environment):
    run_dir = make_run(epochs_done=2)
    shown = show_on_a_terminal(run_dir, **environment)
    assert "\x1b" not in shown
    piped = show_in_a_pipe(run_dir).stdout.splitlines()
    assert [line for line in shown.splitlines() if line != "warning: a warning"] == piped


def test_a_terminal_gets_a_bar_for_the_epoch_and_one_for_the_run(make_run):
    run_dir = make_run(epochs_done=15)
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step", "progress/epoch": 16.4, "gate/rate": 0.4, "gate/threshold": 0.0486, ')
        metrics.write('"gate/rate_target": 0.41, "perf/data_wait": 0.02, "progress/eta_h": 0.0025}\n')
    shown = re.sub(r"\x1b\[[0-9;]*m", "", show_on_a_terminal(run_dir))
    assert re.search(r"epoch 17/30 [━╸╺]+\s+40 %", shown)
    assert re.search(r"run\s+[━╸╺]+\s+55 %", shown)
    assert "rate 0.40/0.41  threshold 0.0486  - images/s  data wait 2 %  left 0:09" in shown
    assert shown.count("epoch 15/30  val top-1") == 1
    assert "warning: a warning" in shown and shown.rstrip().endswith("state  finished")


LAST_ROW = (
    '{"kind": "step", "progress/epoch": 4.5, "gate/rate": 0.4, "gate/rate_target": 0.41, "gate/threshold": 0.0486, '
    '"perf/images_per_s": 12345.6, "perf/data_wait": 0.12, "progress/eta_h": 34.5}\n'
)


@pytest.mark.parametrize("columns", [120, 80, 40])
def test_bars_and_all_figures_stay_readable_at_any_width(make_run, columns):
    run_dir = make_run(epochs_done=3)
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(LAST_ROW)
    written = show_on_a_terminal(run_dir, "killed", columns=columns)
    shown = screen_of(written, columns)
    bars = [line for line in shown if "━" in line]
    assert [re.sub(r"[━╸╺]+", "=", line).split() for line in bars] == [
        ["epoch", "5/30", "=", "50", "%"],
        ["run", "=", "15", "%"],
    ], "one bar each, drawn in place"
    figures = " ".join("  ".join(shown[shown.index(bars[1]) + 1 :]).split())
    assert figures == "rate 0.40/0.41 threshold 0.0486 12,346 images/s data wait 12 % left 1 d 10:30:00"
    assert not any("…" in line for line in shown)


@given(st.lists(st.text("abc", min_size=1, max_size=20), max_size=9), st.integers(20, 200))
def test_filled_lines_hold_every_part_whole_and_no_line_could_take_in_the_next(parts, width):
    lines = filled(parts, width).split("\n") if parts else []
    assert [part for line in lines for part in line.split("  ")] == parts
    assert all(len(line) <= width for line in lines)
    for line, following in itertools.pairwise(lines):
        assert len(line) + 2 + len(following.split("  ")[0]) > width


def test_a_notebook_gets_the_lines_of_a_pipe(make_run):
    run_dir = make_run(epochs_done=2)
    program = f"import sys\nsys.argv = ['-', {str(run_dir / 'metrics.jsonl')!r}]\n" + SHOW
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(program)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert {output.output_type for output in outputs} == {"stream"}, "no widget, no HTML"
    text = {name: "".join(o.text for o in outputs if o.name == name) for name in ("stdout", "stderr")}
    piped = show_in_a_pipe(run_dir)
    assert (text["stdout"], text["stderr"]) == (piped.stdout, piped.stderr)


def test_a_killed_terminal_run_leaves_the_cursor_visible(make_run):
    shown = show_on_a_terminal(make_run(epochs_done=2), "killed")
    assert "\x1b[?25l" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_quiet_prints_warnings_alone(make_run):
    run_dir = make_run(epochs_done=2)
    shown = show_in_a_pipe(run_dir, "quiet")
    assert (shown.stdout, shown.stderr) == ("", "warning: a warning\n")
    assert show_on_a_terminal(run_dir, "quiet") == "warning: a warning\r\n"


@pytest.mark.parametrize("epochs", [1, 9, 30, 100, 1000])
def test_plain_lines_keep_their_columns_from_row_to_row(make_rows, epochs):
    rows = make_rows(epochs, min(epochs, 20))
    lines = [plain_line(row, epochs) for row in rows]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert {line.index("  threshold ") for line in lines} == {lines[0].index("  threshold ")}


def test_an_epoch_line_tells_the_figures_and_a_dash_where_nothing_was_measured(make_rows):
    gated = make_rows(30, 3)[-1]
    assert plain_line(gated, 30) == (
        "epoch  3/30  step     40  val top-1       80.33  val loss    0.3333  rate 0.40 (target 0.40)  "
        "threshold    0.536      821 images/s  data wait   2 %  left    0:14"
    )
    full = make_rows(30, 1)[-1]
    without_scores = {key: value for key, value in full.items() if not key.startswith(("val/", "perf/", "progress/"))}
    assert plain_line(without_scores, 30) == (
        "epoch  1/30  step     22  val top-1           -  val loss         -  rate 1.00 (target 1.00)  "
        "threshold        -        - images/s  data wait     -  left       -"
    )


def test_the_line_above_the_bars_fits_80_columns(make_rows):
    assert max(len(short_line(row, 1000)) for row in make_rows(1000, 20) if row["kind"] == "epoch") < 80


def test_null_figures_show_as_unknown():
    row = {"kind": "step", "global_step": 1, "progress/epoch": 0.5, "train/loss": None, "perf/data_wait": None}
    stream = io.StringIO()
    Console(epochs=1, stream=stream).step(row)
    assert "train loss       -" in stream.getvalue()
