"""One owner per run directory, and its last sign of life."""

import fcntl
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from ast_dist.errors import UserError

LEASE_NAME = ".lease"
_PATIENCE_S = 0.5
_SILENCE_S = 2.0
_BEAT = struct.Struct("<qd")


def previous_launch(run_dir: Path) -> str | None:
    """The launch that the directory's present or last owner belonged to; None where there was none."""
    launch: str | None = _owner(run_dir).get("launch")
    return launch


class LostLeaseError(RuntimeError):
    """This process does not own its run directory any more."""


def _owner(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / LEASE_NAME).read_bytes()[_BEAT.size :]))
    except (OSError, ValueError, TypeError):
        return {}


def steps_done(run_dir: Path) -> tuple[int, int]:
    """The heartbeat's steps, 0 before the first, and which heartbeat it is: a run that begins anew has another."""
    try:
        with (run_dir / LEASE_NAME).open("rb") as file:
            raw = file.read(_BEAT.size)
            return (_BEAT.unpack(raw)[0] if len(raw) == _BEAT.size else 0), os.fstat(file.fileno()).st_ino
    except OSError:
        return 0, 0


class Lease:
    """Holds a run directory for this process until it ends, however it ends: the kernel drops the lock.

    The file's first 16 bytes are the heartbeat (steps done, int64; time, float64 seconds since 1970), the rest says
    who the owner is, and which launch started it. patience_s: how long to wait for the owner before. Raises UserError
    when another process holds the directory.

    Attributes: previous_beat (steps and time of the owner before, None without one), restarts (owners of the same
    launch before this one: torchrun does not count those that hosts caused, and knows of no agent before itself).
    """

    def __init__(self, run_dir: Path, launch: str = "", patience_s: float = _PATIENCE_S) -> None:
        self._run_dir = run_dir
        path = run_dir / LEASE_NAME
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not self._lock(patience_s):
            owner = os.pread(self._file, 4096, _BEAT.size).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"{run_dir}: another process trains here ({owner}). Wait for it, stop it, or choose another --run-dir."
            )
        self.previous_beat = self._read()
        before = _owner(run_dir)
        self.restarts: int = before.get("restarts", 0) + 1 if launch and before.get("launch") == launch else 0
        who = {"pid": os.getpid(), "host": socket.gethostname(), "launch": launch, "restarts": self.restarts}
        self._owner = json.dumps(who).encode()
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

    def _lock(self, patience_s: float) -> bool:
        # Whoever asks how the run stands holds a shared lock for a moment; a real owner holds on for longer.
        began = time.monotonic()
        is_told = False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited_s = time.monotonic() - began
                if waited_s > patience_s:
                    return False
                if waited_s > _SILENCE_S and not is_told:
                    print(f"waiting up to {patience_s:g} s for the process that trained here before", flush=True)
                    is_told = True
                time.sleep(0.01)
            else:
                return True

    def _read(self) -> tuple[int, float] | None:
        raw = os.pread(self._file, _BEAT.size, 0)
        return _BEAT.unpack(raw) if len(raw) == _BEAT.size and any(raw) else None
