"""Exact resume: a run that is killed in mid-epoch and goes on, against one that never stopped.

Both are real commands in processes of their own, in deterministic mode. What is compared is the SHA-256 of all state
in the last checkpoint: weights, optimizer, gate, counters, random states.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ast_dist.data.index import Index
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import read
from ast_dist.fault.state import hash_state
from benchmarks.result import ROOT
from benchmarks.training_step import Workload

_EPOCHS = 3
_POLL_S = 0.02


def exact_resume(
    folder: Path, workload: Workload, train: Index, val: Index, batch_size: int, timeout_s: float
) -> dict[str, Any]:
    """Run both and compare. Returns a row; `identical` is the finding.

    The run has one full epoch and two that the gate thins to half; it is killed (SIGKILL) in the second, right after
    a checkpoint, so that the gate's plan of a half-done epoch is part of what must come back.
    Raises RuntimeError when a process fails or takes longer than timeout_s.
    """
    deadline = time.monotonic() + timeout_s
    began = time.monotonic()
    full_steps = -(-train.num_samples // batch_size)
    stop_step = full_steps + 2
    arguments = [
        *("--data.train", str(train.root), "--data.val", str(val.root), "--data.image-size", str(workload.image_px)),
        *("--model.name", workload.model, "--model.width", str(workload.width)),
        *("--loop.epochs", str(_EPOCHS), "--loop.global-batch-size", str(batch_size), "--loop.eval-every-epochs", "3"),
        *("--loop.precision", "bf16", "--loop.deterministic", "--gate.warmup-epochs", "1", "--gate.anneal-share", "0"),
        *("--gate.target-rate", "0.5", "--checkpoint.every-s", "0", "--track.no-dashboard", "--track.every-steps", "1"),
    ]
    unbroken, broken = folder / "unbroken", folder / "broken"
    # The unbroken run saves between epochs only: saving must not change what is trained.
    saving = [*arguments, "--checkpoint.every-steps", "1", "--checkpoint.keep-last", "1000"]
    with ExitStack() as children:
        reference = children.enter_context(_child(unbroken, arguments))
        first = children.enter_context(_child(broken, saving))
        _kill_at(first, broken, stop_step, deadline)
        resumed = children.enter_context(_child(broken, [*saving, "--resume", "must"]))
        _finish(resumed, broken, deadline)
        _finish(reference, unbroken, deadline)
    (last_reference, hash_reference), (last_resumed, hash_resumed) = _last_state(unbroken), _last_state(broken)
    return {
        "model": workload.model,
        "image_px": workload.image_px,
        "batch_size": batch_size,
        "precision": "bf16",
        "policy": "sundew",
        "epochs": _EPOCHS,
        "steps": last_reference["global_step"],
        "full_epoch_steps": full_steps,
        "resumed_from_step": _resumed_from(broken),
        "resumed_steps": last_resumed["global_step"],
        "identical": hash_reference == hash_resumed,
        "sha256": hash_reference,
        "sha256_resumed": hash_resumed,
        "wall_s": time.monotonic() - began,
    }


@contextlib.contextmanager
def _child(run_dir: Path, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A training process whose output goes to RUN.log; it does not outlive the block."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ast_dist.train", "--run-dir", str(run_dir), *arguments]
    with _log(run_dir).open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _kill_at(process: subprocess.Popen[bytes], run_dir: Path, step: int, deadline: float) -> None:
    """Kill the process once it has committed the checkpoint of `step`, and leave that one as the newest."""
    wanted = run_dir / "checkpoints" / f"step-{step:08d}"
    while not wanted.is_dir():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no checkpoint of step {step} in time: {_last_lines(run_dir)}")
        time.sleep(_POLL_S)
    process.kill()
    process.wait()
    # It may have run on before the signal reached it; what it saved then would move the interruption.
    for checkpoint in commit.committed(run_dir / "checkpoints"):
        if checkpoint.name > wanted.name:
            shutil.rmtree(checkpoint)


def _finish(process: subprocess.Popen[bytes], run_dir: Path, deadline: float) -> None:
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a run did not end in time: {_last_lines(run_dir)}") from None
    if code:
        raise RuntimeError(f"a run ended with exit code {code}: {_last_lines(run_dir)}")


def _last_state(run_dir: Path) -> tuple[dict[str, Any], str]:
    """The state in a run's newest checkpoint, and its SHA-256."""
    state, _ = read(commit.committed(run_dir / "checkpoints")[-1])
    return state, hash_state(state)


def _resumed_from(run_dir: Path) -> int:
    rows = [json.loads(line) for line in (run_dir / "sessions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [int(row["resumed_from_step"]) for row in rows if "resumed_from_step" in row][-1]


def _log(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def _last_lines(run_dir: Path) -> str:
    return " / ".join(_log(run_dir).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:])
