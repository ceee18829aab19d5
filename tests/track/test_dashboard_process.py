"""Pictures are drawn beside the training, and can never stop it."""

import os

import pytest

from ast_dist.track.dashboard_process import DashboardProcess


def test_a_refresh_draws_beside_the_caller(make_run):
    run_dir, warnings = make_run(epochs_done=2), []
    dashboard = DashboardProcess(run_dir, warnings.append)
    dashboard.refresh()
    assert not (run_dir / "dashboard.png").exists(), "refresh must not wait for the picture"
    assert dashboard._child.wait() == 0
    assert (run_dir / "dashboard.png").read_bytes().startswith(b"\x89PNG\r\n")
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


def test_the_last_picture_brings_the_diagrams_and_those_before_do_not(make_run):
    run_dir, diagrams = make_run(epochs_done=2), {"architecture.svg", "sundew.svg"}
    dashboard = DashboardProcess(run_dir, pytest.fail)
    dashboard.refresh()
    dashboard._child.wait()
    assert not diagrams & {path.name for path in run_dir.iterdir()}
    dashboard.close()
    assert diagrams < {path.name for path in run_dir.iterdir()}


def test_diagrams_that_fail_are_one_warning_and_never_an_error(make_run):
    run_dir, warnings = make_run(epochs_done=2), []
    (run_dir / "sundew.svg").mkdir()
    DashboardProcess(run_dir, warnings.append).close()
    assert (run_dir / "dashboard.png").is_file()
    assert len(warnings) == 1
    assert "sundew.svg is not up to date" in warnings[0] and "IsADirectoryError" in warnings[0]


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
