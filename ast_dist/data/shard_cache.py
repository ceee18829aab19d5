"""Remote shards as local files: fetched once for a host, bounded in bytes, least recently used ones out first.

    FOLDER/lock                  held for a moment by whoever adds or removes names below
    FOLDER/SHA256-BYTES.tar      a whole shard, verified
    FOLDER/SHA256-BYTES.part     a shard that a process is fetching and holds a lock on, or what a killed one left

Names are contents, so the ranks, runs and data sets of one user share one folder, and a later run begins with what it
finds. Part files count as whole ones, so a download that has begun has its room. The kernel drops the lock of a process
that dies; its part file is then gone on with, or makes room, or is removed after a day.

A reader opens a shard for one read. Removing a shard that is being read at that moment harms nothing: the reader has
its descriptor, and the space is free when it closes it.
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ast_dist.errors import RankError, UserError

PIECE_BYTES = 16 * 1024 * 1024  # of one request; what is tried again when a connection breaks
FETCHES_AT_ONCE = 4
_FORGOTTEN_S = 24 * 3600.0
_TOUCH_S = 1.0


class FetchStopped(RuntimeError):
    """A fetch was given up because the reader is closing."""


class Source(Protocol):
    """Where shards come from."""

    def fetch(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file, all of them, or all of the file where the server knows no ranges.

        Raises what `read` of a sample should raise, after its own retries.
        """

    def url(self, name: str) -> str:
        """Where a file lies, for messages."""

    def close(self) -> None:
        """Let fetches that wait to try again give up."""


