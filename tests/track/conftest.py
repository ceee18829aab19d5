"""Runs that were never trained, with the rows a real one writes."""

import json
import math
from pathlib import Path

import pytest

from ast_dist.track.progress import write_progress

NUM_SAMPLES, STEPS_PER_EPOCH = 1437, 22


def rows_of_a_run(epochs, epochs_done, every_steps=10, policy="sundew", measured=False):
    """Step and epoch rows: full epochs first and last, rate 0.4 between, no threshold in full epochs.

    measured: with the keys of a run with EMA weights on a GPU whose energy NVML measures.
    """
    rows, step, skipped, total_s = [], 0, 0.0, 0.0
    for epoch in range(epochs_done):
        gated = policy == "sundew" and 0 < epoch < 0.9 * epochs
        rate = 0.4 if gated else 1.0
        num_steps = round(STEPS_PER_EPOCH * rate)
        row = {}
        for position in range(1, num_steps + 1):
            step, total_s = step + 1, total_s + 0.08
            passes = epoch + position / num_steps
            skipped_now = skipped + NUM_SAMPLES * (1 - rate) * position / num_steps
            row = {
                "global_step": step,
                "progress/epoch": passes,
                "progress/session": 1,
                "gate/rate": rate,
                "gate/rate_target": rate,
                "cost/samples_skipped": round(skipped_now),
                "cost/flops_saved": skipped_now / (NUM_SAMPLES * passes),
                "perf/images_per_s": 812.0 + position,
                "perf/step_ms": 78.1,
                "perf/data_wait": 0.02,
                "time/total_s": total_s,
                "progress/eta_h": (epochs - passes) * 0.5 / 3600,
            }
            if gated:
                row |= {"gate/threshold": 0.8 * math.exp(-epoch / 5), "gate/integral": 0.01 * math.sin(epoch)}
            if step % every_steps == 0:
                learned = {"train/loss": 2.3 * math.exp(-passes / 5), "train/acc1_selected": 90.0, "train/lr": 0.1}
                rows.append({"kind": "step", **row, **learned})
        skipped += NUM_SAMPLES * (1 - rate)
        scores = {"val/acc1": 97.0 - 50 / (epoch + 1), "val/acc5": 99.9, "val/loss": 1.0 / (epoch + 1)}
        if measured:
            scores |= {"val/ema_acc1": 96.0 - 40 / (epoch + 1), "train/acc1_all": 99.0 - 60 / (epoch + 1)}
            scores |= {"cost/gpu_joules": 250.0 * total_s, "cost/gpu_idle_w": 71.5}
            scores |= {"cost/joules_saved": 0.8 * skipped / (NUM_SAMPLES * (epoch + 1))}
        rows.append({"kind": "epoch", "epoch": epoch + 1, **row, **scores, "perf/epoch_s": num_steps * 0.08})
    return rows


def write_run(
    run_dir: Path,
    epochs=30,
    epochs_done=14,
    state="finished",
    restarts=(),
    policy="sundew",
    measured=False,
    **progress,
):
    """Write metrics.jsonl, sessions.jsonl and progress.json.

    restarts: (session, restart, resumed_from_step) each. measured: as in `rows_of_a_run`. progress: its other fields.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = rows_of_a_run(epochs, epochs_done, policy=policy, measured=measured)
    starts = [{"session": 1, "restart": 0, "resumed_from_step": 0, "last_step_before": 0, "steps_repeated": 0}]
    for session, restart, step in restarts:
        start = {"session": session, "restart": restart, "resumed_from_step": step, "last_step_before": step + 11}
        starts.append(start | {"steps_repeated": 11, "checkpoint": f"step-{step:08d}"})
        starts.append({"session": session, "restart": restart, "event": "first_step", "recovery_s": 6.2})
    for name, lines in (("metrics.jsonl", rows), ("sessions.jsonl", starts)):
        (run_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = rows[-1] if rows else {}
    write_progress(
        run_dir,
        {
            "state": state,
            "epoch": epochs_done,
            "epochs": epochs,
            "step": last.get("global_step", 0),
            "best_acc1": last.get("val/acc1"),
            "last_acc1": last.get("val/acc1"),
            "sessions": max([1, *(session for session, _, _ in restarts)]),
            "restarts": sum(restart > 0 for _, restart, _ in restarts),
            "total_s": last.get("time/total_s", 0.0),
            "eta_s": 120.0,
            "checkpoint": "step-00000100" if rows else None,
            "checkpoint_at": "2026-01-01T00:00:00+00:00" if rows else None,
            "policy": policy,
            "run_dir": str(run_dir),
            "num_samples": NUM_SAMPLES,
            "message": "",
            **progress,
        },
    )
    return run_dir


@pytest.fixture
def make_run(tmp_path):
    """make_run(epochs=…, epochs_done=…, state=…, restarts=…, policy=…, measured=…) → the run's folder."""
    return lambda **options: write_run(tmp_path / "run", **options)


@pytest.fixture
def make_rows():
    """make_rows(epochs, epochs_done) → the rows of metrics.jsonl."""
    return rows_of_a_run
