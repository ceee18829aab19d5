"""Claims about a disk that is full: told with both numbers, outlived for a while, and never at the cost of what stood.

The disk is a tmpfs of a few megabytes, which only root may mount.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ast_dist.fault import commit
from ast_dist.fault.checkpoint import read
from tests.faults.harness import Run, words

DISK_MB = 8
LEFT_BYTES = 64 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    # Lazily: a process of the run may still be on its way out.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room but a little, which rows and the heartbeat may need; returns what takes it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - LEFT_BYTES)
    return ballast


def bytes_told(output: str) -> list[tuple[int, int]]:
    """Needed and free bytes in each line that tells of a save that was refused."""
    lines = [line for line in output.splitlines() if "was not saved" in line]
    found = [re.search(r"it needs ([\d,]+) bytes, (?:but|and) ([\d,]+) are free", line) for line in lines]
    assert all(found), lines
    return [tuple(int(number.replace(",", "")) for number in match.groups()) for match in found]


def test_a_full_disk_is_told_in_numbers_and_training_goes_on_until_the_third_refusal(
    shards: Path, tmp_path: Path, disk: Path
) -> None:
    run_dir = disk / "run"
    with Run(words(shards, run_dir, "--track.every-steps", "1000"), world_size=2, log=tmp_path / "log") as run:
        run.wait_until(lambda: len(commit.committed(run_dir / "checkpoints")) >= 2, "checkpoints")
        step = run.step
        fill(disk)
        code = run.end()
        output = run.output
    assert code != 0
    assert "failure 3 in a row" in output
    assert run.step > step, "training went on"
    assert len(told := bytes_told(output)) >= 3
    assert all(free <= 2 * LEFT_BYTES < needed for needed, free in told)
    newest = commit.committed(run_dir / "checkpoints")[-1]
    read(newest)  # raises where it does not verify
    assert f"the last good one is {newest.name}" in output


def test_once_there_is_room_again_it_saves_again_and_ends_well(shards: Path, tmp_path: Path, disk: Path) -> None:
    run_dir = disk / "run"
    with Run(words(shards, run_dir, "--track.every-steps", "1000"), world_size=2, log=tmp_path / "log") as run:
        run.wait_until(lambda: len(commit.committed(run_dir / "checkpoints")) >= 2, "checkpoints")
        ballast = fill(disk)
        before = commit.committed(run_dir / "checkpoints")[-1].name
        run.wait_until(lambda: "was not saved" in run.output, "a refusal")
        ballast.unlink()
        run.wait_until(lambda: commit.committed(run_dir / "checkpoints")[-1].name > before, "a checkpoint after it")
        run.finish()
    assert run.progress()["state"] == "finished"
    read(commit.committed(run_dir / "checkpoints")[-1])
