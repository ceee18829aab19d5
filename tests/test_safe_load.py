"""Claims about checkpoints that strangers made: nothing of theirs runs, and nothing grows past its file."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata

from ast_dist.distributed import World
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints, read
from ast_dist.fault.commit import DamagedCheckpointError
from ast_dist.fault.contents import STATE_NAME
from ast_dist.fault.safe_load import METADATA_NAME, _Unpickler
from tests.states import fresh_state, saved

NAME = "model/0.weight"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


@pytest.fixture
def checkpoint(world: World, tmp_path: Path) -> Path:
    path = saved(Checkpoints(tmp_path / "checkpoints", world, keep_last=3), fresh_state())
    assert path is not None
    return path


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def recommit(checkpoint: Path) -> None:
    """Make the manifest agree with the files again, as a stranger would who made the checkpoint."""
    stage = checkpoint.with_name("stage-x")
    checkpoint.rename(stage)
    (stage / commit.MANIFEST_NAME).unlink()
    commit.commit(stage, checkpoint, {"step": 0})


def rewrite(checkpoint: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the metadata, and commit it anew."""
    path = checkpoint / METADATA_NAME
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    recommit(checkpoint)


def item_of(metadata: Metadata, name: str = NAME) -> Any:
    """Where the tensor lies."""
    [found] = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    return found


def replace_item(checkpoint: Path, content: bytes, name: str = NAME) -> None:
    """Store these bytes for a tensor."""
    (checkpoint / "__9_0.distcp").write_bytes(content)

    def change(metadata: Metadata) -> None:
        info = item_of(metadata, name)
        info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(content)

    rewrite(checkpoint, change)


def as_stored(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_a_rewritten_checkpoint_that_was_not_changed_is_read(checkpoint: Path) -> None:
    before, _ = read(checkpoint)
    rewrite(checkpoint, lambda metadata: None)
    replace_item(checkpoint, as_stored(before["model"]["0.weight"]))
    after, _ = read(checkpoint)
    assert torch.equal(after["model"]["0.weight"], before["model"]["0.weight"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [open, os.mkdir, eval, __import__, os.system])
def test_hostile_metadata_is_refused_and_does_not_run(
    checkpoint: Path, tmp_path: Path, function: Any, protocol: int
) -> None:
    trace = tmp_path / "it-ran"
    argument = {eval: f"open({str(trace)!r}, 'w')", os.system: f"touch {trace}"}.get(function, str(trace))
    arguments = (argument, "w") if function is open else (argument,)
    (checkpoint / METADATA_NAME).write_bytes(pickle.dumps(Calls(function, *arguments), protocol))
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match="is not allowed"):
        read(checkpoint)
    assert not trace.exists()


def test_a_hostile_call_inside_of_honest_metadata_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    rewrite(checkpoint, lambda metadata: setattr(metadata, "planner_data", Calls(os.mkdir, str(trace))))
    with pytest.raises(DamagedCheckpointError, match=r"posix\.mkdir is not allowed"):
        read(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("owner", "name"), [("Metadata", "__init__"), ("_MEM_FORMAT_ENCODING", "__init__"), ("_MEM_FORMAT_ENCODING", "mro")]
)
def test_getattr_in_metadata_reaches_one_enums_members_and_nothing_else(
    checkpoint: Path, owner: str, name: str
) -> None:
    pickled = f"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n{owner}\nV{name}\ntR."
    (checkpoint / METADATA_NAME).write_bytes(pickled.encode())
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"getattr.* is not allowed"):
        read(checkpoint)


@pytest.mark.parametrize("name", list(_MEM_FORMAT_ENCODING.__members__))
def test_an_enum_member_pickled_by_getattr_is_read(name: str) -> None:
    pickled = f"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nV{name}\ntR."
    assert _Unpickler(io.BytesIO(pickled.encode())).load() is _MEM_FORMAT_ENCODING[name]


