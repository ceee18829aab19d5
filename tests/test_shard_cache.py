"""ast_dist/data/shard_cache.py: bounded, shared, verified, and none the worse for a kill -9."""

import hashlib
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ast_dist.data.shard_cache import ShardCache
from ast_dist.errors import RankError, UserError
from tests.launching import finish, start, wait_for
from tests.servers import serving
from tests.shards import squares, write_split

SIZE = 1000
LOCKS = Path("/proc/locks")


class Memory:
    """A source of shards that are in memory; counts what is fetched of each."""

    def __init__(self, count):
        self.contents = {f"{number}.tar": bytes([number]) * SIZE for number in range(count)}
        self.fetched = Counter()

    @property
    def shards(self):
        return [
            {"name": name, "bytes": SIZE, "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.contents.items()
        ]

    def fetch(self, name, start, end):
        self.fetched[name] += 1
        return self.contents[name][start:end]

    def url(self, name):
        return f"memory/{name}"

    def close(self):
        pass


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


@pytest.fixture
def source():
    return Memory(6)


@pytest.fixture
def make(folder, source):
    """Makes caches over one folder and source, and closes them."""
    made = []

    def make(capacity=2 * SIZE, window=1):
        made.append(ShardCache(folder, capacity, source.shards, source, window))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def content(cache, shard):
    descriptor = cache.open(shard)
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def held(folder, source):
    """Which shards lie there whole."""
    digests = [shard["sha256"] for shard in source.shards]
    return {digests.index(path.name.partition("-")[0]) for path in folder.glob("*.tar")}


def settle(cache):
    """Wait for what is fetched ahead."""
    for future in list(cache._pending.values()):
        future.result()


def test_it_never_holds_more_than_its_capacity_and_every_read_is_right(make, folder, source):
    cache = make()
    for shard in [0, 1, 2, 3, 4, 5, 0, 5, 2, 2, 1]:
        assert content(cache, shard) == bytes([shard]) * SIZE
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * SIZE


def test_the_least_recently_used_shard_goes_first(make, folder, source):
    cache = make(3 * SIZE)
    for shard in (0, 1, 2):
        content(cache, shard)
    cache.will_need([0])
    content(cache, 3)
    assert held(folder, source) == {0, 2, 3}
    cache.will_need([])
    content(make(3 * SIZE), 2)  # another process's use counts, too
    content(cache, 4)
    assert held(folder, source) == {2, 3, 4}


def test_what_the_next_batches_need_is_fetched_once_and_stays(make, folder, source):
    cache = make(4 * SIZE, window=2)
    cache.will_need([0, 1], ahead=[2, 3, 4, 5])
    settle(cache)
    assert len(held(folder, source)) == 4
    cache.will_need([2], ahead=[5])
    settle(cache)
    assert held(folder, source) >= {0, 1, 2}, "one ahead pushed out what is wanted sooner"
    for shard in (0, 1, 2):
        content(cache, shard)
    assert [source.fetched[f"{shard}.tar"] for shard in (0, 1, 2)] == [1, 1, 1]


def test_shards_that_are_wanted_now_push_out_those_wanted_later(make, folder, source):
    cache = make(2 * SIZE)
    cache.will_need([0, 1])
    settle(cache)
    assert content(cache, 5) == bytes([5]) * SIZE


def test_threads_that_need_one_shard_fetch_it_once(make, source):
    cache = make(6 * SIZE)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: content(cache, number % 6), range(240)))
    assert found == [bytes([number % 6]) * SIZE for number in range(240)]
    assert set(source.fetched.values()) == {1}


def test_threads_get_right_bytes_from_a_cache_of_one_shard(make, source):
    cache = make(SIZE)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: content(cache, number % 6), range(240)))
    assert found == [bytes([number % 6]) * SIZE for number in range(240)]


def test_a_batch_larger_than_the_cache_is_refused_with_both_numbers(make):
    with pytest.raises(RankError, match=r"allows 2,000 bytes, but the 3 shards of one batch have 3,000"):
        make().will_need([0, 1, 2])


def test_a_shard_larger_than_the_cache_is_refused_with_both_numbers(make):
    with pytest.raises(UserError, match=r"allows 999 bytes, but the largest shard has 1,000"):
        make(SIZE - 1)


def test_a_later_run_begins_with_what_is_there(make, source):
    content(make(), 3)
    assert content(make(), 3) == bytes([3]) * SIZE
    assert source.fetched["3.tar"] == 1


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(make, folder, source):
    cache = make()
    content(cache, 0)
    shard = source.shards[1]
    part = folder / f"{shard['sha256']}-{SIZE}.part"
    part.symlink_to("/dev/full")  # what is written there finds no space left
    with pytest.raises(RankError, match=r"the disk is full or its quota reached: 1\.tar has 1,000 bytes, and [\d,]+"):
        cache.open(1)
    assert not part.is_symlink()
    assert content(cache, 0) == bytes(SIZE)


