"""One owner per run directory, and its last sign of life."""

import fcntl
import json
import os
import socket
import struct
import time
from pathlib import Path

from ast_dist.errors import UserError

LEASE_NAME = ".lease"
_PATIENCE_S = 0.5
_BEAT = struct.Struct("<qd")


def previous_launch(run_dir: Path) -> str | None:
    """The launch that the directory's present or last owner belonged to; None where there was none."""
    try:
        launch: str | None = json.loads((run_dir / LEASE_NAME).read_bytes()[_BEAT.size :]).get("launch")
    except (OSError, ValueError):
        return None
    return launch


class LostLeaseError(RuntimeError):
    """This process does not own its run directory any more."""


class Lease:
    """Holds a run directory for this process until it ends, however it ends: the kernel drops the lock.

    The file's first 16 bytes are the heartbeat (steps done, int64; time, float64 seconds since 1970), the rest says
    who the owner is, and which launch started it. Raises UserError when another process holds the directory.
    """

    def __init__(self, run_dir: Path, launch: str = "") -> None:
        self._run_dir = run_dir
        path = run_dir / LEASE_NAME
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not self._lock():
            owner = os.pread(self._file, 4096, _BEAT.size).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"{run_dir}: another process trains here ({owner}). Wait for it, stop it, or choose another --run-dir."
            )
        self.previous_beat = self._read()
        self._owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "launch": launch}).encode()
        os.ftruncate(self._file, _BEAT.size)
        os.pwrite(self._file, self._owner, _BEAT.size)

    def beat(self, steps: int) -> None:
        """Note that `steps` steps are done. Costs microseconds; survives a SIGKILL of this process."""
        os.pwrite(self._file, _BEAT.pack(steps, time.time()), 0)

    def check(self) -> None:
        """Raise LostLeaseError unless this process still owns what stands at the run directory's path.

        The lock is on a file: the directory may have been moved aside, and another one made in its place; a file
        system that forgets locks may have given it to another, who then wrote its name into it.
        """
        path = self._run_dir / LEASE_NAME
        try:
            there = path.stat()
            held = os.fstat(self._file)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = os.pread(self._file, 4096, _BEAT.size)
        except OSError as error:
            raise LostLeaseError(f"{path}: this process does not hold the run directory any more ({error})") from None
        if (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            raise LostLeaseError(f"{path}: the run directory was moved, and another stands in its place")
        if owner != self._owner:
            raise LostLeaseError(f"{path}: another process trains here now ({owner.decode(errors='replace')})")

    def begin_again(self) -> None:
        """Take the beats so far as those of the attempt before."""
        self.previous_beat = self._read()

    def release(self) -> None:
        """Let another process have the directory."""
        os.close(self._file)

    def _lock(self) -> bool:
        # Whoever asks how the run stands holds a shared lock for a moment; a real owner holds on for longer.
        patience = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > patience:
                    return False
                time.sleep(0.01)
            else:
                return True

    def _read(self) -> tuple[int, float] | None:
        raw = os.pread(self._file, _BEAT.size, 0)
        return _BEAT.unpack(raw) if len(raw) == _BEAT.size and any(raw) else None