class ShardCache:
    """One process's access to the shards of one index through a shared folder; safe between threads.

    shards: entries of the manifest (name, bytes, sha256). capacity_bytes: of all shards in the folder. window: how many
    calls of `will_need` are looked back on: the shards they named are not removed to make room for later ones.
    Raises UserError when the largest shard is above the capacity, or when the folder cannot be used.
    """

    def __init__(
        self, folder: Path, capacity_bytes: int, shards: Sequence[Mapping[str, Any]], source: Source, window: int
    ) -> None:
        self._folder, self._capacity, self._shards, self._source = folder, capacity_bytes, shards, source
        for shard in shards:
            if not re.fullmatch(r"[0-9a-f]{64}", shard["sha256"]):
                raise UserError(f"{source.url(shard['name'])}: its SHA-256 in the manifest is {shard['sha256']!r}.")
        self._stems = [f"{shard['sha256']}-{int(shard['bytes'])}" for shard in shards]
        self._bytes = [int(shard["bytes"]) for shard in shards]
        self._refuse_small(max(self._bytes, default=0), "the largest shard has", UserError)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._window: deque[Sequence[int]] = deque(maxlen=max(1, window))
        self._wanted: frozenset[str] = frozenset()
        self._pending: dict[int, Future[None]] = {}
        self._touched: dict[int, float] = {}
        self._pool = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._names_locked():
                self._remove_forgotten()
        except OSError as error:
            raise UserError(
                f"{folder}: cannot hold fetched shards ({error.strerror}). Name another --data.shard-cache-dir, on a "
                "local disk."
            ) from None

    def open(self, shard: int) -> int:
        """A descriptor of the shard's whole and verified file, which the caller closes; waits where it must be fetched.

        Raises RankError when the shard is not there, is not what the manifest states, or when the disk is full, and
        what the source raises when it gave up.
        """
        while True:
            whole = self._open_whole(shard)
            if whole is not None:
                return whole
            future = self._pending.get(shard)
            if future is None or future.cancel():
                fetched = self._fetch(shard)
                assert fetched is not None, "a shard that is needed now is fetched, or an error"
                return fetched
            try:
                future.result()
            finally:
                self._pending.pop(shard, None)

    def will_need(self, shards: Sequence[int], ahead: Sequence[int] = ()) -> None:
        """Fetch the shards of the next batch, and those further ahead where there is room, without waiting for them.

        Raises RankError when the shards of the batch are more than the capacity. An error of a fetch is raised by the
        `open` that needs the shard.
        """
        needed = sum(self._bytes[shard] for shard in shards)
        self._refuse_small(needed, f"the {len(shards)} shards of one batch have", RankError)
        with self._lock:
            self._window.append(shards)
            wanted = {number for batch in self._window for number in batch} | {*ahead}
            self._wanted = frozenset(self._stems[number] for number in wanted)
            for number, future in list(self._pending.items()):
                has_failed = future.done() and not future.cancelled() and future.exception() is not None
                if (future.done() and not has_failed) or (number not in wanted and (has_failed or future.cancel())):
                    self._pending.pop(number, None)
            for number in dict.fromkeys([*shards, *ahead]):
                if number not in self._pending and not self._touch(number):
                    self._pending[number] = self._pool.submit(self._fetch_ahead, number)

    def remove_damaged(self, shard: int) -> bool:
        """Remove the local copy of a shard if it is no longer what was verified. Returns whether it was removed."""
        descriptor = self.open(shard)
        with os.fdopen(descriptor, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == self._shards[shard]["sha256"]:
                return False
        with self._names_locked():
            self._whole(shard).unlink(missing_ok=True)
        return True

    def stop(self) -> None:
        """Begin no further request and no further try; what is under way ends with its request."""
        self._stopped.set()
        self._source.close()

    def close(self) -> None:
        """Stop fetching. What was fetched stays for the next run."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _refuse_small(self, needed: int, what: str, kind: type[UserError]) -> None:
        if needed > self._capacity:
            raise kind(
                f"data.shard_cache_gb allows {self._capacity:,} bytes, but {what} {needed:,}. Raise "
                f"--data.shard-cache-gb to at least {math.ceil(needed / 1e6) / 1e3:g}, or make smaller shards."
            )

    def _whole(self, shard: int) -> Path:
        return self._folder / f"{self._stems[shard]}.tar"

    def _part(self, shard: int) -> Path:
        return self._folder / f"{self._stems[shard]}.part"

    def _open_whole(self, shard: int) -> int | None:
        try:
            descriptor = os.open(self._whole(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        now = time.monotonic()
        if now - self._touched.get(shard, -_TOUCH_S) >= _TOUCH_S:
            self._touched[shard] = now
            _set_used(descriptor)
        return descriptor

    def _touch(self, shard: int) -> bool:
        """Note that a shard was used. Returns whether its whole file is there."""
        try:
            _set_used(self._whole(shard))
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _names_locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _fetch_ahead(self, shard: int) -> None:
        descriptor = self._fetch(shard, is_ahead=True)
        if descriptor is not None:
            os.close(descriptor)

    def _fetch(self, shard: int, *, is_ahead: bool = False) -> int | None:
        """Fetch a shard, or wait until another thread or process has done so. Returns a descriptor of the whole file.

        is_ahead: return None instead of waiting, and where others that are wanted would have to go.
        """
        while True:
            with self._names_locked():
                whole = self._open_whole(shard)
                if whole is not None:
                    return whole
                claim = self._claim(shard, is_ahead)
            if isinstance(claim, Path):
                if is_ahead:
                    return None
                _wait_until_unlocked(claim)
            elif claim is None:
                return None
            else:
                return self._fetch_into(claim, shard)

    def _claim(self, shard: int, is_ahead: bool) -> int | Path | None:
        """A descriptor of the shard's part file, locked and with its room made; or a part file to wait for; or None.

        The names are locked.
        """
        path = self._part(shard)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return path
        try:
            waits_for = self._make_room(shard, os.fstat(descriptor).st_size, is_ahead)
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        if waits_for is None:
            return descriptor
        os.close(descriptor)
        path.unlink()
        return None if is_ahead else waits_for

    def _make_room(self, shard: int, present_bytes: int, is_ahead: bool) -> Path | None:
        """Remove least recently used shards until one more fits. Returns None, or what to wait for before it does.

        What is wanted soon goes last, and never for a shard that is fetched ahead. The disk may have less room than
        the capacity; the cache then makes do with it.
        """
        own, entries = self._part(shard), []
        for path in self._folder.iterdir():
            if path.suffix in (".tar", ".part") and path != own:
                status = path.stat()
                entries.append((path.stem in self._wanted, status.st_mtime_ns, path, status.st_size))
        above = sum(_planned_bytes(path) for _, _, path, _ in entries) + self._bytes[shard] - self._capacity
        lacking = self._bytes[shard] - present_bytes - shutil.disk_usage(self._folder).free
        busy: list[Path] = []
        for is_wanted, _, path, size in sorted(entries):
            if above <= 0 and lacking <= 0:
                return None
            if is_wanted and is_ahead:
                break
            if path.suffix == ".part" and _is_locked(path):
                busy.append(path)
                continue
            path.unlink()
            above, lacking = above - _planned_bytes(path), lacking - size
        if above <= 0 and lacking <= 0:
            return None
        if busy or is_ahead:
            return busy[0] if busy else own
        raise self._disk_full(shard)

    def _fetch_into(self, descriptor: int, shard: int) -> int:
        """Fill a claimed part file and give it its final name. Returns a descriptor for reading."""
        try:
            self._download(descriptor, shard)
            with self._names_locked():
                self._part(shard).rename(self._whole(shard))
                self._touch(shard)
                # Opened before anybody can remove it, so every fetch gives at least one read.
                return os.open(self._whole(shard), os.O_RDONLY | os.O_CLOEXEC)
        except RankError:
            with self._names_locked():  # so that nobody waits for a file that is about to lose its name
                self._part(shard).unlink()
            raise
        finally:
            os.close(descriptor)  # and with it the lock

    def _download(self, descriptor: int, shard: int) -> None:
        entry, size, found = self._shards[shard], self._bytes[shard], ""
        for _ in range(2):  # what a killed process left may not have reached the disk, and proxies make mistakes
            digest, done = hashlib.sha256(), 0
            present = min(size, os.fstat(descriptor).st_size)
            while done < present and (piece := os.pread(descriptor, min(PIECE_BYTES, present - done), done)):
                digest.update(piece)
                done += len(piece)
            while done < size:
                if self._stopped.is_set():
                    raise FetchStopped(f"{self._source.url(entry['name'])}: the fetch was stopped")
                piece = self._source.fetch(entry["name"], done, min(done + PIECE_BYTES, size))
                assert piece, "a source gives all it is asked for, or raises"
                self._write(descriptor, piece, done, shard)
                digest.update(piece)
                done += len(piece)
            found = digest.hexdigest()
            if found == entry["sha256"]:
                os.fsync(descriptor)  # a host that crashes must not leave a whole file's name on half a file
                return
            os.ftruncate(descriptor, 0)
        raise RankError(
            f"{self._source.url(entry['name'])}: its {size:,} bytes have SHA-256 {found}, but the manifest states "
            f"{entry['sha256']}, in two tries. Upload the shard again, or the manifest that belongs to it."
        )

    def _write(self, descriptor: int, piece: bytes, position: int, shard: int) -> None:
        view = memoryview(piece)
        try:
            while view:
                written = os.pwrite(descriptor, view, position)
                view, position = view[written:], position + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._disk_full(shard) from None

    def _disk_full(self, shard: int) -> RankError:
        free = shutil.disk_usage(self._folder).free
        return RankError(
            f"{self._folder}: the disk is full or its quota reached: {self._shards[shard]['name']} has "
            f"{self._bytes[shard]:,} bytes, and {free:,} are free. Make room, lower --data.shard-cache-gb, or name "
            "another --data.shard-cache-dir."
        )

    def _remove_forgotten(self) -> None:
        for path in self._folder.glob("*.part"):
            if time.time() - path.stat().st_mtime > _FORGOTTEN_S and not _is_locked(path):
                path.unlink()


def _set_used(file: Path | int) -> None:
    # Stated, since the kernel's own stamp is only as fine as its clock tick: several fetches may share one.
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _planned_bytes(path: Path) -> int:
    """Size of the whole shard, which the name of its file states."""
    return int(path.stem.rpartition("-")[2])


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _wait_until_unlocked(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)
