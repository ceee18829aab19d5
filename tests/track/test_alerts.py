"""An alert comes for what a person must hear of, and once in ten minutes."""

from ast_dist.track.alerts import Alert, Alerts


def step(number, step_ms=500.0, **more):
    return {"kind": "step", "global_step": number, "perf/step_ms": step_ms, **more}


def test_skipped_steps_are_told_when_their_count_rises_and_not_again_after_a_resume():
    alerts = Alerts([step(10, **{"train/steps_nonfinite": 3}), {"kind": "epoch", "global_step": 10}])
    assert alerts.judge(step(20, **{"train/steps_nonfinite": 3})) is None
    alert = alerts.judge(step(30, **{"train/steps_nonfinite": 5}))
    assert alert == Alert("nonfinite", "by step 30, 5 steps were skipped: not finite (3 before).")
    assert alerts.judge(step(40, **{"train/steps_nonfinite": 5})) is None


def test_an_interval_of_ten_times_the_usual_one_is_a_stall_and_a_short_one_never_is():
    alerts = Alerts()
    # Ten steps of half a second each: 5 s are usual, 50 s a stall.
    for number in range(10, 110, 10):
        assert alerts.judge(step(number)) is None
    assert alerts.judge(step(110, step_ms=4900.0)) is None
    alert = alerts.judge(step(120, step_ms=5000.0))
    assert alert == Alert("stall", "the 10 steps up to 120 took 50 s; 5.0 s is usual.")
    # Rows of 10 ms: a hundred times as long is still a second, and no news.
    quick = Alerts()
    assert all(quick.judge(step(number, step_ms=10.0)) is None for number in range(20))
    assert quick.judge(step(20, step_ms=1000.0)) is None


def test_nothing_is_a_stall_before_it_is_known_what_is_usual():
    alerts = Alerts()
    assert all(alerts.judge(step(number, step_ms=10.0 ** (number + 1))) is None for number in range(1, 6))


def test_a_restart_after_a_hang_is_a_stall():
    assert Alerts.restarted(5.0, 40) is None
    alert = Alerts.restarted(131.0, 1240)
    assert alert == Alert("stall", "no step for 131 s; the run was restarted and goes on from step 1,240.")


def test_the_end_is_told_as_an_error_only_where_it_is_one():
    assert Alerts.ended("finished", "") == Alert("end", "finished", "INFO")
    assert Alerts.ended("paused", "SIGTERM") == Alert("end", "paused: SIGTERM", "INFO")
    assert Alerts.ended("failed", "no room") == Alert("end", "failed: no room", "ERROR")


def test_each_kind_is_sent_once_in_ten_minutes():
    now = [0.0]
    alerts = Alerts(now=lambda: now[0])
    sent = []
    for second in (0, 1, 599, 600, 601, 1199, 1200):
        now[0] = float(second)
        sent += [(second, kind) for kind in ("stall", "end") if alerts.is_due(Alert(kind, ""))]
    assert sent == [(second, kind) for second in (0, 600, 1200) for kind in ("stall", "end")]
    assert all(len(Alert(kind, "").title) < 64 for kind in ("nonfinite", "rollback", "stall", "end"))
