"""What this process and all its descendants have used, from /proc."""

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def cpu_s() -> float:
    """CPU seconds, user and system, of this process and all descendants, those that ended and were waited for too."""
    stats = _stats()
    # Fields 14 to 17 of proc(5): user and system time, own and of children waited for; 11 to 14 after the name.
    return sum(sum(map(int, stats[pid][11:15])) for pid in _tree(stats)) / _TICKS_PER_S


def memory_mb() -> tuple[float, float]:
    """Peak resident memory and proportional memory now, MB, each summed over this process and its descendants.

    The first counts a page that processes share once for each, the second splits it among them.
    """
    peak_kb = proportional_kb = 0
    for pid in _tree(_stats()):
        peak_kb += _field_kb(_PROC / str(pid) / "status", "VmHWM:")
        proportional_kb += _field_kb(_PROC / str(pid) / "smaps_rollup", "Pss:")
    return peak_kb / 1e3, proportional_kb / 1e3


def busy_s(cpus: list[int]) -> float:
    """Seconds that these CPUs were not idle, whoever used them, the host's other guests too."""
    total = 0
    for line in (_PROC / "stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in {f"cpu{cpu}" for cpu in cpus}:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / _TICKS_PER_S


def _stats() -> dict[int, list[str]]:
    """The fields of every process's stat after its name, which may hold spaces: state, parent, …"""
    found = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                found[int(folder.name)] = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it ended just now
                continue
    return found


def _tree(stats: dict[int, list[str]]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(pid)
    found = [os.getpid()]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _field_kb(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