def test_a_disk_smaller_than_the_capacity_makes_room_before_it_is_full(make, folder, source, monkeypatch):
    class Larger(Memory):
        """A shard that no disk holds."""

        @property
        def shards(self):
            return [*super().shards[:5], {"name": "5.tar", "bytes": 10**17, "sha256": "0" * 64}]

    larger = Larger(6)
    cache = ShardCache(folder, 10**18, larger.shards, larger, 1)
    for shard in range(4):
        content(cache, shard)
    with pytest.raises(RankError, match=r"5\.tar has 100,000,000,000,000,000 bytes"):
        cache.open(5)
    assert larger.fetched["5.tar"] == 0
    assert held(folder, source) == set()
    assert content(cache, 0) == bytes(SIZE)
    cache.close()


def test_a_folder_that_cannot_hold_shards_is_told(tmp_path, source):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/shards: cannot hold fetched shards \(Not a directory\)"):
        ShardCache(tmp_path / "file/shards", SIZE, source.shards, source, 1)


def test_a_checksum_that_is_a_path_is_refused(folder, source):
    shards = [{**source.shards[0], "sha256": "../../x"}]
    with pytest.raises(UserError, match=r"memory/0\.tar: its SHA-256 in the manifest is '\.\./\.\./x'"):
        ShardCache(folder, SIZE, shards, source, 1)


def test_part_files_of_killed_processes_make_room_and_go_after_a_day(make, folder, source):
    folder.mkdir()
    stems = [f"{shard['sha256']}-{SIZE}" for shard in source.shards]
    (folder / f"{stems[4]}.part").write_bytes(b"old")
    yesterday = time.time() - 25 * 3600
    os.utime(folder / f"{stems[4]}.part", (yesterday, yesterday))
    (folder / f"{stems[5]}.part").write_bytes(b"new")
    cache = make()
    assert [path.name for path in folder.glob("*.part")] == [f"{stems[5]}.part"]
    content(cache, 0)
    content(cache, 1)
    assert not list(folder.glob("*.part"))


IMAGES = squares(12)
DIGEST = hashlib.sha256(b"".join(IMAGES)).hexdigest()
PIECE = 4096


@pytest.fixture
def server(tmp_path):
    write_split(tmp_path / "set/train", IMAGES, num_shards=4)
    with serving(tmp_path / "set") as server:
        yield server


def begin(server, folder):
    return start("-m", "tests.fetch_program", f"{server.url}/train", str(folder), str(PIECE))


def shard_gets(server):
    return Counter(get for get in server.gets if get[0].endswith(".tar"))


def test_processes_of_one_host_share_what_each_fetches(server, tmp_path):
    jobs = [begin(server, tmp_path / "cache") for _ in range(2)]
    assert [finish(job).strip() for job in jobs] == [DIGEST, DIGEST]
    assert set(shard_gets(server).values()) == {1}
    assert server.gets_of("label.npy") == 1


@pytest.mark.faults
def test_killed_in_the_middle_of_a_download_the_next_run_goes_on_from_there(server, tmp_path):
    name, folder = "train-000001.tar", tmp_path / "cache"
    server.faults[name] += ["", "hold"]
    job = begin(server, folder)
    wait_for(lambda: server.gets_of(name) == 2, "the second piece", job)
    job.kill()
    job.communicate()
    assert len(list(folder.glob("shards/*.part"))) == 1
    assert finish(begin(server, folder)).strip() == DIGEST
    pieces = [text for path, text in server.gets if path.endswith(name)]
    assert sum(text.startswith("bytes=0-") for text in pieces) == 1, "the first piece was fetched again"
    assert not list(folder.glob("shards/*.part"))


@pytest.mark.faults
@pytest.mark.skipif(not LOCKS.is_file(), reason="needs Linux's list of locks")
def test_a_process_that_waits_for_one_that_is_killed_takes_over(server, tmp_path):
    name, folder = "train-000001.tar", tmp_path / "cache"
    server.faults[name] += ["", "hold"]
    first = begin(server, folder)
    wait_for(lambda: server.gets_of(name) == 2, "the second piece", first)
    second = begin(server, folder)
    wait_for(lambda: waits_for_a_lock(second.pid), "the second process to wait", second)
    first.kill()
    first.communicate()
    assert finish(second).strip() == DIGEST


def waits_for_a_lock(pid):
    return any("->" in line and f" {pid} " in line for line in LOCKS.read_text().splitlines())
