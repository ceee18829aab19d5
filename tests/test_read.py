"""ast_dist/data/read.py: the bytes that the index describes, or an error that names the sample."""

import os
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ast_dist.data import read
from ast_dist.data.read import DamagedSampleError, Reader
from tests.shards import open_shards, overwrite, restate, squares, write_split


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
