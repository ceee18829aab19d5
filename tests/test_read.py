"""ast_dist/data/read.py: the bytes that the index describes, or an error that names the sample."""

import dataclasses
import errno
import itertools
import os
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.data import read
from ast_dist.data.read import DamagedSampleError, Reader
from tests.shards import open_shards, overwrite, restate, squares, write_split

FAILING = Path("/proc/self/mem")  # a read of its first bytes is a real EIO


@pytest.fixture
def index(tmp_path):
    return write_split(tmp_path / "train", squares(12), num_shards=6)


@pytest.fixture
def reader(index):
    reader = Reader(index)
    yield reader
    reader.close()


def bytes_in_tars(index):
    found = {}
    for path in index.shard_paths:
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".jpg")}
    return [found[f"{index.key(sample_id)}.jpg"] for sample_id in range(index.num_samples)]


def test_it_reads_what_the_tars_hold(index, reader):
    assert [reader.read(sample_id) for sample_id in range(12)] == bytes_in_tars(index) == squares(12)


def test_reads_are_counted(reader):
    for sample_id in (3, 3, 5):
        reader.read(sample_id)
    assert reader.samples_read == 3


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_more_shards_than_the_limit_are_read_without_holding_more_files_open(index, reader, monkeypatch):
    monkeypatch.setattr(read, "_OPEN_SHARDS", 2)
    expected = bytes_in_tars(index)
    for sample_id in [*range(12), *range(11, -1, -1)]:
        assert reader.read(sample_id) == expected[sample_id]
        assert open_shards(index) <= 2
    reader.close()
    assert open_shards(index) == 0


def test_threads_share_a_reader_while_files_come_and_go(index, reader, monkeypatch):
    monkeypatch.setattr(read, "_OPEN_SHARDS", 1)
    expected = bytes_in_tars(index)
    ids = [sample_id * 5 % 12 for sample_id in range(2400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, ids, chunksize=50)) == [expected[sample_id] for sample_id in ids]
    assert reader.samples_read == 2400


def test_a_shard_that_became_shorter_is_told_with_both_numbers(index, reader):
    shard, offset, size = index.shard_paths[5], int(index.offset[11]), int(index.size[11])
    os.truncate(shard, offset + 100)
    with pytest.raises(DamagedSampleError) as caught:
        reader.read(11)
    assert str(caught.value) == (
        f"train-000005.tar: sample 0000011-x (id 11) needs {size:,} bytes at offset {offset:,}, "
        f"but the file ends at {offset + 100:,}."
    )
    assert caught.value.sample_id == 11
    assert reader.read(10)  # its neighbour is whole


def test_changed_bytes_are_told_with_both_checksums(index, reader):
    overwrite(index, 4, b"changed")
    changed = b"changed" + squares(12)[4][7:]
    with pytest.raises(DamagedSampleError) as caught:
        reader.read(4)
    assert str(caught.value) == (
        f"train-000002.tar: sample 0000004-x (id 4) has CRC-32 {zlib.crc32(changed):08x}, "
        f"but the index states {zlib.crc32(squares(12)[4]):08x}."
    )


