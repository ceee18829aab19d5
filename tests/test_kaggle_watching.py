"""Claims about watching a training on Kaggle: nothing that goes wrong in it stops the training; and about two GPUs."""

import os
import signal
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
from tests.launching import environment, finish, start, steps_done, wait_for
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


# The number of GPUs is a mock: the processes are real, and train on the CPU.
ON_TWO = (
    "import sys; from ast_dist import kaggle; kaggle.usable_gpus = lambda _: 2; sys.exit(kaggle.main(sys.argv[1:]))"
)


def test_two_processes_save_when_the_cell_is_stopped_and_one_goes_on_with_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(root / "input/shards")
    run_dir = root / "working/runs/digits"
    words = ["--data.image-size", "8", "--model.width", "8", "--loop.epochs", "500", "--track.no-dashboard"]
    cell = start("-c", ON_TWO, "digits", "--root", str(root), *words)
    wait_for(lambda: steps_done(run_dir) >= 3, "the third step", cell)
    cell.send_signal(signal.SIGINT)
    output = finish(cell)
    assert "GPUs       2, a process each" in output
    assert "stopping: the training saves and ends" in output
    stopped, who = progress(run_dir), identity(run_dir)
    assert (stopped["state"], stopped["checkpoint"]) == ("paused", f"step-{stopped['step']:08d}")
    assert f"saved: epoch {stopped['epoch']} of 500" in output
    assert "Save Version" in output and "Traceback" not in output

    monkeypatch.setenv(BEGAN_VARIABLE, "1")  # long over: it ends at once
    kaggle.run("digits", root=root, hours=1, words=words)
    assert progress(run_dir)["step"] > stopped["step"] and identity(run_dir) == who
    starts = [row for row in read(run_dir / "sessions.jsonl") if "event" not in row]
    assert [(row["world_size"], row["resumed_from_step"]) for row in starts] == [(2, 0), (1, stopped["step"])]
