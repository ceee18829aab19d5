"""Claims about the real notebook, run by nbclient in a mock of Kaggle's folders: session after session, in one cell."""

import base64
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ast_dist.fault.commit import committed
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.kaggle import ROOT_VARIABLE
from ast_dist.run_dir import checkpoints_path
from ast_dist.track.history import read
from ast_dist.train import main
from tests.kaggle_tree import tree
from tests.launching import ROOT
from tests.training import progress, state_hash, write_shards

FOLDER = ROOT / "launch" / "kaggle"
CALL = 'kaggle.run("imagenet-kaggle")'
SETTINGS = (
    "loop={'epochs': 3, 'global_batch_size': 16}, model={'width': 8}, data={'image_size': 8}, "
    "checkpoint={'every_steps': 0}"
)
WORDS = "--loop.epochs 3 --loop.global-batch-size 16 --model.width 8 --data.image-size 8 --checkpoint.every-steps 0"
STEPS_PER_EPOCH = 6


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel finds in its environment; nothing of this machine's user."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv(BEGAN_VARIABLE, raising=False)


def run_notebook(root: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Run the notebook's cells with another call in its last one, and no installation; returns that cell's outputs."""
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    notebook = nbformat.read(FOLDER / "ast_dist.ipynb", as_version=4)
    install, cell = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert install.source == "!pip install --quiet ast-dist"
    install.source = ""  # the package is this checkout
    assert cell.source.count(CALL) == 1
    cell.source = cell.source.replace(CALL, call)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(root / "working"))
    return cell.outputs


def printed(outputs: list[dict]) -> str:
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def shown(outputs: list[dict]) -> list[dict]:
    """What is displayed, in order, as it stands at the end."""
    return [output["data"] for output in outputs if output["output_type"] == "display_data"]


def test_the_notebook_ends_by_its_deadline_and_goes_on_from_its_output_to_the_state_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tree(tmp_path / "first"), tree(tmp_path / "second")
    write_shards(first / "input" / "tiny")
    run_dir = first / "working/runs/digits"

    # The deadline is past when the first step is done: the session ends after two.
    monkeypatch.setenv(BEGAN_VARIABLE, "1")
    outputs = run_notebook(
        first, f"kaggle.run('digits', hours=1, track={{'dashboard': False}}, {SETTINGS})", monkeypatch
    )

    ended = progress(run_dir)
    assert (ended["state"], ended["sessions"]) == ("paused", 1)
    assert 0 < ended["step"] < STEPS_PER_EPOCH, "in mid-epoch"
    text = printed(outputs)
    assert f"data       {first}/input/tiny (shards, 96 training images); nothing of it is copied" in text
    assert "run        " in text and "from the beginning: no checkpoint of it is attached" in text
    assert f"saved: epoch 0 of 3, step {ended['step']}" in text and "session deadline" in text
    assert "to keep it: its output once you choose Save Version" in text
    assert "/kaggle/working does not last by itself" in text
    place_of_the_picture, status = shown(outputs)
    assert place_of_the_picture == {"text/plain": "no dashboard yet"}
    assert "state       paused" in status["text/plain"] and "epoch       0 of 3" in status["text/plain"]

    monkeypatch.delenv(BEGAN_VARIABLE)

    # The next session: other forms of the mounts, and what was in working is attached, read-only.
    (second / "input/datasets/me").mkdir(parents=True)
    shutil.copytree(first / "input/tiny", second / "input/datasets/me/tiny")
    shutil.copytree(first / "working", second / "input/notebooks/me/ast-dist")
    for path in (second / "input").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    run_dir = second / "working/runs/digits"

    outputs = run_notebook(second, f"kaggle.run('digits', {SETTINGS})", monkeypatch)

    text = printed(outputs)
    attached = second / "input/notebooks/me/ast-dist/runs/digits"
    assert (
        f"run        {run_dir}, session 2, after" in text
        and f"from {attached}/checkpoints/{ended['checkpoint']}" in text
    )
    assert "which a run here was trained on" in text
    assert f"finished: epoch 3 of 3, step {progress(run_dir)['step']}" in text
    starts = [row for row in read(run_dir / "sessions.jsonl") if "event" not in row]
    assert [(row["session"], row["resumed_from_step"]) for row in starts] == [(1, 0), (2, ended["step"])]
    assert progress(run_dir)["total_s"] > ended["total_s"]
    picture, status = shown(outputs)
    assert base64.b64decode(picture["image/png"]) == (run_dir / "dashboard.png").read_bytes(), "the last one, in place"
    assert "state       finished" in status["text/plain"]
    assert committed(checkpoints_path(attached)), "the input is as it was"

    shards = first / "input/tiny"
    data = ["--data.train", str(shards / "train"), "--data.val", str(shards / "val"), "--track.no-dashboard"]
    assert main(["--preset", "digits", "--run-dir", str(tmp_path / "whole"), *data, *WORDS.split()]) == 0
    assert state_hash(run_dir) == state_hash(tmp_path / "whole")


def test_the_metadata_name_the_notebook_and_what_it_needs() -> None:
    metadata = json.loads((FOLDER / "kernel-metadata.json").read_text())
    assert (FOLDER / metadata["code_file"]).is_file()
    assert metadata["id"].partition("/")[2] == metadata["title"].lower().replace(" ", "-")
    assert (metadata["language"], metadata["kernel_type"], metadata["enable_gpu"]) == ("python", "notebook", "true")
    assert metadata["competition_sources"] == ["imagenet-object-localization-challenge"]


def test_the_notebook_is_valid_and_holds_no_output() -> None:
    notebook = nbformat.read(FOLDER / "ast_dist.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code][1] == f"from ast_dist import kaggle\n\n{CALL}"
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert any("--no-index --find-links /kaggle/input/" in cell.source for cell in notebook.cells)
