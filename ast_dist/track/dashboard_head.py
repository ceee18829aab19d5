"""The dashboard's head: the run's name and state, how far it is, the facts of its status, and what is wrong."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from ast_dist.track.curves import BLUE, GREEN, GREY, ORANGE, PALE, VERMILLION, Record
from ast_dist.track.progress import checkpoint_age_s, duration

STATE_COLORS = {"running": BLUE, "finished": GREEN, "paused": ORANGE, "failed": VERMILLION, "stopped": VERMILLION}
COLUMNS = 3
LABEL_PT, VALUE_PT, NOTE_PT, NAME_PT = 18, 25, 17, 32
LEFT_PX, RIGHT_PX = 40, 1160
FACTS_TOP_PX, FACT_PX = 195, 116
WRONG_LINES = 3
HEAD_PX = FACTS_TOP_PX + 5 * FACT_PX + 10 + WRONG_LINES * 32


class Fact(NamedTuple):
    """A value of the status, the label above it, and a note below it, which may be empty."""

    label: str
    value: str
    note: str = ""


def draw_head(figure: Figure, name: str, record: Record, damage: Sequence[str], now: datetime) -> None:
    """Draw the head into the figure's uppermost HEAD_PX pixels; what is too long for its place is cut with "…".

    name: of the run. damage: what could not be read of its files.
    """
    progress = record.progress
    state = str(progress.get("state"))
    color = STATE_COLORS.get(state, GREY)
    ink = "black" if color == ORANGE else "white"
    chip = _put(figure, RIGHT_PX - 20, 52, state.upper(), 24, 420, ha="right", color=ink, fontweight="bold")
    chip.set_bbox({"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": color})
    left_of_chip = RIGHT_PX - 20 - chip.get_window_extent(_renderer(figure)).width - 40
    _put(figure, LEFT_PX, 52, name, NAME_PT, left_of_chip - LEFT_PX, fontweight="bold")
    _put(figure, LEFT_PX, 106, f"policy {progress.get('policy') or '-'}", LABEL_PT, 550, color=GREY)
    drawn = f"drawn {now:%Y-%m-%d %H:%M:%S} UTC"
    _put(figure, RIGHT_PX, 106, drawn, LABEL_PT, 540, ha="right", color=GREY)
    _draw_bar(figure, done_share(record), color)
    width = (RIGHT_PX - LEFT_PX) / COLUMNS
    for number, fact in enumerate(status_facts(record, now)):
        left, top = LEFT_PX + width * (number % COLUMNS), FACTS_TOP_PX + FACT_PX * (number // COLUMNS)
        _put(figure, left, top, fact.label, LABEL_PT, width - 20, color=GREY)
        _put(figure, left, top + 33, fact.value, VALUE_PT, width - 20, fontweight="bold")
        if fact.note:
            _put(figure, left, top + 64, fact.note, NOTE_PT, width - 20, color=GREY)
    _draw_wrong(figure, wrong(record, damage), state)


def done_share(record: Record) -> float:
    """Share of the epochs that is done, within an epoch by its rows."""
    passes = max(float(record.progress.get("epoch") or 0), record.last("progress/epoch") or 0.0)
    return min(1.0, passes / max(1.0, float(record.progress.get("epochs") or 1)))


def status_facts(record: Record, now: datetime) -> list[Fact]:
    """The facts of the head, row by row; "-" is unknown or not there yet."""
    progress, starts = record.progress, record.starts
    has_sessions = any(not row.get("restart") for row in starts[1:])
    has_restarts = any(row.get("restart") for row in starts[1:])
    # A session that a person begins may come days after the one before: that is no recovery.
    recoveries = [row["recovery_s"] for row in record.sessions if row.get("restart") and "recovery_s" in row]
    age_s = checkpoint_age_s(progress, now)
    verified_s = _age_s(progress.get("checkpoint_verified_at"), now)
    hours = progress.get("session_hours")
    repeated = sum(row.get("steps_repeated") or 0 for row in starts)
    damaged, nonfinite = _damaged(record), record.last("train/steps_nonfinite")
    return [
        Fact("epochs done", f"{_known(progress, 'epoch')} of {_known(progress, 'epochs')}"),
        Fact("step", _known(progress, "step", "{:,}")),
        Fact("time spent", duration(progress.get("total_s")), "in all sessions"),
        Fact("best val top-1", _known(progress, "best_acc1", "{:.2f} %")),
        Fact("current val top-1", _known(progress, "last_acc1", "{:.2f} %")),
        Fact("time left", *_time_left(progress)),
        Fact("session", _known(progress, "sessions"), "begun at dashed lines" if has_sessions else ""),
        Fact("restarts survived", _known(progress, "restarts"), "at dotted lines" if has_restarts else ""),
        Fact("sessions to come", _interval_of_sessions(progress), f"of {hours:g} h each" if hours else ""),
        Fact("last checkpoint", _known(progress, "checkpoint"), "" if age_s is None else f"saved {_ago(age_s)}"),
        Fact("checkpoint verified", "never" if verified_s is None else _ago(verified_s), "read back against SHA-256"),
        Fact(
            "steps repeated",
            f"{repeated:,}" if starts else "-",
            f"longest recovery {max(recoveries):.1f} s" if recoveries else "",
        ),
        Fact("warnings", _known(progress, "warnings", "{:,}"), "in this session" if "warnings" in progress else ""),
        Fact("damaged samples", f"{damaged:,}" if damaged else "none named", "left out" if damaged else ""),
        Fact("non-finite steps", "-" if nonfinite is None else f"{nonfinite:,.0f}", "left out" if nonfinite else ""),
    ]


def wrong(record: Record, damage: Sequence[str]) -> list[str]:
    """What is wrong or was warned of, the gravest first; empty where nothing was told."""
    progress = record.progress
    last_warning = progress.get("last_warning")
    told = [*damage, str(progress.get("message") or ""), f"Last warning: {last_warning}" if last_warning else ""]
    return [text for text in told if text]


def _time_left(progress: Any) -> tuple[str, str]:
    left, low, high = (progress.get(key) for key in ("eta_s", "eta_low_s", "eta_high_s"))
    if progress.get("state") == "finished":
        return "none", ""
    interval = f"{_coarse(low)} to {_coarse(high)}" if low is not None and high is not None else ""
    return duration(left), interval if left is not None else ""


def _interval_of_sessions(progress: Any) -> str:
    low, high = progress.get("sessions_left_low"), progress.get("sessions_left_high")
    if low is None or high is None:
        return "none" if progress.get("state") == "finished" else "-"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _damaged(record: Record) -> int:
    """Samples named as damaged, in training by the warnings, in validation by the last evaluation."""
    prefix = "damaged sample left out: "
    told = {row["text"] for row in record.sessions if row.get("event") == "warning" and "text" in row}
    return sum(str(text).startswith(prefix) for text in told) + int(record.last("val/samples_damaged") or 0)


def _known(progress: Any, key: str, form: str = "{}") -> str:
    value = progress.get(key)
    return "-" if value is None else form.format(value)


def _age_s(at: Any, now: datetime) -> float | None:
    return checkpoint_age_s({"checkpoint_at": at}, now)


def _ago(seconds: float) -> str:
    return f"{_coarse(seconds)} ago"


def _coarse(seconds: float) -> str:
    """As `duration`, but whole days where there are many."""
    return duration(seconds) if seconds < 3 * 86400 else f"{seconds / 86400:.0f} d"


def _draw_wrong(figure: Figure, told: Sequence[str], state: str) -> None:
    top = FACTS_TOP_PX + 5 * FACT_PX - 2
    if not told:
        _put(figure, LEFT_PX, top, "Nothing wrong was reported.", NOTE_PT, RIGHT_PX - LEFT_PX, color=GREY)
        return
    lines = [line for text in told for line in _wrapped(figure, " ".join(text.split()), RIGHT_PX - LEFT_PX)]
    if len(lines) > WRONG_LINES:
        lines = [*lines[: WRONG_LINES - 1], f"{lines[WRONG_LINES - 1]} …"]
    color = GREY if state in ("finished", "paused") and len(told) == 1 and "arning" not in told[0] else VERMILLION
    for number, line in enumerate(lines):
        _put(figure, LEFT_PX, top + 32 * number, line, NOTE_PT, RIGHT_PX - LEFT_PX, color=color)


def _draw_bar(figure: Figure, share: float, color: str) -> None:
    height = figure.bbox.height
    for part, fill in ((1.0, PALE), (share, color)):
        width = part * (RIGHT_PX - LEFT_PX) / figure.bbox.width
        bar = Rectangle((LEFT_PX / figure.bbox.width, 1 - 150 / height), width, 16 / height, facecolor=fill)
        bar.set_transform(figure.transFigure)
        figure.add_artist(bar)


def _put(figure: Figure, x: float, y: float, text: str, size: float, max_px: float, **options: Any) -> Text:
    """Write one line, its middle y pixels below the figure's top, in at most max_px pixels; "…" stands for the rest."""
    # Names of runs and files may hold $ and _, which are no formulas.
    options = {"va": "center", "fontsize": size, "parse_math": False, **options}
    written = figure.text(x / figure.bbox.width, 1 - y / figure.bbox.height, text, **options)
    written.set_text(_cut(figure, written, text, max_px))
    return written


def _cut(figure: Figure, written: Text, text: str, max_px: float) -> str:
    """The longest beginning of a text that fits, with "…" where something is left out."""

    def fits(candidate: str) -> bool:
        written.set_text(candidate)
        return bool(written.get_window_extent(_renderer(figure)).width <= max_px)

    if fits(text):
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle] + "…") else (low, middle - 1)
    return text[:low] + "…"


def _wrapped(figure: Figure, text: str, max_px: float) -> list[str]:
    """A text in lines of at most max_px pixels, broken between words."""
    probe = figure.text(0, 0, "", fontsize=NOTE_PT, parse_math=False)
    lines: list[str] = []
    rest = text
    while rest and len(lines) <= WRONG_LINES:
        part = _cut(figure, probe, rest, max_px)
        if part == rest:
            lines.append(rest)
            break
        end = part.rstrip("…").rfind(" ")
        end = end if end > 0 else len(part) - 1
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    probe.remove()
    return lines


def _renderer(figure: Figure) -> Any:
    return figure.canvas.get_renderer()  # type: ignore[attr-defined]
