"""dashboard.png shows the run as it is, whatever there is of it, and can never stop the training."""

import fcntl
import itertools
import os
import struct
import subprocess
import sys

import pytest

from ast_dist.track.dashboard import draw, render
from ast_dist.track.dashboard_process import DashboardProcess

STAGES = {
    "no rows": {"epochs_done": 0, "state": "running"},
    "1 epoch": {"epochs": 1, "epochs_done": 1},
    "half-way": {"epochs": 30, "epochs_done": 14, "state": "running"},
    "100 epochs, resumed": {
        "epochs": 100,
        "epochs_done": 100,
        "restarts": [(1 + i // 3, i % 3, 90 * i) for i in range(1, 9)],
    },
    "full": {"epochs_done": 8, "policy": "full"},
}


def texts(figure):
    return [text.get_text() for text in figure.texts]


def panel(figure, title):
    """A panel's own axes by its title, and the axes that share its place."""
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def size_of_png(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_run_gives_a_picture_whose_texts_lie_inside(make_run, stage):
    run_dir = make_run(**STAGES[stage])
    assert render(run_dir) == run_dir / "dashboard.png"
    assert size_of_png(run_dir / "dashboard.png") == (1600, 1000)
    figure = draw(run_dir)
    figure.canvas.draw()
    everything = [*figure.texts, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for item in everything:
        box = item.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1600 and box.y1 <= 1000, item
    assert not [path for path in run_dir.iterdir() if path.suffix == ".tmp"]


def test_curves_of_a_panel_differ_without_colour(make_run):
    figure = draw(make_run(epochs_done=30))
    for title in ("Accuracy", "Saved", "Activation", "Threshold", "Loss", "Time"):
        left = panel(figure, title)
        sides = left.get_shared_x_axes().get_siblings(left)
        curves = [line for axes in sides for line in axes.lines if not line.get_label().startswith("_")]
        styles = [(line.get_linestyle(), line.get_marker()) for line in curves]
        assert len(set(styles)) == len(styles), title
        assert len(legend(left)) == len(curves) + len(left.containers)


def test_labels_are_honest(make_run):
    figure = draw(make_run(epochs_done=14))
    assert legend(panel(figure, "Accuracy")) == ["train top-1 (selected samples)", "val top-1"]
    savings = panel(figure, "Saved so far, %")
    assert legend(savings) == ["samples skipped", "FLOPs saved"]
    assert [text.get_text() for text in savings.texts] == ["GPU joules: not measured"]


def test_savings_are_shares_of_training_everything(make_run):
    figure = draw(make_run(epochs_done=14))
    skipped, flops = panel(figure, "Saved so far, %").lines
    assert skipped.get_ydata()[-1] == pytest.approx(100 * 13 * 0.6 / 14, abs=0.1)
    assert flops.get_ydata()[-1] == pytest.approx(100 * 13 * 0.6 / 14, abs=0.1)


def test_full_epochs_have_no_threshold_and_leave_a_gap(make_run):
    curve = panel(draw(make_run(epochs=30, epochs_done=30)), "Threshold").lines[0]
    missing = [float(x) for x, y in zip(curve.get_xdata(), curve.get_ydata(), strict=True) if y != y]
    assert missing and all(x <= 1 or x > 27 for x in missing)
    said = panel(draw(make_run(epochs_done=8, policy="full")), "Threshold").texts[0].get_text()
    assert said == "none: every sample is trained on"


def test_each_restart_is_a_line_where_it_went_on(make_run):
    run_dir = make_run(epochs=30, epochs_done=14, restarts=[(1, 1, 22), (2, 0, 58)])
    figure = draw(run_dir)
    marks = [line for line in panel(figure, "Accuracy").lines if line.get_label().startswith("_")]
    assert [(float(line.get_xdata()[0]), line.get_linestyle()) for line in marks] == [(1.0, ":"), (5.0, "--")]
    shown = texts(figure)
    told = dict(itertools.pairwise(shown))
    assert told["restarts (dotted lines)"] == "1" and told["session (dashed lines)"] == "2"
    assert told["steps repeated"] == "22" and told["longest recovery"] == "6.2 s"


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
    lr = next(axes for axes in draw(run_dir).axes if [line.get_label() for line in axes.lines] == ["LR (right)"])
    assert set(lr.lines[0].get_ydata().round(12)) == {0.1}


def test_an_empty_folder_is_drawn_and_an_absent_one_refused_in_one_line(tmp_path):
    assert render(tmp_path).is_file()
    command = [sys.executable, "-m", "ast_dist.track.dashboard", str(tmp_path / "absent")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path}/absent: no such folder. Name the folder that --run-dir named.\n"


def test_a_refresh_draws_beside_the_caller(make_run):
    run_dir, warnings = make_run(epochs_done=2), []
    dashboard = DashboardProcess(run_dir, warnings.append)
    dashboard.refresh()
    assert not (run_dir / "dashboard.png").exists(), "refresh must not wait for the picture"
    assert dashboard._child.wait() == 0
    assert size_of_png(run_dir / "dashboard.png") == (1600, 1000)
    dashboard.close()
    assert warnings == []


def test_drawing_has_a_lower_priority_than_training(make_run):
    run_dir = make_run(epochs_done=2)
    (run_dir / "sessions.jsonl").unlink()
    os.mkfifo(run_dir / "sessions.jsonl")
    dashboard = DashboardProcess(run_dir, pytest.fail)
    dashboard.refresh()
    with (run_dir / "sessions.jsonl").open("w"):  # opens when the child has come to reading it
        ours, its = os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, dashboard._child.pid)
    assert its == min(19, ours + 10)
    (run_dir / "sessions.jsonl").unlink()
    dashboard.close()


def test_one_picture_at_a_time_and_the_last_request_is_remembered(make_run):
    dashboard = DashboardProcess(make_run(epochs_done=2), pytest.fail, min_interval_s=0)
    dashboard.refresh()
    first = dashboard._child
    dashboard.refresh()
    dashboard.tend()
    assert dashboard._child is first
    first.wait()
    dashboard.tend()
    second = dashboard._child
    assert second is not None and second is not first
    second.wait()
    dashboard.tend()
    assert dashboard._child is None, "asked for twice, drawn twice"
    dashboard.close()


def test_pictures_keep_their_distance_but_the_final_one_is_always_drawn(make_run):
    run_dir = make_run(epochs_done=2)
    dashboard = DashboardProcess(run_dir, pytest.fail, min_interval_s=3600)
    dashboard.refresh()
    dashboard._child.wait()
    dashboard.refresh()
    dashboard.tend()
    assert dashboard._child is None
    (run_dir / "dashboard.png").unlink()
    dashboard.close()
    assert (run_dir / "dashboard.png").is_file()


def test_a_picture_that_fails_is_one_warning_with_the_reason_and_never_an_error(make_run):
    run_dir, warnings = make_run(epochs_done=2), []
    (run_dir / "dashboard.png").mkdir()
    dashboard = DashboardProcess(run_dir, warnings.append, min_interval_s=0)
    dashboard.refresh()
    dashboard._child.wait()
    dashboard.refresh()
    dashboard.close()
    assert len(warnings) == 1
    assert "dashboard.png is not up to date: IsADirectoryError" in warnings[0] and "Training goes on" in warnings[0]
    assert [path.name for path in run_dir.iterdir() if path.suffix == ".tmp"] == []


def test_closing_gives_up_on_a_picture_that_takes_too_long(make_run):
    run_dir, warnings = make_run(epochs_done=2), []
    (run_dir / "sessions.jsonl").unlink()
    os.mkfifo(run_dir / "sessions.jsonl")  # opening it waits for a writer that never comes
    dashboard = DashboardProcess(run_dir, warnings.append)
    dashboard.refresh()
    dashboard.close(timeout_s=0.2)
    assert warnings == [f"{run_dir}/dashboard.png is not up to date: not drawn in time. Training goes on."]


def test_one_high_loss_hides_no_others(make_run):
    run_dir = make_run(epochs_done=14)
    assert panel(draw(run_dir), "Loss").get_yscale() == "log", "the losses span a factor of 30"
    assert panel(draw(make_run(epochs_done=2)), "Loss").get_yscale() == "linear"
