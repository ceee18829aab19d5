"""Checkpoints become versions of an artifact, whatever retention removes meanwhile.

A server that takes artifacts cannot run here: `MockRun` stands in for W&B's run where a claim is about what is sent
when. What an offline run records is tested with W&B itself, in test_wandb_training.py.
"""

import shutil
import threading
from pathlib import Path

import pytest

from ast_dist.track.wandb_artifact import CheckpointArtifact


class MockRun:
    """Takes artifacts as W&B's run does; an upload ends when it is told to."""

    id = "mock"

    def __init__(self):
        self.logged = []
        self.ends = threading.Event()
        self.error = None

    def log_artifact(self, artifact, aliases):
        self.logged.append((artifact, aliases))
        return self

    def wait(self):
        assert self.ends.wait(20)
        if self.error:
            raise self.error

    @property
    def sent(self):
        return [(artifact.metadata["name"], aliases) for artifact, aliases in self.logged]


@pytest.fixture
def checkpoint(tmp_path):
    def make(name):
        folder = tmp_path / "run" / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__0_0.distcp").write_bytes(name.encode() * 100)
        (folder / "manifest.json").write_text(name)
        return folder

    return make


def make_artifact(tmp_path, run, is_online=True, now=lambda: 0.0):
    said = []
    (tmp_path / "run").mkdir(exist_ok=True)
    return CheckpointArtifact(tmp_path / "run", run, is_online, said.append, now), said


def test_a_new_best_is_sent_once_in_ten_minutes_one_at_a_time(tmp_path, checkpoint):
    run, now = MockRun(), [0.0]
    artifact, said = make_artifact(tmp_path, run, now=lambda: now[0])
    first, second, third = (checkpoint(f"step-0000000{number}") for number in (1, 2, 3))
    artifact.note(first, first)
    artifact.note(second, first)  # no new best
    now[0] = 700.0
    artifact.note(second, second)  # the first is still on its way
    assert run.sent == [("step-00000001", ["best"])]
    run.ends.set()
    artifact._sending.join()
    now[0] = 500.0
    artifact.note(third, third)  # too soon
    assert run.sent == [("step-00000001", ["best"])]
    now[0] = 1400.0
    artifact.note(third, third)
    artifact._sending.join()
    assert run.sent[1:] == [("step-00000003", ["best"])]
    assert said == [] and list((tmp_path / "run" / "wandb" / "checkpoints").iterdir()) == []


def test_a_finished_run_ends_with_its_best_and_its_last(tmp_path, checkpoint):
    best, last = checkpoint("step-00000001"), checkpoint("step-00000002")
    run = MockRun()
    artifact, _ = make_artifact(tmp_path, run, is_online=False)
    artifact.note(best, best)
    artifact.note(last, best)
    assert run.sent == [], "offline, nothing is sent meanwhile"
    artifact.finish()
    assert run.sent == [("step-00000001", ["best"]), ("step-00000002", ["latest"])]
    same = MockRun()
    artifact, _ = make_artifact(tmp_path, same, is_online=False)
    artifact.note(last, last)
    artifact.finish()
    assert same.sent == [("step-00000002", ["best", "latest"])]


def test_what_is_to_be_sent_outlives_the_checkpoint(tmp_path, checkpoint):
    run = MockRun()
    artifact, _ = make_artifact(tmp_path, run)
    best = checkpoint("step-00000001")
    artifact.note(best, best)
    shutil.rmtree(best)
    (logged, _), *_ = run.logged
    files = {name: Path(entry.local_path).read_bytes() for name, entry in logged.manifest.entries.items()}
    assert files == {"__0_0.distcp": b"step-00000001" * 100, "manifest.json": b"step-00000001"}
    run.ends.set()


def test_a_checkpoint_that_is_gone_already_is_passed_over(tmp_path, checkpoint):
    run = MockRun()
    artifact, said = make_artifact(tmp_path, run)
    gone = checkpoint("step-00000001")
    shutil.rmtree(gone)
    artifact.note(gone, gone)
    assert run.sent == [] and said == []


def test_a_server_that_refuses_is_told_once_and_not_asked_again(tmp_path, checkpoint):
    run, now = MockRun(), [0.0]
    run.error = ValueError("quota exceeded\nmore")
    run.ends.set()
    artifact, said = make_artifact(tmp_path, run, now=lambda: now[0])
    for number in (1, 2):
        now[0] += 1000.0
        best = checkpoint(f"step-0000000{number}")
        artifact.note(best, best)
        artifact._sending.join()
    artifact.finish()
    assert len(run.sent) == 1
    assert said == ["no checkpoints are logged from here on (ValueError: quota exceeded"]
