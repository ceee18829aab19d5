"""Where the run stands: progress.json for programs, STATUS.txt for people.

Both are replaced atomically, so a reader sees the old or the new one, never a half. Nothing here needs torch: these
are what `ast_dist.status` and the dashboard read.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ast_dist.errors import UserError
from ast_dist.track.history import as_number, plain

PROGRESS_NAME = "progress.json"
STATUS_NAME = "STATUS.txt"
# What tells of the time left; None is unknown.
LEFT_KEYS = ("eta_s", "eta_low_s", "eta_high_s", "sessions_left_low", "sessions_left_high")
NUMBER_KEYS = (
    *("epoch", "epochs", "step", "num_samples", "best_acc1", "last_acc1", "total_s", "gpu_joules"),
    *("sessions", "restarts", "session_hours", "warnings", *LEFT_KEYS),
)
LEASE_NAME = ".lease"  # rank 0 holds an exclusive flock on it as long as it runs


def write_progress(run_dir: Path | str, progress: Mapping[str, Any]) -> None:
    """Replace RUN/progress.json and RUN/STATUS.txt.

    progress: state (running, finished, paused, failed), epoch (completed), epochs, step, best_acc1 and last_acc1
    (percent, None before the first evaluation), sessions, restarts, total_s, eta_s (seconds left), eta_low_s and
    eta_high_s (its interval, `track/time_left.py`), sessions_left_low and sessions_left_high (sessions that must still
    be started after the present one; None without session_hours), session_hours, checkpoint, checkpoint_at (ISO time),
    checkpoint_verified_at (ISO time at which all its files were last read back and agreed with their SHA-256),
    warnings (how many in this session), last_warning, gpu_joules (None where they are not measured), policy, message.
    NaN is written as null. `updated_at` is added.
    Raises OSError when the disk refuses.
    """
    stamped = {**plain(progress), "updated_at": datetime.now(UTC).isoformat(timespec="seconds")}
    text = json.dumps(stamped, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    replace_atomically(Path(run_dir) / PROGRESS_NAME, text.encode())
    replace_atomically(Path(run_dir) / STATUS_NAME, status_text(stamped).encode())


def read_progress(run_dir: Path | str) -> dict[str, Any]:
    """Read RUN/progress.json; what should be a number and is none is None.

    Raises UserError when the folder, the file or its content is not a run's.
    """
    path = Path(run_dir) / PROGRESS_NAME
    if not path.parent.is_dir():
        raise UserError(f"{run_dir}: no such folder. Name the folder that --run-dir named.")
    try:
        progress = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{run_dir}: no {PROGRESS_NAME} in this folder, so it is no run, or its training has not begun. "
            "Name the folder that --run-dir named."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). The next save of the run writes it anew.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if not isinstance(progress, dict):
        raise UserError(f"{path}: expected an object, found a {type(progress).__name__}.")
    odd = [key for key in NUMBER_KEYS if as_number(progress.get(key)) is None]
    return {key: None if key in odd else value for key, value in progress.items()}


def replace_atomically(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path` in one step. Not fsynced: a view must not wait for the disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def lease_is_held(run_dir: Path | str) -> bool:
    """Whether a live process on this machine holds RUN/.lease, that is, trains in this run directory.

    Held for microseconds as a shared lock while it looks; the file is not made and not changed.
    """
    try:
        descriptor = os.open(Path(run_dir) / LEASE_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True  # held; or a file system without locks, where progress.json is all there is to believe
    finally:
        os.close(descriptor)
    return False


def as_it_is_now(run_dir: Path | str, progress: Mapping[str, Any]) -> dict[str, Any]:
    """The progress, with state "stopped" where it says "running" but no process holds the run.

    A process that is killed cannot write that it ended; its lease ends with it. Time left is then unknown, and the
    message says how to go on.
    """
    if progress.get("state") != "running" or lease_is_held(run_dir):
        return dict(progress)
    saved = progress.get("checkpoint")
    return {
        **progress,
        "state": "stopped",
        **dict.fromkeys(LEFT_KEYS),
        "message": "No process trains here: killed, or about to restart. "
        f"The same command again goes on from {saved or 'the start, since nothing was saved yet'}.",
    }


def status_text(progress: Mapping[str, Any], now: datetime | None = None) -> str:
    """One short screen for a person. With `now`, the last checkpoint's age is told beside its name."""

    def known(key: str, form: str = "{}") -> str:
        value = progress.get(key)
        return "-" if value is None else form.format(value)

    saved = known("checkpoint")
    for key, said in (("checkpoint_at", "saved"), ("checkpoint_verified_at", "read back")):
        age_s = _age_s(progress.get(key), now) if now else None
        if age_s is not None:
            saved += f", {said} {duration(age_s)} ago"
        elif progress.get(key):
            saved += f", {said} at {progress[key]}"
    count = progress.get("warnings")
    fields = {
        "run": known("run_dir"),
        "state": known("state") + (f" (policy {progress['policy']})" if progress.get("policy") else ""),
        "epoch": f"{known('epoch')} of {known('epochs')}, step {known('step', '{:,}')}",
        "val top-1": f"best {known('best_acc1', '{:.2f} %')}, last {known('last_acc1', '{:.2f} %')}",
        "time": ", ".join(filter(None, (f"{duration(progress.get('total_s'))} spent", time_left_text(progress)))),
        "sessions": ", ".join(filter(None, (known("sessions"), sessions_left_text(progress)))),
        "restarts": known("restarts"),
        "GPU joules": "not measured" if progress.get("gpu_joules") is None else known("gpu_joules", "{:,.0f}"),
        "checkpoint": saved,
        "warnings": f"{count} in this session, the last: {known('last_warning')}" if count else "",
        "message": known("message") if progress.get("message") else "",
        "updated": "" if now else known("updated_at"),
    }
    return "".join(f"{name:<12}{value}\n" for name, value in fields.items() if value)


def time_left_text(progress: Mapping[str, Any]) -> str:
    """ "0:31 left (0:28 to 0:40)"; without an interval "0:31 left (estimate)"; "" where nothing is left or known."""
    left_s, low_s, high_s = (progress.get(key) for key in ("eta_s", "eta_low_s", "eta_high_s"))
    if not left_s:
        return ""
    between = "estimate" if low_s is None or high_s is None else f"{duration(low_s)} to {duration(high_s)}"
    return f"{duration(left_s)} left ({between})"


def sessions_left_text(progress: Mapping[str, Any]) -> str:
    """ "2 to 3 more of 8.5 h"; "" where nothing is left or known. The present session is not among them."""
    low, high, hours = (progress.get(key) for key in ("sessions_left_low", "sessions_left_high", "session_hours"))
    if low is None or high is None or not progress.get("eta_s"):
        return ""
    if not high:
        return "the present one suffices"
    count = f"{low}" if low == high else f"{low} to {high}"
    return f"{count} more" + (f" of {hours:g} h" if hours else "")


def checkpoint_age_s(progress: Mapping[str, Any], now: datetime) -> float | None:
    """Seconds since the last checkpoint, or None when there is none or its time cannot be read."""
    return _age_s(progress.get("checkpoint_at"), now)


def _age_s(moment: Any, now: datetime) -> float | None:
    """Seconds since an ISO time; None where it cannot be read."""
    try:
        then = datetime.fromisoformat(moment)
    except (TypeError, ValueError):
        return None
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


def duration(seconds: float | None) -> str:
    """Seconds as m:ss, h:mm:ss or d days: 31 → 0:31, 3723 → 1:02:03. None → "-"."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours}:{minutes:02}:{whole % 60:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
