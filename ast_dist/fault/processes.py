"""The processes of this machine that train together, as the kernel sees them: who is stopped, who is gone."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Fields of /proc/PID/stat after the command's name, which may hold spaces and brackets.
_STATE = 0
_STARTED = 19


@dataclass(frozen=True)
class RankProcess:
    """One rank's process.

    machine: names the kernel and the pid namespace in which `pid` means this process; host names do not tell
    containers apart. started: clock ticks since boot, because process numbers are used again.
    """

    rank: int
    machine: str
    pid: int
    started: str

    @classmethod
    def own(cls, rank: int) -> "RankProcess | None":
        """This process; None where the system has no /proc."""
        stat = _stat(os.getpid())
        if stat is None:
            return None
        machine = (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
        )
        return cls(rank, machine, os.getpid(), stat[_STARTED])

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, reaped by its parent or not."""
        stat = _stat(self.pid)
        return stat is None or stat[_STARTED] != self.started or stat[_STATE] in "ZX"

    @property
    def is_stopped(self) -> bool:
        """Whether a signal stopped it (SIGSTOP); one that a debugger holds does not count."""
        stat = _stat(self.pid)
        return stat is not None and stat[_STARTED] == self.started and stat[_STATE] == "T"

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"


def local_peers(rank: int, gather: Callable[[RankProcess | None], list[RankProcess | None]]) -> list[RankProcess]:
    """The other ranks' processes on this machine. All ranks must call; gather: gives every rank's value."""
    own = RankProcess.own(rank)
    return peers_of(own, gather(own))


def peers_of(own: RankProcess | None, ranks: Iterable[RankProcess | None]) -> list[RankProcess]:
    """The other ranks' processes on the machine of `own`; none where it is unknown."""
    return [peer for peer in ranks if own and peer and peer.machine == own.machine and peer.pid != own.pid]


def kill_stopped(peers: Iterable[RankProcess]) -> list[RankProcess]:
    """SIGKILL those that a signal has stopped, and return them.

    They take in no SIGTERM, and torchrun waits 30 s for that before it kills; nor may they be woken, since they would
    then meet peers that have left.
    """
    killed = []
    for peer in peers:
        if peer.is_stopped:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(peer.pid, signal.SIGKILL)
                killed.append(peer)
    return killed


def age_s(pid: int) -> float | None:
    """Seconds since a process started, those of a suspended machine included; None where that is unknown."""
    stat = _stat(pid)
    if stat is None:
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[_STARTED]) / os.sysconf("SC_CLK_TCK"))


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
