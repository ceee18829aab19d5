"""Claims about watching a training on Kaggle: nothing that goes wrong in it stops the training; and about two GPUs."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ast_dist import kaggle
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.fault.lease import Lease
from ast_dist.kaggle_training import Training
from ast_dist.kaggle_view import PlainView, Watch, tell
from ast_dist.run_dir import identity
from ast_dist.track.history import read
from tests.kaggle_tree import tree
from tests.launching import environment
from tests.training import progress, write_shards

# A training without torch: it waits until its log is gone, or does not wait.
STUB = """
import sys, time
from pathlib import Path
print("begun", flush=True)
while len(sys.argv) > 1 and Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("done", flush=True)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(BEGAN_VARIABLE, raising=False)
    monkeypatch.setattr(kaggle, "probe_gpus", lambda: [])
    return tree(tmp_path / "kaggle")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path / "runs" / "digits.log"


def training(log: Path, *words: str) -> Training:
    return Training([sys.executable, str(log.parent.parent / "stub.py"), *words], log, time.time(), {})


class Tidier:
    """A view that notes the lines, and deletes the log once there are some."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.seen: list[str] = []

    def lines(self, lines: Sequence[str]) -> None:
        self.seen += lines
        if lines:
            self._log.unlink(missing_ok=True)

    def refresh(self, is_last: bool = False) -> None:
        pass


class BrokenView:
    """A view in which everything fails."""

    def lines(self, lines: Sequence[str]) -> None:
        raise ZeroDivisionError

    def refresh(self, is_last: bool = False) -> None:
        raise ZeroDivisionError


def test_a_log_that_is_deleted_stops_no_training_and_its_lines_still_come(log: Path) -> None:
    view = Tidier(log)
    assert training(log, str(log)).attend(view, tell) == 0
    assert view.seen == ["begun", "done"]


def test_a_view_that_fails_is_one_warning(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training(log).attend(BrokenView(), tell) == 0
    assert capsys.readouterr().err == "warning: not shown (ZeroDivisionError()). The training goes on.\n"


def closed_pipe() -> int:
    """A file descriptor to write to that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_an_output_that_nobody_reads_stops_no_training(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = os.fdopen(closed_pipe(), "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        code = training(log).attend(Watch(PlainView(), lambda: None), tell)
        tell("saved")
    with pytest.raises(BrokenPipeError):
        output.close()
    assert code == 0


def test_an_output_that_nobody_reads_is_no_failure_of_the_command(root: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ast_dist.kaggle", "digits", "--root", str(root)],
        stdout=closed_pipe(),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        check=False,
    )
    [line] = ended.stderr.splitlines()
    assert "no data set is attached" in line and ended.returncode == 2


def test_too_much_in_working_is_one_warning_within_a_minute(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, is_full = [0.0], [False]
    watch = Watch(PlainView(), lambda: "20.1 GB are here" if is_full[0] else None, clock=lambda: now[0])

    def said(after_s: float) -> str:
        now[0] += after_s
        watch.refresh()
        return capsys.readouterr().out

    assert said(60) == ""
    is_full[0] = True
    assert said(59) == "", "looking takes time, too"
    assert said(1) == "warning: 20.1 GB are here\n"
    assert said(60) == ""


def test_a_training_under_another_name_is_not_joined_on_its_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(root / "input/shards")
    monkeypatch.setattr(kaggle, "_PREDECESSOR_PATIENCE_S", 0.0)
    other = root / "working/runs/other"
    other.mkdir(parents=True)
    (root / "working/runs/other.log").touch()
    lease = Lease(other)
    with pytest.raises(kaggle.KaggleError, match=r"runs/other: another process trains here"):
        kaggle.run("digits", root=root)
    lease.release()
    with pytest.raises(kaggle.KaggleError, match="resume='must'"):
        kaggle.run("digits", root=root, resume="must")


def test_two_processes_and_then_one_go_on_with_the_same_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs are a mock: the processes are real, and train on the CPU."""
    write_shards(root / "input/shards")
    run_dir = root / "working/runs/digits"

    def session(gpus: int, began: float) -> None:
        monkeypatch.setattr(kaggle, "usable_gpus", lambda _: gpus)
        monkeypatch.setenv(BEGAN_VARIABLE, f"{began}")
        kaggle.run(
            "digits",
            root=root,
            hours=1,
            loop={"epochs": 2, "global_batch_size": 16},
            model={"width": 8},
            data={"image_size": 8},
            track={"dashboard": False},
        )

    session(gpus=2, began=1.0)  # long over: it ends in mid-epoch
    first, who = progress(run_dir), identity(run_dir)
    assert (first["state"], first["sessions"]) == ("paused", 1)
    session(gpus=1, began=time.time())
    now = progress(run_dir)
    assert (now["state"], now["sessions"], identity(run_dir)) == ("finished", 2, who)
    starts = [row for row in read(run_dir / "sessions.jsonl") if "event" not in row]
    assert [row["world_size"] for row in starts] == [2, 1]
    assert starts[1]["resumed_from_step"] == first["step"] > 0
