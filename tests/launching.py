"""Start the package's commands as people do: alone, or under torchrun."""

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120.0


def environment() -> dict[str, str]:
    """One thread a process, and none of an outer torchrun's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_")) and k != "RANK"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(
    *words: str,
    world_size: int = 0,
    max_restarts: int = 0,
    output: "IO[bytes] | int" = subprocess.PIPE,
    more: dict[str, str] | None = None,
) -> "subprocess.Popen[str]":
    """Start `python WORDS`, under torchrun where world_size is not 0. Its output goes to one pipe, or to a file.

    more: environment variables besides this process's.
    """
    launcher: list[str] = []
    if world_size:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        launcher += [f"--max-restarts={max_restarts}", "--monitor-interval=0.1"]
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | (more or {}),
        cwd=ROOT,
    )


def finish(process: "subprocess.Popen[str]", expected: int = 0, patience_s: float = PATIENCE_S) -> str:
    """Wait for a process and return its output; fail with that output when its exit code is another."""
    try:
        output, _ = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"not done within {patience_s:g} s:\n{output}") from None
    assert process.returncode == expected, f"exit code {process.returncode}, expected {expected}:\n{output}"
    return output


def wait_for(condition: Callable[[], Any], what: str, process: "subprocess.Popen[str]") -> Any:
    """Watch until `condition` gives something true, and return it. Fails when the process ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        if process.poll() is not None:
            found = condition()
            assert found, f"the process ended before {what}:\n{process.communicate()[0]}"
            return found
        time.sleep(0.001)  # a pause between looks, not a guess at how long something takes
    raise AssertionError(f"{what} did not happen within {PATIENCE_S:g} s")


def heartbeat(run_dir: Path) -> tuple[int, float]:
    """Steps that the run's heartbeat states, and when it last beat (seconds since 1970); zeros before the first."""
    try:
        raw = (run_dir / ".lease").read_bytes()[:16]
    except FileNotFoundError:
        return 0, 0.0
    return struct.unpack("<qd", raw) if len(raw) == 16 else (0, 0.0)


def steps_done(run_dir: Path) -> int:
    """Steps that the run's heartbeat states; 0 before the first."""
    return heartbeat(run_dir)[0]
