"""A small training, its arguments, and what it left: for the tests of the training command."""

import json
from pathlib import Path

import pytest

from ast_dist.errors import run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.fault.state import hash_state
from ast_dist.train import main
from tests.shards import squares, write_split

NUM_SAMPLES = 96


def write_shards(folder: Path, num_samples: int = NUM_SAMPLES, num_val: int = 20) -> Path:
    """A train and a val split of 8 × 8 pixels."""
    write_split(folder / "train", squares(num_samples, side=8))
    write_split(folder / "val", squares(num_val, side=8))
    return folder


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("--run-dir", str(run_dir), "--data.train", str(shards / "train"), "--data.val", str(shards / "val")),
        *("--data.image-size", "8", "--data.crop", "padded", "--data.crop-pad-px", "1", "--model.name", "small_cnn"),
        *("--model.width", "8", "--optim.lr", "0.05", "--loop.epochs", "3", "--loop.global-batch-size", "16"),
        *("--checkpoint.every-s", "0", "--track.every-steps", "1", "--track.no-dashboard", *more),
    ]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must answer with one line and exit code 2; return the line."""
    capsys.readouterr()
    assert run_command(main, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def progress(run_dir: Path) -> dict:
    return json.loads((run_dir / "progress.json").read_text())


def state_hash(run_dir: Path) -> str:
    return hash_state(read(committed(run_dir / "checkpoints")[-1])[0])
