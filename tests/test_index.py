"""ast_dist/data/index.py: what is opened is whole, and what is not says so in one line."""

import hashlib
import json

import numpy as np
import pytest

from ast_dist.data.index import FIELDS, Index, field_path, replaced_file, write_index, write_manifest
from ast_dist.errors import UserError


@pytest.fixture
def split(tmp_path):
    """A finished split of 5 samples in 2 shards of 100 and 50 bytes (of zeros: opening reads no image)."""
    root = tmp_path / "train"
    root.mkdir()
    for name, size in (("train-000000.tar", 100), ("train-000001.tar", 50)):
        (root / name).write_bytes(bytes(size))
    fields = {name: np.arange(5) for name in FIELDS} | {"shard": np.array([0, 0, 0, 1, 1])}
    write_index(root, fields, [b"00-a", b"01-bb", b"02-c", b"03-d", b"04-e"])
    shards = [
        {"name": "train-000000.tar", "bytes": 100, "samples": 3, "sha256": "0" * 64},
        {"name": "train-000001.tar", "bytes": 50, "samples": 2, "sha256": "1" * 64},
    ]
    write_manifest(root, {"format_version": 1, "num_samples": 5, "classes": ["cat", "dog"], "shards": shards})
    return root


def change_manifest(root, **changes):
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(root):
    with pytest.raises(UserError) as caught:
        Index.open(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_what_is_opened(split):
    index = Index.open(str(split))
    assert (index.num_samples, index.num_classes) == (5, 2)
    assert index.shard_paths == [split / "train-000000.tar", split / "train-000001.tar"]
    assert index.key(1) == "01-bb"
    assert index.hash == hashlib.sha256((split / "manifest.json").read_bytes()).hexdigest()
    for name, dtype in FIELDS.items():
        field = getattr(index, name)
        assert isinstance(field, np.memmap)
        assert field.dtype == dtype
    assert index.shard.tolist() == [0, 0, 0, 1, 1]
    assert index.offset.tolist() == [0, 1, 2, 3, 4]


def test_missing_folder_names_the_command_that_makes_it(tmp_path):
    assert "no such folder" in message(tmp_path / "train")
    assert "data_prep.make_shards" in message(tmp_path / "train")


def test_missing_manifest_is_refused(split):
    (split / "manifest.json").unlink()
    assert "no manifest.json" in message(split)


def test_folder_of_splits_names_the_split(split):
    assert f"Did you mean {split}?" in message(split.parent)


def test_missing_shard_names_itself(split):
    (split / "train-000001.tar").unlink()
    assert "train-000001.tar: shard 2 of 2 is missing" in message(split)


def test_shorter_shard_is_told_with_both_sizes(split):
    (split / "train-000000.tar").write_bytes(bytes(99))
    text = message(split)
    assert "train-000000.tar" in text
    assert "99 bytes" in text
    assert "100" in text


@pytest.mark.parametrize("name", [*FIELDS, "keys"])
def test_wrong_row_count_is_told_with_both_numbers(split, name):
    path = field_path(split, name)
    np.save(path, np.load(path)[:3])
    text = message(split)
    assert f"{name}.npy: 3 rows" in text
    assert "states 5" in text


@pytest.mark.parametrize("name", [*FIELDS, "keys"])
def test_wrong_type_is_refused(split, name):
    np.save(field_path(split, name), np.zeros(5, np.float32))
    assert f"{name}.npy: values are float32" in message(split)


def test_missing_and_broken_field_are_refused(split):
    field_path(split, "label").write_bytes(b"")
    assert "label.npy: cannot be read" in message(split)
    field_path(split, "label").unlink()
    assert "label.npy: cannot be read" in message(split)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b"{}", b'{"format_version": "x"}', b'{"format_version": 1, "shards": 3}']
)
def test_broken_manifest_is_refused(split, raw):
    (split / "manifest.json").write_bytes(raw)
    assert "not a manifest" in message(split)


def test_manifest_without_checksums_or_classes_is_refused(split):
    change_manifest(split, classes=[])
    assert "not a manifest" in message(split)
    change_manifest(split, classes=["cat"], shards=[{"name": "train-000000.tar", "bytes": 100, "samples": 5}])
    assert "not a manifest" in message(split)


def test_newer_format_is_refused(split):
    change_manifest(split, format_version=3)
    assert "format 3, but this ast_dist reads up to 2" in message(split)


def test_manifest_that_contradicts_itself_is_refused(split):
    change_manifest(split, num_samples=6)
    assert "6 samples, but its shards hold 5" in message(split)


def test_writer_refuses_an_incomplete_index(tmp_path):
    with pytest.raises(ValueError, match="fields are"):
        write_index(tmp_path, {"label": np.zeros(1)}, [b"a"])


def test_replaced_file_leaves_the_old_content_and_no_temporary_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with replaced_file(path) as file:
            file.write(b"new")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with replaced_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
