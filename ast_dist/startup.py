"""How long this process took to get to its work, part by part: what recovery from a fault consists of."""

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()
_parts: dict[str, float] = {}


def age_s() -> float:
    """Seconds since the kernel started this process; where it does not say, since this module was imported."""
    try:
        # The 22nd value of proc(5)'s stat, counted behind the name, which may hold anything: clock ticks since boot.
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.monotonic() - _IMPORTED


def note(part: str) -> None:
    """Note that the process has got so far. part: its name, a key of `parts`."""
    _parts[part] = round(age_s(), 3)


def parts() -> dict[str, float]:
    """When the process started (began_at, seconds since 1970), and the seconds from then to each part noted."""
    return {"began_at": round(time.time() - age_s(), 3), **_parts}
