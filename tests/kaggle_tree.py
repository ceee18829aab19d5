"""A mock of Kaggle's folders: /kaggle as a notebook finds it, below a temporary folder."""

from pathlib import Path

import yaml

from ast_dist.command_line import parse
from ast_dist.config import Config
from ast_dist.fault import commit
from ast_dist.run_dir import fingerprint

MANIFESTS = {"train": "a" * 64, "val": "b" * 64}
# The forms in which attached things have been mounted.
FORMS = ("{slug}", "datasets/me/{slug}", "competitions/{slug}", "notebooks/me/{slug}")


def tree(root: Path) -> Path:
    """An empty session. Returns its root."""
    (root / "input").mkdir(parents=True)
    (root / "working").mkdir()
    return root


def digits(*words: str) -> Config:
    """A configuration of the preset digits."""
    return parse(["--preset", "digits", "--run-dir=r", "--data.train=t", "--data.val=v", *words], "test")


def wanted(*words: str) -> dict:
    """What a run of such a configuration must not change."""
    return fingerprint(digits(*words), MANIFESTS)


def write_run(folder: Path, *steps: int, words: tuple[str, ...] = (), acc1: dict[int, float] | None = None) -> Path:
    """A run that was saved at some steps, with checkpoints of a few bytes. acc1: validation accuracy by step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(wanted(*words)))
    (folder / "metrics.jsonl").write_text('{"kind": "step"}\n')
    (folder / "sessions.jsonl").write_text('{"session": 1}\n{"session": 2}\n{"session": 2, "event": "first_step"}\n')
    (folder / "progress.json").write_text('{"state": "paused"}')
    (folder / ".lease").write_bytes(bytes(16))
    for step in steps:
        name = f"step-{step:08d}"
        stage = commit.new_stage(folder / "checkpoints", name)
        (stage / "tensors").write_bytes(f"weights of {folder.name} at {step}".encode())
        about = {"step": step, "val_acc1": (acc1 or {}).get(step), "total_s": 10.0 * step}
        commit.commit(stage, folder / "checkpoints" / name, about)
    return folder


def damage(checkpoint: Path) -> None:
    """Change a byte of a checkpoint."""
    path = checkpoint / "tensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])
