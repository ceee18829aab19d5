"""dashboard.png shows the run as it is, whatever there is of it, and hides nothing."""

import fcntl
import itertools
import json
import struct
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ast_dist.track.dashboard import HEIGHT_PX, WIDTH_PX, draw, read_record, render
from ast_dist.track.dashboard_head import status_facts, wrong
from ast_dist.track.history import read
from tests.track.conftest import write_run

STAGES = {
    "no rows": {"epochs_done": 0, "state": "running"},
    "1 epoch": {"epochs": 1, "epochs_done": 1},
    "half-way": {"epochs": 30, "epochs_done": 14, "state": "running"},
    "half-way, measured": {"epochs": 30, "epochs_done": 14, "state": "paused", "measured": True},
    "100 epochs, resumed": {
        "epochs": 100,
        "epochs_done": 100,
        "restarts": [(1 + i // 3, i % 3, 90 * i) for i in range(1, 9)],
    },
    "full": {"epochs_done": 8, "policy": "full"},
    "extreme": {
        "epochs": 100_000,
        "epochs_done": 3,
        "state": "failed",
        "measured": True,
        "restarts": [(1 + i // 3, i % 3, 2 * i) for i in range(1, 40)],
        "step": 123_456_789_012,
        "checkpoint": "step-00001234567890-evaluated",
        "checkpoint_verified_at": "1970-01-01T00:00:00+00:00",
        "total_s": 4e7,
        "eta_s": 9e8,
        "eta_low_s": 8e8,
        "eta_high_s": 1e9,
        "session_hours": 8.5,
        "sessions_left_low": 26_000,
        "sessions_left_high": 33_000,
        "warnings": 1_234_567,
        "last_warning": "x" * 500,
        "message": "no space left on the device " * 20,
        "policy": "a.module.of.somebody:AndItsVeryLongClassNameThatGoesOnAndOn",
    },
}
PANELS = ("Top-1", "Saved", "Activation", "Threshold", "Time", "Overall", "Loss")


def texts(figure):
    return [text.get_text() for text in figure.texts]


def panel(figure, title):
    """A panel's own axes by its title, and the axes that share its place."""
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(figure, title):
    """The curves of a panel by their names, those of its right scale included."""
    left = panel(figure, title)
    sides = left.get_shared_x_axes().get_siblings(left)
    lines = [line for axes in sides for line in axes.lines if len(line.get_xdata())]
    return {line.get_label(): line for line in lines if not line.get_label().startswith("_")}


def fact(figure, label):
    """What stands below a label of the head: its value, and what is noted below that."""
    shown = texts(figure)
    return shown[shown.index(label) + 1 : shown.index(label) + 3]


def size_of_png(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def overlaps(boxes):
    """Pairs of boxes that share more than a pixel in both directions. boxes: (name, box) each."""
    found = []
    for (first, one), (second, other) in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        if width > 1 and height > 1:
            found.append((first, second))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_cut_off_and_nothing_overlaps_at_any_stage(tmp_path, stage):
    run_dir = write_run(
        tmp_path / "a_run-with$a$name-that-is-longer-than-any-picture-is-wide-and-then-some", **STAGES[stage]
    )
    figure = draw(run_dir)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    written = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts if text.get_text()]
    for axes in figure.axes:
        if title := axes.get_title(loc="left"):
            written.append((title, axes._left_title.get_window_extent(renderer)))
            assert not axes.get_legend() or axes.get_legend().get_window_extent(renderer).x1 <= WIDTH_PX
            sides = axes.get_shared_x_axes().get_siblings(axes)
            below = [box for side in sides if (box := side.xaxis.get_tightbbox(renderer))]
            written.append((f"panel of {title}", Bbox.union([axes.get_window_extent(renderer), *below])))
            scales = [box for side in sides if (box := side.yaxis.get_tightbbox(renderer))]
            written += [(f"panel of {title}", box) for box in scales]
        if axes.get_legend():
            written += [(text.get_text(), text.get_window_extent(renderer)) for text in axes.get_legend().get_texts()]
    for name, box in written:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= WIDTH_PX and box.y1 <= HEIGHT_PX, (name, box)
    # A panel's own scales meet in its corners.
    assert [pair for pair in overlaps(written) if pair[0] != pair[1] or not pair[0].startswith("panel of")] == []


def test_the_picture_is_as_large_as_it_says_and_leaves_no_draft(make_run):
    run_dir = make_run(epochs_done=3)
    assert render(run_dir) == run_dir / "dashboard.png"
    assert size_of_png(run_dir / "dashboard.png") == (WIDTH_PX, HEIGHT_PX)
    assert not [path for path in run_dir.iterdir() if path.suffix == ".tmp"]


def test_letters_are_at_least_eight_pixels_high_on_a_phone(make_run):
    figure = draw(make_run(epochs_done=14, measured=True, restarts=[(2, 0, 22)]))
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) * figure.dpi / 72 * 390 / WIDTH_PX >= 7.5


def test_curves_of_a_panel_differ_without_colour(make_run):
    figure = draw(make_run(epochs_done=30, measured=True, eta_low_s=90.0, eta_high_s=150.0))
    for title in PANELS:
        drawn = curves(figure, title).values()
        styles = [(line.get_linestyle(), line.get_marker(), line.get_linewidth() > 5) for line in drawn]
        assert len(set(styles)) == len(styles), title


def test_every_key_that_is_drawn_appears_with_its_rows_values(make_run):
    run_dir = make_run(epochs_done=14, measured=True)
    figure, rows = draw(run_dir), read(run_dir / "metrics.jsonl")
    for title, name, key, scale in (
        ("Top-1", "train, all (estimate)", "train/acc1_all", 1),
        ("Top-1", "train, selected", "train/acc1_selected", 1),
        ("Top-1", "val", "val/acc1", 1),
        ("Top-1", "val, EMA", "val/ema_acc1", 1),
        ("Saved", "FLOPs saved", "cost/flops_saved", 100),
        ("Saved", "joules saved", "cost/joules_saved", 100),
        ("Activation", "rate", "gate/rate", 1),
        ("Activation", "target", "gate/rate_target", 1),
        ("Threshold", "threshold", "gate/threshold", 1),
        ("Threshold", "integral (right)", "gate/integral", 1),
        ("Time", "images/s (right)", "perf/images_per_s", 1),
        ("Loss", "train", "train/loss", 1),
        ("Loss", "val", "val/loss", 1),
        ("Loss", "learning rate (right)", "train/lr", 1),
    ):
        line = curves(figure, title)[name]
        assert name in legend(panel(figure, title))
        shown = [y for y in line.get_ydata() if y == y]
        assert shown == pytest.approx([scale * row[key] for row in rows if key in row]), name
    bars = panel(figure, "Time").containers[0]
    assert [bar.get_height() for bar in bars] == pytest.approx(
        [row["perf/epoch_s"] for row in rows if "perf/epoch_s" in row]
    )


def test_any_key_of_a_row_may_be_absent(tmp_path):
    run_dir = write_run(tmp_path / "run", epochs_done=3, measured=True, eta_low_s=90.0, eta_high_s=150.0)
    rows = read(run_dir / "metrics.jsonl")
    for key in sorted(set().union(*rows)):
        lines = (json.dumps({name: value for name, value in row.items() if name != key}) for row in rows)
        (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        draw(run_dir)
    for few in (
        {"kind": "step"},
        {"kind": "epoch", "epoch": 1},
        {"kind": "step", "val/acc1": None, "progress/epoch": 1},
    ):
        (run_dir / "metrics.jsonl").write_text(json.dumps(few) + "\n")
        draw(run_dir)


def test_samples_flops_and_joules_are_three_curves_and_none_is_called_energy(make_run):
    figure = draw(make_run(epochs_done=14, measured=True))
    skipped, flops, joules = (
        curves(figure, "Saved")[name] for name in ("samples skipped", "FLOPs saved", "joules saved")
    )
    assert skipped.get_ydata()[-1] == pytest.approx(100 * 13 * 0.6 / 14, abs=0.1)
    assert flops.get_ydata()[-1] == pytest.approx(100 * 13 * 0.6 / 14, abs=0.1)
    assert joules.get_ydata()[-1] == pytest.approx(0.8 * 100 * 13 * 0.6 / 14, abs=0.1)
    shown = [text.get_text() for text in figure.findobj(Text)]
    assert legend(panel(figure, "Saved"))[3] == "2.78 kJ used, idle 71.5 W"
    assert not [text for text in shown if "energy" in text.lower()]


def test_joules_that_nobody_measured_are_not_drawn_and_said_to_be_so(make_run):
    figure = draw(make_run(epochs_done=14))
    assert legend(panel(figure, "Saved so far, %")) == ["samples skipped", "FLOPs saved", "joules: not measured"]
    assert set(curves(figure, "Saved")) == {"samples skipped", "FLOPs saved"}
    assert legend(panel(figure, "Top-1")) == ["train, selected", "val"]


def test_joules_without_a_full_epoch_are_told_without_a_saving(tmp_path, make_run):
    run_dir = make_run(epochs_done=2, measured=True)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("cost/joules_saved", "nothing"))
    assert legend(panel(draw(run_dir), "Saved"))[-1] == "620 J used, idle 71.5 W, saved: not known yet"


def test_full_epochs_have_no_threshold_and_leave_a_gap(make_run):
    curve = curves(draw(make_run(epochs=30, epochs_done=30)), "Threshold")["threshold"]
    missing = [float(x) for x, y in zip(curve.get_xdata(), curve.get_ydata(), strict=True) if y != y]
    assert missing and all(x <= 1 or x > 27 for x in missing)
    said = panel(draw(make_run(epochs_done=8, policy="full")), "Threshold").texts[0].get_text()
    assert said == "none: every sample\nis trained on"


def test_progress_runs_against_the_time_of_all_sessions_and_ends_in_an_interval(make_run):
    run_dir = make_run(state="paused", restarts=[(1, 1, 22), (2, 0, 58)], eta_s=12.0, eta_low_s=9.5, eta_high_s=16.0)
    figure = draw(run_dir)
    drawn = curves(figure, "Overall")
    rows = read(run_dir / "metrics.jsonl")
    assert drawn["epochs done"].get_xdata().tolist() == pytest.approx([row["time/total_s"] for row in rows])
    assert drawn["epochs done"].get_ydata().tolist() == pytest.approx([row["progress/epoch"] for row in rows])
    spent_s = rows[-1]["time/total_s"]
    assert drawn["expected end"].get_xdata() == pytest.approx([spent_s + left for left in (9.5, 12.0, 16.0)])
    assert set(drawn["expected end"].get_ydata()) == {30.0}
    at = {row["global_step"]: row["time/total_s"] for row in rows}
    assert float(drawn["restart"].get_xdata()[0]) == pytest.approx(at[22])
    assert float(drawn["new session"].get_xdata()[0]) == pytest.approx(at[58])


def test_a_run_whose_end_is_unknown_or_over_has_no_expected_end(make_run):
    for options in ({"state": "running"}, {"state": "finished", "eta_s": 0.0}):  # running, and nobody holds it
        assert set(curves(draw(make_run(**options)), "Overall")) == {"epochs done"}


def test_each_restart_is_a_line_where_it_went_on(make_run):
    figure = draw(make_run(epochs=30, epochs_done=14, restarts=[(1, 1, 22), (2, 0, 58)]))
    for title in PANELS:
        if title != "Overall":
            marks = [line for line in panel(figure, title).lines if line.get_label().startswith("_")]
            drawn = [(float(line.get_xdata()[0]), line.get_linestyle()) for line in marks]
            assert drawn == [(1.0, ":"), (5.0, "--")], title
    assert fact(figure, "restarts survived") == ["1", "at dotted lines"]
    assert fact(figure, "session") == ["2", "begun at dashed lines"]
    assert fact(figure, "steps repeated") == ["22", "longest recovery 6.2 s"]


def test_the_head_states_how_the_run_stands(make_run):
    known = {
        "eta_s": 7200.0,
        "eta_low_s": 6000.0,
        "eta_high_s": 9000.0,
        "session_hours": 8.5,
        "sessions_left_low": 1,
        "sessions_left_high": 2,
        "warnings": 3,
        "last_warning": "damaged sample left out: a.jpg",
        "checkpoint_at": "2026-01-01T00:10:00+00:00",
        "checkpoint_verified_at": "2026-01-01T00:08:20+00:00",
    }
    run_dir = make_run(state="paused", **known)
    warned = [{"session": 1, "event": "warning", "text": f"damaged sample left out: {name}.jpg"} for name in "aba"]
    with (run_dir / "sessions.jsonl").open("a") as sessions:
        sessions.writelines(json.dumps(row) + "\n" for row in warned)
    record, damage = read_record(run_dir)
    facts = {fact.label: fact[1:] for fact in status_facts(record, datetime(2026, 1, 1, 0, 11, 0, tzinfo=UTC))}
    assert facts == {
        "epochs done": ("14 of 30", ""),
        "step": ("139", ""),
        "time spent": ("0:11", "in all sessions"),
        "best val top-1": ("93.43 %", ""),
        "current val top-1": ("93.43 %", ""),
        "time left": ("2:00:00", "1:40:00 to 2:30:00"),
        "session": ("1", ""),
        "restarts survived": ("0", ""),
        "sessions to come": ("1 to 2", "of 8.5 h each"),
        "last checkpoint": ("step-00000100", "saved 1:00 ago"),
        "checkpoint verified": ("2:40 ago", "read back against SHA-256"),
        "steps repeated": ("0", ""),
        "warnings": ("3", "in this session"),
        "damaged samples": ("2", "left out"),
        "non-finite steps": ("-", ""),
    }
    assert wrong(record, damage) == ["Last warning: damaged sample left out: a.jpg"]
    shown = texts(draw(run_dir))
    assert {"2:00:00", "1 to 2", "Last warning: damaged sample left out: a.jpg"} < set(shown)


def test_what_is_not_known_is_a_dash_and_nothing_wrong_is_said_to_be_so(make_run):
    figure = draw(make_run(state="finished", eta_s=0.0))
    assert fact(figure, "warnings")[0] == "-" and fact(figure, "sessions to come")[0] == "none"
    assert fact(figure, "checkpoint verified")[0] == "never"
    assert "Nothing wrong was reported." in texts(figure)


def test_the_head_tells_a_killed_run_from_a_running_one(make_run):
    run_dir = make_run(state="running")
    assert {"STOPPED"} < set(texts(draw(run_dir)))
    with (run_dir / ".lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        assert {"RUNNING"} < set(texts(draw(run_dir)))


def test_damaged_rows_are_left_out_and_named_in_the_head(make_run):
    run_dir = make_run(epochs_done=3)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("\n", "\nnonsense\n", 1))
    assert any("cannot be read (line 2)" in text for text in texts(draw(run_dir)))


def test_long_histories_are_averaged_and_keep_their_gaps(tmp_path, make_run, make_rows):
    run_dir = make_run(epochs=300, epochs_done=300)
    curve = panel(draw(run_dir), "Threshold").lines[0]
    assert 100 < curve.get_xdata().size <= 400
    assert curve.get_ydata()[-1] != curve.get_ydata()[-1], "annealing epochs have no threshold"
    lr = curves(draw(run_dir), "Loss")["learning rate (right)"]
    assert set(lr.get_ydata().round(12)) == {0.1}


def test_an_empty_folder_is_drawn_and_an_absent_one_refused_in_one_line(tmp_path):
    assert render(tmp_path).is_file()
    command = [sys.executable, "-m", "ast_dist.track.dashboard", str(tmp_path / "absent")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path}/absent: no such folder. Name the folder that --run-dir named.\n"


def test_one_high_loss_hides_no_others(make_run):
    run_dir = make_run(epochs_done=14)
    assert panel(draw(run_dir), "Loss").get_yscale() == "log", "the losses span a factor of 30"
    assert panel(draw(make_run(epochs_done=2)), "Loss").get_yscale() == "linear"
