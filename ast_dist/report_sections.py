"""The report of one run, part by part, as HTML."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from ast_dist.report_curves import marks_of, panels
from ast_dist.report_page import bullets, details, facts, paragraph, table, verbatim
from ast_dist.report_plots import figure, legend_of_marks
from ast_dist.report_run import Row, Run, as_number, default_settings, flat
from ast_dist.track.progress import duration

NOT_MEASURED = "not measured"
_DAMAGED = "damaged sample left out: "
_MAX_LISTED = 100
_OPTIONAL_FACTS = ("best EMA top-1", "sessions left")
_MAX_EPOCH_ROWS = 300
# Keys of an epoch's row, their headings, decimals, and what they are multiplied by.
_EPOCH_COLUMNS: tuple[tuple[str, str, int, float], ...] = (
    ("global_step", "step", 0, 1),
    ("val/acc1", "val top-1, %", 2, 1),
    ("val/ema_acc1", "EMA top-1, %", 2, 1),
    ("val/acc5", "val top-5, %", 2, 1),
    ("val/loss", "val loss", 4, 1),
    ("train/acc1_all", "train top-1 (all), %", 2, 1),
    ("gate/rate", "rate", 3, 1),
    ("gate/rate_target", "target", 3, 1),
    ("gate/threshold", "threshold", 4, 1),
    ("cost/samples_skipped", "skipped so far", 0, 1),
    ("cost/flops_saved", "FLOPs saved, %", 1, 100),
    ("cost/joules_saved", "joules saved, %", 1, 100),
    ("cost/epoch_gpu_joules", "training, J", 0, 1),
    ("cost/eval_gpu_joules", "evaluation, J", 0, 1),
    ("perf/images_per_s", "images/s", 0, 1),
    ("perf/data_wait", "data wait, %", 1, 100),
    ("perf/mem_gb", "memory, GB", 2, 1),
    ("perf/mfu", "MFU, %", 1, 100),
    ("perf/epoch_s", "time, s", 1, 1),
    ("val/samples_damaged", "damaged in val", 0, 1),
)


def status(run: Run) -> str:
    """Where the run stands, and what is wrong with it or with its files."""
    progress = run.progress
    alarms = [*run.notes]
    message = str(progress.get("message") or "")
    if message and progress.get("state") in ("failed", "stopped"):
        alarms.append(message)
    elif message:
        alarms += [] if message in alarms else [message]
    return facts(status_facts(run)) + bullets(alarms, "alarm")


def status_facts(run: Run) -> dict[str, str]:
    """The status in names and values; "-" is unknown or not there yet."""
    progress = run.progress
    left = duration(as_number(progress.get("eta_s")))
    low, high = as_number(progress.get("eta_low_s")), as_number(progress.get("eta_high_s"))
    if low is not None and high is not None and high > 0:
        left += f" ({duration(low)} to {duration(high)})"
    fewest, most = (known(progress, f"sessions_left_{end}") for end in ("low", "high"))
    idle_w = run.last("cost/gpu_idle_w")
    found = {
        "state": known(progress, "state"),
        "policy": policy(run),
        "epochs done": f"{known(progress, 'epoch')} of {known(progress, 'epochs')}",
        "step": known(progress, "step", "{:,}"),
        "best val top-1": percent(best_acc1(run)),
        "last val top-1": percent(run.last("val/acc1")),
        "best EMA top-1": percent(run.best("val/ema_acc1")),
        "time spent": duration(as_number(progress.get("total_s"))),
        "time left": left,
        "sessions": known(progress, "sessions"),
        "sessions left": fewest if fewest == most else f"{fewest} to {most}",
        "restarts survived": known(progress, "restarts"),
        "warnings": f"{len(run.warnings):,}",
        "last checkpoint": known(progress, "checkpoint"),
        "saved at": moment(progress.get("checkpoint_at")),
        "verified at": moment(progress.get("checkpoint_verified_at")),
        "samples skipped": samples_skipped(run),
        "FLOPs saved": percent(run.last("cost/flops_saved"), 100),
        "joules saved": percent(run.last("cost/joules_saved"), 100, NOT_MEASURED),
        "GPU energy used": energy(run.last("cost/gpu_joules")),
        "GPUs' idle power": NOT_MEASURED if idle_w is None else f"{idle_w:,.1f} W",
    }
    # Most runs keep no average, and have no limit to a session.
    return {name: value for name, value in found.items() if value != "-" or name not in _OPTIONAL_FACTS}


def curves(run: Run) -> str:
    """All plots, and the epochs in numbers."""
    plots = "".join(figure(panel) for panel in panels(run))
    return legend_of_marks(marks_of(run)) + f'<div class="plots">\n{plots}</div>\n' + _epochs(run)


def faults(run: Run, damaged: int | None) -> str:
    """The sessions and restarts, what they cost, and what went wrong. damaged: samples, as the checkpoint counts."""
    starts = _with_recoveries(run.sessions)
    if not starts:
        return paragraph("sessions.jsonl tells of no start.")
    sessions = len({str(start.get("session")) for start in starts})
    restarts = sum((as_number(start.get("restart")) or 0) > 0 for start in starts)
    repeated = sum(int(as_number(start.get("steps_repeated")) or 0) for start in starts)
    rollbacks = [row for row in run.sessions if row.get("event") == "rollback"]
    # A session that a person begins may come days after the one before: that is no recovery.
    recoveries = [s for row in starts if row.get("restart") and (s := as_number(row.get("recovery_s"))) is not None]
    longest = f"; the longest recovery took {max(recoveries):.1f} s" if recoveries else ""
    told = (
        f"{_count(sessions, 'session')}, {_count(restarts, 'restart')} and {_count(len(rollbacks), 'roll-back')} "
        f"survived; {_count(repeated, 'step')} repeated{longest}."
    )
    headings = ("session", "restart", "started", "from", "processes", "at step", "steps repeated", "recovery, s")
    rows = [
        (
            known(start, "session"),
            known(start, "restart"),
            moment(start.get("started_at")),
            known(start, "checkpoint") if start.get("checkpoint") else "the beginning",
            known(start, "world_size"),
            known(start, "resumed_from_step", "{:,}"),
            known(start, "steps_repeated", "{:,}"),
            known(start, "recovery_s", "{:.1f}"),
        )
        for start in starts[-_MAX_LISTED:]
    ]
    left_out = len(starts) - len(rows)
    caption = "Every start of the training's processes"
    caption = f"The last {len(rows)} of {len(starts):,} starts; sessions.jsonl has all" if left_out else caption
    return (
        paragraph(told)
        + table(caption, headings, rows, numbers=range(4, 8))
        + _listed("Roll-backs after losses that were not finite", [_rollback(row) for row in rollbacks])
        + _listed("Checkpoints set aside as damaged", [path.name for path in run.set_aside])
        + _damage(run, damaged)
        + _listed("Warnings", [text for text in run.warnings if not text.startswith(_DAMAGED)])
    )


def configuration(run: Run) -> str:
    """What was set otherwise than by default, and all of it."""
    defaults = default_settings()
    settings = {name: value for name, value in flat(run.config).items() if not name.startswith("manifest.")}
    if not settings:
        return paragraph("config.yaml holds no settings.")
    missing = object()
    rows = [
        (name, shown(value), "-" if (default := defaults.get(name, missing)) is missing else shown(default))
        for name, value in settings.items()
        if value != defaults.get(name, missing)
    ]
    whole = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return (
        table("Settings that differ from their defaults", ("setting", "value", "default"), rows)
        + details("The whole config.yaml", verbatim(whole))
        + _environment(run)
    )


def _environment(run: Run) -> str:
    """Machine, versions and command line of the newest session, and which versions changed on the way."""
    if not run.env:
        return paragraph("env.json holds nothing on the machine and its versions.")
    rows = [(str(name), shown(value)) for name, value in run.env.items() if name != "argv"]
    argv = run.env.get("argv")
    command = " ".join(str(word) for word in argv) if isinstance(argv, list) else ""
    return (
        table("Machine and versions, newest session", ("what", "value"), rows)
        + bullets(_changed_versions(run.starts))
        + (details("Its command line", verbatim(command)) if command else "")
    )


def _changed_versions(starts: Sequence[Row]) -> list[str]:
    told, before = [], None
    for start in starts:
        versions = start.get("versions")
        if not isinstance(versions, dict) or not versions:
            continue
        if before is not None and versions != before:
            changed = sorted(name for name in {*before, *versions} if before.get(name) != versions.get(name))
            words = ", ".join(f"{name} {before.get(name, '-')} → {versions.get(name, '-')}" for name in changed)
            told.append(f"Session {known(start, 'session')} went on with other versions: {words}")
        before = versions
    return told


def _epochs(run: Run) -> str:
    epochs = run.epochs
    if not epochs:
        return paragraph("No epoch is done yet.")
    columns = [column for column in _EPOCH_COLUMNS if any(as_number(row.get(column[0])) is not None for row in epochs)]

    def cell(row: Row, key: str, decimals: int, factor: float) -> str:
        value = as_number(row.get(key))
        return "-" if value is None else f"{value * factor:,.{decimals}f}"

    rows = [
        (known(row, "epoch"), *(cell(row, key, decimals, factor) for key, _, decimals, factor in columns))
        for row in epochs
    ]
    left_out = len(rows) - _MAX_EPOCH_ROWS
    caption = "Epochs" if left_out <= 0 else f"The last {_MAX_EPOCH_ROWS} of {len(rows)} epochs; metrics.jsonl has all"
    body = table(
        caption, ("epoch", *(column[1] for column in columns)), rows[-_MAX_EPOCH_ROWS:], range(len(columns) + 1)
    )
    return details("The epochs in numbers", body)


def _with_recoveries(sessions: Sequence[Row]) -> list[dict[str, Any]]:
    """The starts, each with the recovery_s that was measured at its first step."""
    starts: list[dict[str, Any]] = []
    for row in sessions:
        if "event" not in row:
            starts.append(dict(row))
        elif row["event"] == "first_step" and starts:
            starts[-1].setdefault("recovery_s", row.get("recovery_s"))
    return starts


def _damage(run: Run, damaged: int | None) -> str:
    named = [text.removeprefix(_DAMAGED) for text in run.warnings if text.startswith(_DAMAGED)]
    in_val = max((int(as_number(row.get("val/samples_damaged")) or 0) for row in run.epochs), default=0)
    counted = "not known, since no checkpoint can be read" if damaged is None else f"{damaged:,} left out in training"
    text = f"Damaged samples: {counted}; {in_val:,} in an evaluation at most."
    return paragraph(text) + _listed("Damaged samples by name", list(dict.fromkeys(named)))


def _rollback(row: Row) -> str:
    where = f"epoch {known(row, 'epoch')}, step {known(row, 'step', '{:,}')}"
    return f"session {known(row, 'session')}: in {where}, back to the last checkpoint"


def _listed(title: str, texts: Sequence[str]) -> str:
    """A folded list; nothing where there is nothing to tell."""
    if not texts:
        return ""
    more = len(texts) - _MAX_LISTED
    body = bullets([*texts[:_MAX_LISTED], *([f"… and {more:,} more"] if more > 0 else [])])
    return details(f"{title}: {len(texts):,}", body)


def _count(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"


# Values ------------------------------------------------------------------------------------------------------------


def known(row: Row, key: str, form: str = "{}") -> str:
    """A value of a row as text, "-" where it is not there; numbers in `form`, anything else as it is."""
    value = row.get(key)
    if value is None:
        return "-"
    return form.format(value) if as_number(value) is not None else str(value)


def shown(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else str(value)


def percent(value: float | None, factor: float = 1.0, absent: str = "-") -> str:
    """A number as a percentage."""
    return absent if value is None else f"{value * factor:.2f} %" if factor == 1.0 else f"{value * factor:.1f} %"


def energy(joules: float | None) -> str:
    """Joules as people write them: 3.808 MJ."""
    if joules is None:
        return NOT_MEASURED
    size, unit = next(((s, u) for s, u in ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")) if abs(joules) >= s), (1.0, "J"))
    return f"{joules / size:.4g} {unit}"


def moment(text: Any) -> str:
    """A time of the run's files, to the second, in UTC; what is no time comes back as it is."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return "-" if text is None else str(text)
    return f"{found.astimezone(UTC) if found.tzinfo else found:%Y-%m-%d %H:%M:%S} UTC"


def policy(run: Run) -> str:
    """The name of the policy."""
    return str(run.progress.get("policy") or run.setting("gate.policy") or "-")


def best_acc1(run: Run) -> float | None:
    """The best validation top-1, percent: of the rows or, where rows were lost, of progress.json."""
    found = [run.best("val/acc1"), as_number(run.progress.get("best_acc1"))]
    return max((value for value in found if value is not None), default=None)


def samples_skipped(run: Run) -> str:
    """Samples that full training of as many epochs would have trained and this run did not."""
    skipped = run.last("cost/samples_skipped")
    if skipped is None:
        return "-"
    _, shares = run.skipped_share()
    return f"{skipped:,.0f}" + (f" ({100 * shares[-1]:.1f} %)" if shares.size else "")
