"""data_prep.make_shards where the disk or another run is in its way: one line, and nothing half-made."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ast_dist.errors import UserError
from data_prep import destination, make_shards
from tests.test_make_shards import convert, refusal, write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "images"
    return root, write_tree(root)


def test_a_conversion_that_is_refused_before_its_first_shard_leaves_nothing(tmp_path):
    (tmp_path / "src" / "cat").mkdir(parents=True)
    (tmp_path / "src" / "cat" / "a.jpg").mkdir()
    (tmp_path / "src" / "cat" / "b.jpg").symlink_to("/proc/self/mem")  # a file, and not one byte of it can be read
    assert "b.jpg: cannot be read (" in refusal(tmp_path / "src", tmp_path / "new" / "dst")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def fill(disk, leave):
    free = os.statvfs(disk).f_frsize * os.statvfs(disk).f_bavail
    (disk / "filler").write_bytes(bytes(free - leave))


@pytest.mark.parametrize("free", [0, 4096, 8192, 16384])
@pytest.mark.parametrize("options", [[], ["--index-only"], ["--index-only", "--check-files"]])
def test_a_disk_that_fills_up_anywhere_is_told_in_one_line(tree, small_disk, monkeypatch, options, free):
    monkeypatch.setattr(make_shards, "_refuse_full_disk", lambda *_: None)  # as if another program took the room
    fill(small_disk, free)
    with pytest.raises(UserError) as caught:
        make_shards.main([str(tree[0]), str(small_disk / "dst"), "--split=train", "--workers=1", *options])
    assert re.search(r"the disk is full|bytes, but|No space left", str(caught.value))
    assert len(str(caught.value).splitlines()) == 1
    assert not (small_disk / "dst").exists()


def test_numpys_own_way_of_saying_that_the_disk_is_full_is_understood(tree, tmp_path, monkeypatch):
    def fails(*_):
        with Path("/dev/full").open("wb", buffering=0) as file:
            np.save(file, np.zeros(100_000))

    monkeypatch.setattr(make_shards, "write_index", fails)
    assert "the disk is full (" in refusal(tree[0], tmp_path)
    monkeypatch.undo()
    assert convert(tree[0], tmp_path) == 0


def test_a_run_that_waited_says_that_the_set_is_finished_though_the_other_removed_the_state(tmp_path, monkeypatch):
    def finished_by_another(folder):
        shutil.rmtree(folder / ".unfinished")
        raise UserError("holds a finished set already")

    monkeypatch.setattr(destination, "refuse_finished", finished_by_another)
    with pytest.raises(UserError, match="finished set already"), destination.held_alone(tmp_path, ".unfinished"):
        pass