def test_metadata_cannot_change_the_classes_it_names(checkpoint: Path) -> None:
    # BUILD with (None, {"version": 7}) on the class, not on an object of it.
    (checkpoint / METADATA_NAME).write_bytes(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dVversion\nI7\nstb."
    )
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"setting attributes of .* is not allowed"):
        read(checkpoint)
    assert Metadata({}).version is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"garbage", b"(" * 5000, b"\x80\x04]" + b"]" * 100_000, b"\x8e" + b"\xff" * 7 + b"\x0f", b"N."],
    ids=["empty", "cut", "garbage", "marks", "nested", "eight exabytes", "none"],
)
def test_metadata_that_is_no_metadata_is_damaged_and_costs_nothing(checkpoint: Path, content: bytes) -> None:
    (checkpoint / METADATA_NAME).write_bytes(content)
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=METADATA_NAME):
        read(checkpoint)


def test_an_object_that_is_no_tensor_is_refused_since_torch_would_unpickle_it_freely(checkpoint: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[NAME] = BytesStorageMetadata()

    rewrite(checkpoint, change)
    with pytest.raises(DamagedCheckpointError, match=r"0\.weight is a BytesStorageMetadata: only tensors are read"):
        read(checkpoint)


def test_a_tensor_that_unpickles_to_a_call_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    replace_item(checkpoint, as_stored(Calls(os.mkdir, str(trace))))
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        read(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", "sub/x.distcp", "..", "", "link.distcp", "state"])
def test_tensors_are_read_from_the_checkpoints_own_files_only(checkpoint: Path, tmp_path: Path, path: str) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    (checkpoint.parent / "outside.distcp").write_bytes(shard.read_bytes())
    (checkpoint / "link.distcp").symlink_to(shard.name)
    (checkpoint / "state").mkdir()
    metadata = pickle.loads((checkpoint / METADATA_NAME).read_bytes())
    item_of(metadata).relative_path = path
    (checkpoint / "link.distcp").unlink()
    (checkpoint / "state").rmdir()
    (checkpoint / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    recommit(checkpoint)
    (checkpoint / "link.distcp").symlink_to(shard.name)
    (checkpoint / "state").mkdir()
    with pytest.raises(DamagedCheckpointError, match="no file of this"):
        read(checkpoint)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "sub/x"])
def test_the_manifest_names_files_of_its_own_folder_only(checkpoint: Path, path: str) -> None:
    content = commit.read_manifest(checkpoint)
    content["files"][path] = {"bytes": 1, "sha256": "0"}
    (checkpoint / commit.MANIFEST_NAME).write_bytes(commit.manifest_bytes(content))
    with pytest.raises(DamagedCheckpointError, match="names files outside of its folder"):
        read(checkpoint)


@pytest.mark.parametrize("missing", [METADATA_NAME, STATE_NAME])
def test_a_manifest_that_leaves_a_needed_file_out_verifies_nothing(checkpoint: Path, missing: str) -> None:
    kept = (checkpoint / missing).read_bytes()
    (checkpoint / missing).unlink()
    recommit(checkpoint)
    (checkpoint / missing).write_bytes(kept)
    with pytest.raises(DamagedCheckpointError, match=f"{missing}: missing"):
        read(checkpoint)


def enlarge(metadata: Metadata) -> None:
    item = metadata.state_dict_metadata[NAME]
    item.size = torch.Size([10**9, 10**6])
    item.chunks[0].sizes = item.size


def lengthen(metadata: Metadata) -> None:
    item_of(metadata).length = 10**15


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (enlarge, "needs 4,000,000,000,000,000 bytes"),
        (lengthen, "has 1,000,000,000,000,000"),
        (lambda m: setattr(item_of(m), "offset", -1), "at -1 of"),
        (lambda m: setattr(item_of(m), "offset", "0"), "not the metadata of tensors"),
        (lambda m: setattr(item_of(m), "transform_descriptors", ["zstd"]), "is encoded by"),
        (lambda m: m.state_dict_metadata[NAME].chunks.clear(), "is not whole"),
        (lambda m: setattr(m.state_dict_metadata[NAME].chunks[0], "offsets", torch.Size([-1, 0])), "part outside"),
        (lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size([-16, -6])), "not a tensor's size"),
        (lambda m: setattr(m.state_dict_metadata[NAME], "size", [16, 6]), "not a tensor's size"),
        (lambda m: m.storage_data.clear(), "not the metadata of tensors"),
        (lambda m: setattr(m, "state_dict_metadata", 3), "not the metadata of tensors"),
    ],
)
def test_sizes_are_held_against_the_files_before_anything_is_allocated(
    checkpoint: Path, change: Callable[[Metadata], None], told: str
) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(DamagedCheckpointError, match=told):
        read(checkpoint)


