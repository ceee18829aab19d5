"""Runs to report on, whose names are markup, and the report that the command writes."""

import json
from pathlib import Path

import numpy as np

from ast_dist.data.index import field_path
from ast_dist.errors import run_command
from ast_dist.report import main
from ast_dist.train import main as train
from tests.training import words, write_shards

HOSTILE = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
GUARD = ("--gate.hard-tail-share", "0.2", "--gate.hard-tail-visits", "2", "--gate.anneal-share", "0")


def write_hostile_shards(folder: Path) -> Path:
    """A train and a val split whose samples' keys are markup."""
    write_shards(folder)
    path = field_path(folder / "train", "keys")
    keys = [key + HOSTILE.encode() for key in np.load(path).tolist()]
    np.save(path, np.array(keys, np.bytes_))
    return folder


def train_two(shards: Path, folder: Path) -> Path:
    """Two finished runs whose classes' names are markup: `gated`, which watches for wrong labels, and `full`."""
    gated = words(shards, folder / "gated", "--loop.epochs", "5", "--optim.ema-decay", "0.9", *GUARD)
    for argv in (gated, words(shards, folder / "full", "--gate.policy", "full", "--seed", "1")):
        assert run_command(train, argv) == 0
    for run_dir in folder.iterdir():
        (run_dir / "classes.json").write_text(json.dumps([f"{HOSTILE} {number}" for number in range(10)]))
    return folder


def written(*argv: str | Path) -> str:
    """The report that these arguments write."""
    words = [str(word) for word in argv]
    assert run_command(main, words) == 0
    path = Path(words[words.index("--out") + 1]) if "--out" in words else Path(words[0]) / "report.html"
    return path.read_text(encoding="utf-8")