def test_one_flipped_bit_is_seen(index, reader):
    data = bytearray(squares(12)[7])
    data[len(data) // 2] ^= 0x10
    overwrite(index, 7, bytes(data))
    with pytest.raises(DamagedSampleError, match="CRC-32"):
        reader.read(7)


def test_an_offset_beyond_the_end_is_a_short_shard(index):
    index = restate(index, "offset", 2, 10**12)
    reader = Reader(index)
    with pytest.raises(DamagedSampleError, match=r"at offset 1,000,000,000,000, but the file ends at"):
        reader.read(2)
    reader.close()


def test_a_shard_that_is_gone_is_no_damaged_sample(index, reader):
    index.shard_paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000\.tar"):
        reader.read(0)


@pytest.mark.skipif(not FAILING.exists(), reason="needs Linux's /proc")
def test_an_io_error_that_passes_is_read_through_a_fresh_descriptor(index, reader, monkeypatch):
    shard, aside = index.shard_paths[1], index.root / "aside"
    shard.rename(aside)
    shard.symlink_to(FAILING)
    pauses = []

    def mend(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            shard.unlink()
            aside.rename(shard)

    monkeypatch.setattr(read.time, "sleep", mend)
    assert reader.read(2) == squares(12)[2]
    assert len(pauses) == 2


@pytest.mark.skipif(not FAILING.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layout", ["shards", "files"])
def test_an_io_error_that_stays_is_no_damaged_sample_and_names_the_file(index, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(read, "_PAUSES_S", (0.0, 0.0, 0.0))
    if layout == "files":
        index = in_files(index, tmp_path / "files")
    path = index.shard_paths[1] if layout == "shards" else Path(index.data_root, index.key(2))
    path.unlink()
    path.symlink_to(FAILING)
    reader = Reader(index)
    with pytest.raises(OSError, match=r"Input/output error, in 4 tries with fresh descriptors") as caught:
        reader.read(2)
    reader.close()
    assert caught.value.filename == str(path)


def in_files(index, folder, **changes):
    """The same samples as an index of loose files, sizes and checksums unknown unless given."""
    (folder / "sub").mkdir(parents=True)
    names = [f"sub/{number}.jpg" for number in range(index.num_samples)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(squares(12)[number])
    unknown = np.zeros(index.num_samples, np.int64)
    manifest = {**index.manifest, "data_root": str(folder), "layout": "files", "shards": []}
    fields = {"shard": unknown, "offset": unknown, "size": unknown, "crc32": unknown.astype(np.uint32), **changes}
    return dataclasses.replace(index, manifest=manifest, keys=np.array([n.encode() for n in names]), **fields)


def test_loose_files_are_read_whole(index, tmp_path):
    reader = Reader(in_files(index, tmp_path / "files"))
    reader.will_need(np.arange(12))
    assert [reader.read(sample_id) for sample_id in range(12)] == squares(12)
    assert reader.samples_read == 12


def test_a_loose_file_that_is_not_there_or_no_file_is_a_damaged_sample(index, tmp_path):
    reader = Reader(in_files(index, tmp_path / "files"))
    gone, folder = tmp_path / "files/sub/3.jpg", tmp_path / "files/sub/4.jpg"
    gone.unlink()
    folder.unlink()
    folder.mkdir()
    for sample_id, path, reason in ((3, gone, "No such file or directory"), (4, folder, "Is a directory")):
        with pytest.raises(DamagedSampleError) as caught:
            reader.read(sample_id)
        assert str(caught.value) == f"{path}: sample sub/{sample_id}.jpg (id {sample_id}) cannot be read ({reason})."


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EHOSTDOWN, errno.EACCES, errno.EMFILE, errno.ENODEV])
def test_a_file_that_the_system_cannot_give_is_no_damaged_sample(index, tmp_path, monkeypatch, number):
    reader = Reader(in_files(index, tmp_path / "files"))

    def refuse(_path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        reader.read(3)


def test_files_that_went_with_their_folder_are_no_damaged_samples(index, tmp_path):
    reader = Reader(in_files(index, tmp_path / "files"))
    (tmp_path / "files").rename(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError):
        reader.read(3)


def test_a_loose_files_known_size_and_checksum_are_checked(index, tmp_path):
    reader = Reader(in_files(index, tmp_path / "files", size=index.size, crc32=index.crc32))
    assert reader.read(0) == squares(12)[0]
    changed = squares(12)[1][:-1] + b"?"
    (tmp_path / "files/sub/1.jpg").write_bytes(changed)
    (tmp_path / "files/sub/2.jpg").write_bytes(b"short")
    with pytest.raises(DamagedSampleError, match=rf"1\.jpg .* has CRC-32 {zlib.crc32(changed):08x}, but the index"):
        reader.read(1)
    with pytest.raises(DamagedSampleError, match=rf"2\.jpg .* has 5 bytes, but the index states {index.size[2]:,}"):
        reader.read(2)


def test_will_need_changes_nothing_that_is_read_and_leaves_errors_to_read(index, reader):
    index.shard_paths[0].unlink()
    reader.will_need(np.array([11, 0, 5, 5, 1]), ahead=np.array([7]))
    assert reader.read(5) == squares(12)[5]
    assert reader.samples_read == 1


@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 2**19)), min_size=1, max_size=20),
)
def test_what_is_advised_covers_every_sample_in_few_short_ranges(samples):
    offsets, sizes = (np.array(column) for column in zip(*samples, strict=True))
    ranges = list(read._merged(offsets, sizes))
    assert all(0 < length <= read._ADVISED_BYTES for _, length in ranges)
    starts_and_ends = [(start, start + length) for start, length in ranges]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(starts_and_ends)), "read twice"
    for offset, size in samples:
        position = offset
        while position < offset + size:
            position = next(end for start, end in starts_and_ends if start <= position < end)
    assert len(ranges) <= len(samples) + sizes.sum() / read._ADVISED_BYTES
