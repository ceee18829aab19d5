"""Claims about checkpoints in doubt: unread, copied by a person, another owner's, hanging. None is lost by mistake."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ast_dist.distributed import World
from ast_dist.fault import checkpoint as module
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.lease import LostLeaseError
from tests.states import fresh_state, saved, train


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


def test_a_disk_that_does_not_answer_is_no_damage(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    good = saved(checkpoints, state)
    train(state, 1)
    unread = saved(checkpoints, state)
    plain = commit._hash

    def failing(path: Path) -> str:
        """A mock of a disk: no file here can be made to fail with EIO."""
        if path.parent == unread:
            raise OSError(5, "Input/output error")
        return plain(path)

    monkeypatch.setattr(commit, "_hash", failing)
    with pytest.warns(RuntimeWarning, match="Input/output error.*left there, trying the one before"):
        assert Checkpoints(tmp_path, world, keep_last=3).find() == good
    assert unread.is_dir()


def test_one_whose_manifest_cannot_be_read_is_never_pruned(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=1), fresh_state()
    best = saved(checkpoints, state, 99.0)
    manifest = best / commit.MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b"99.0", b"98.0"))
    for _ in range(3):
        train(state, 1)
        saved(checkpoints, state, 50.0)
    assert best.is_dir()


def test_a_copy_that_a_person_made_is_no_checkpoint(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    saved(checkpoints, state)
    train(state, 1)
    newest = saved(checkpoints, state)
    shutil.copytree(tmp_path / "step-00000000", tmp_path / "step-00000000.bak")
    assert Checkpoints(tmp_path, world, keep_last=3).find() == newest


def test_who_lost_the_run_directory_removes_nothing_there(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    theirs = commit.stage_path(tmp_path, "step-00000000") / "of-the-new-owner"

    def lost() -> None:
        theirs.parent.mkdir(exist_ok=True)
        theirs.touch()
        raise LostLeaseError("another process trains here now")

    checkpoints.fence = lost
    with pytest.raises(LostLeaseError):
        saved(checkpoints, state)
    assert theirs.exists()


def test_an_unsound_checkpoint_of_the_same_step_is_replaced(world: World, tmp_path: Path) -> None:
    state = fresh_state()
    path = saved(Checkpoints(tmp_path, world, keep_last=3), state)
    (path / "state.json").write_text("{}")
    assert saved(Checkpoints(tmp_path, world, keep_last=3), state) == path
    commit.verify(path)
    assert len(commit.set_aside(tmp_path)) == 1


def test_a_save_that_hangs_ends_the_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, released = Checkpoints(tmp_path, world, keep_last=3), threading.Event()
    monkeypatch.setattr(module, "_TOLD_AFTER_S", 0.1)
    monkeypatch.setattr(module, "_HANGS_AFTER_S", 0.2)
    checkpoints.fence = lambda: bool(released.wait()) and None
    checkpoints.save(fresh_state())
    with (
        pytest.warns(RuntimeWarning, match=r"takes more than 0\.1 s"),
        pytest.raises(RuntimeError, match="step-00000000 hangs"),
    ):
        checkpoints.wait()
    released.set()
    ended: Any = checkpoints.wait()
    assert ended == tmp_path / "step-00000000"


def test_what_was_committed_and_could_not_be_flushed_is_saved_with_a_remark_and_removes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=1), fresh_state()
    older = saved(checkpoints, state)
    train(state, 1)
    plain = commit._fsync

    def failing(path: Path) -> None:
        """A mock of a disk: no folder here can be made to fail with EIO."""
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        plain(path)

    monkeypatch.setattr(commit, "_fsync", failing)
    with pytest.warns(RuntimeWarning, match="cannot be flushed .*Input/output error"):
        newest = saved(checkpoints, state)
    assert checkpoints.newest == newest.name == "step-00000001"
    assert older.is_dir()


def test_what_reads_back_otherwise_than_it_was_hashed_is_no_checkpoint_and_the_one_before_stands(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=1), fresh_state()
    older = saved(checkpoints, state)
    assert checkpoints.verified_at is not None
    train(state, 1)
    plain = commit.commit

    def lying(stage: Path, final: Path, *arguments: Any) -> None:
        """A mock of a disk: no disk here forgets what it was given."""
        plain(stage, final, *arguments)
        (final / "state.json").write_text("{}")

    monkeypatch.setattr(commit, "commit", lying)
    checkpoints.save(state)
    with pytest.warns(RuntimeWarning, match=r"state\.json: 2 bytes, but .* moved to \.corrupt-step-00000001-0"):
        assert checkpoints.wait() is None
    assert Checkpoints(tmp_path, world, keep_last=1).find() == older