def test_a_tensor_that_would_grow_when_it_is_read_is_refused(checkpoint: Path) -> None:
    inflated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(as_stored(torch.zeros(16, 6)))) as source, zipfile.ZipFile(inflated, "w") as target:
        for entry in source.infolist():
            content = source.read(entry) if "/data/" not in entry.filename else bytes(10**8)
            target.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)
    assert len(inflated.getvalue()) < 10**6
    replace_item(checkpoint, inflated.getvalue())
    with pytest.raises(DamagedCheckpointError, match="which would grow to"):
        read(checkpoint)


def test_torchs_old_format_is_refused_since_it_allocates_what_it_announces(checkpoint: Path) -> None:
    replace_item(checkpoint, as_stored(torch.zeros(16, 6), _use_new_zipfile_serialization=False))
    with pytest.raises(DamagedCheckpointError, match="not stored as a tensor"):
        read(checkpoint)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (torch.zeros(16, 6, dtype=torch.float16), r"is torch\.float16 .*says torch\.float32"),
        (torch.zeros(16, 6, dtype=torch.float64), r"is torch\.float64 .*says torch\.float32"),
        (torch.zeros(16, 6).to_sparse(), "is not a dense tensor|cannot be read"),
        ({"a": torch.zeros(16, 6)}, "is not a dense tensor"),
        (torch.zeros(2, 2), "cannot be read"),
    ],
)
def test_a_tensor_that_is_not_what_the_metadata_says_is_refused(checkpoint: Path, stored: Any, told: str) -> None:
    replace_item(checkpoint, as_stored(stored) + bytes(1000))
    with pytest.raises(DamagedCheckpointError, match=told):
        read(checkpoint)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "[" * 100_000, '{"state": {"model": 3}, "session": {}}', '{"state": [], "session": {}}', "\x00"],
    ids=["empty", "list", "lacking", "nested", "clash", "no state", "nul"],
)
def test_plain_values_that_are_no_state_are_damaged(checkpoint: Path, content: str) -> None:
    (checkpoint / STATE_NAME).write_text(content)
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=STATE_NAME):
        read(checkpoint)


def test_many_tensors_in_the_same_bytes_are_refused(checkpoint: Path) -> None:
    def multiply(metadata: Metadata) -> None:
        big = max(metadata.storage_data, key=lambda index: metadata.storage_data[index].length)
        item, info = metadata.state_dict_metadata[big.fqn], metadata.storage_data[big]
        for number in range(100):
            name = f"model/copy-{number}"
            metadata.state_dict_metadata[name] = item
            metadata.storage_data[type(big)(name, big.offset)] = info

    rewrite(checkpoint, multiply)
    with pytest.raises(DamagedCheckpointError, match="of tensors, but its files hold"):
        read(checkpoint)


def test_a_tensor_in_several_pieces_is_refused_since_they_could_leave_holes(checkpoint: Path) -> None:
    def halve(metadata: Metadata) -> None:
        item = metadata.state_dict_metadata[NAME]
        [chunk] = item.chunks
        half = torch.Size([chunk.sizes[0] // 2, *chunk.sizes[1:]])
        item.chunks = [type(chunk)(chunk.offsets, half), type(chunk)(chunk.offsets, half)]

    rewrite(checkpoint, halve)
    with pytest.raises(DamagedCheckpointError, match="is not whole"):
        read(checkpoint)
