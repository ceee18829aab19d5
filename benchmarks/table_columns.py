"""What each table of README shows: its result file, its rows, and how a column's values are written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column: its heading, the row's key, and how a value is shown."""

    heading: str
    key: str
    show: Callable[[Any], str]


@dataclass(frozen=True)
class Table:
    """A table: the rows of one measure in one result file."""

    file: str
    measure: str
    columns: tuple[Column, ...]


def _text(value: Any) -> str:
    return str(value)


def _count(value: Any) -> str:
    return f"{value:,.0f}"


def _decimal(value: Any) -> str:
    return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.3g}"


def _percent(value: Any) -> str:
    percent = 100.0 * value
    if 0.0 < percent < 0.1:
        return f"{percent:.2f} %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %"


def _ratio(value: Any) -> str:
    return f"{value:.2f}"


def _yes(value: Any) -> str:
    return "yes" if value else "no"


TABLES: dict[str, Table] = {
    "gpu-step": Table(
        "gpu",
        "training_step",
        (
            Column("model", "model", _text),
            Column("batch", "batch_size", _count),
            Column("compiled", "compiled", _yes),
            Column("images/s", "images_per_s", _count),
            Column("step, ms", "step_ms", _decimal),
            Column("MFU", "mfu", _percent),
            Column("of peak, TFLOP/s", "peak_tflops", _count),
            Column("peak memory, GB", "memory_gb", _decimal),
            Column("gate, ms", "gate_ms", _decimal),
            Column("gate, share of step", "gate_share", _percent),
        ),
    ),
    "gpu-end-to-end": Table(
        "gpu",
        "end_to_end",
        (
            Column("model", "model", _text),
            Column("batch", "batch_size", _count),
            Column("decoder", "decoder", _text),
            Column("threads", "threads", _count),
            Column("JPEG, kB", "jpeg_kb", _count),
            Column("images/s", "images_per_s", _count),
            Column("waiting for data", "data_wait", _percent),
            Column("loader alone, images/s", "decode_images_per_s", _count),
        ),
    ),
    "gpu-loader": Table(
        "gpu",
        "gpu_loader",
        (
            Column("decoding", "way", _text),
            Column("CPU cores", "cores", _count),
            Column("batch", "batch_size", _count),
            Column("images/s", "images_per_s", _count),
            Column("× training", "times_training", _decimal),
            Column("CPU, ms an image", "cpu_ms_per_image", _ratio),
        ),
    ),
    "gpu-resume": Table(
        "gpu",
        "exact_resume",
        (
            Column("model", "model", _text),
            Column("steps", "steps", _count),
            Column("killed and resumed at step", "resumed_from_step", _count),
            Column("all state identical", "identical", _yes),
            Column("SHA-256", "sha256", lambda value: f"`{value[:16]}…`"),
            Column("resumed", "sha256_resumed", lambda value: f"`{value[:16]}…`"),
        ),
    ),
    "gpu-checkpoint": Table(
        "gpu",
        "checkpoint_stall",
        (
            Column("model", "model", _text),
            Column("checkpoint, MB", "checkpoint_mb", _count),
            Column("stall, ms", "stall_ms", _count),
            Column("merge, ms", "merge_ms", _decimal),
            Column("write, ms", "write_ms", _count),
            Column("commit, ms", "commit_ms", _count),
        ),
    ),
    "gpu-gate": Table(
        "gpu",
        "gate_per_epoch",
        (
            Column("samples", "samples", _count),
            Column("order, ms", "order_ms", _count),
            Column("plan, ms", "plan_ms", _count),
            Column("merge, ms", "merge_ms", _count),
        ),
    ),
    "cifar10": Table(
        "cifar10",
        "epoch",
        (
            Column("policy", "policy", _text),
            Column("epoch", "epoch", _count),
            Column("samples trained", "samples_trained", _count),
            Column("of them decoded", "samples_read", _count),
            Column("images/s", "images_per_s", _count),
            Column("step, ms", "step_ms", _count),
            Column("waiting for data", "data_wait", _percent),
            Column("epoch, s", "epoch_s", _count),
            Column("top-1, %", "acc1", _decimal),
        ),
    ),
    "threshold": Table(
        "threshold",
        "summary",
        (
            Column("rule", "rule", _text),
            Column("batch", "batches", _text),
            Column("runs", "runs", _count),
            Column("worst epoch", "worst_epoch_error", _percent),
            Column("per step, RMS", "rms_step_error", _percent),
            Column("per 50 steps, RMS", "rms_50_error", _percent),
            Column("runs that settle", "settled", _percent),
            Column("all settled by step", "settled_step", _count),
            Column("steps at a limit", "share_at_limit", _percent),
            Column("batch's top missed", "share_top_missed", _percent),
        ),
    ),
    "threshold-cost": Table(
        "gate_cost",
        "cost",
        (
            Column("model", "model", _text),
            Column("batch", "batch", _count),
            Column("step, ms", "step_ms", _decimal),
            Column("gate, ms", "gate_ms", _decimal),
            Column("gate, share of step", "gate_share", _percent),
            Column("all-reduce, bytes", "all_reduce_bytes", _count),
        ),
    ),
    "loader": Table(
        "loader",
        "loader",
        (
            Column("loader", "loader", _text),
            Column("output", "output", _text),
            Column("images/s", "images_per_s", _count),
            Column("× ImageFolder", "ratio_to_imagefolder", _ratio),
            Column("CPU, ms an image", "cpu_ms_per_image", _ratio),
            Column("× ImageFolder by CPU", "cpu_ratio_to_imagefolder", _ratio),
            Column("of the decode limit", "share_of_decode_limit", _percent),
            Column("first batch, s", "first_batch_s", _ratio),
            Column("resume, s", "resume_s", _ratio),
            Column("resumes by", "resume_method", _text),
            Column("memory, MB", "pss_mb", _count),
        ),
    ),
    "loader-limits": Table(
        "loader",
        "loader_limit",
        (
            Column("limit", "loader", _text),
            Column("decoder", "decoder", _text),
            Column("images/s", "images_per_s", _count),
            Column("CPU, ms an image", "cpu_ms_per_image", lambda value: f"{value:.3g}"),
        ),
    ),
    "loader-keep": Table(
        "loader",
        "loader_keep",
        (
            Column("loader", "loader", _text),
            Column("keep rate", "keep_rate", _percent),
            Column("full epoch, s", "full_epoch_s", _ratio),
            Column("epoch, s", "epoch_s", _ratio),
            Column("time, of the full epoch's", "wall_ratio", _percent),
            Column("CPU, of the full epoch's", "cpu_ratio", _percent),
        ),
    ),
    "loader-resized": Table(
        "loader",
        "loader_resized",
        (
            Column("short side, px", "short_side_px", _count),
            Column("bytes, of the originals'", "bytes_ratio", _percent),
            Column("loader", "loader", _text),
            Column("output", "output", _text),
            Column("images/s", "images_per_s", _count),
            Column("× originals", "ratio_to_original", _ratio),
            Column("CPU, ms an image", "cpu_ms_per_image", _ratio),
        ),
    ),
    "loader-workers": Table(
        "loader",
        "loader_workers",
        (
            Column("torch decoder in", "loader", _text),
            Column("images/s", "images_per_s", _count),
            Column("CPU, ms an image", "cpu_ms_per_image", _ratio),
            Column("first batch, s", "first_batch_s", _ratio),
            Column("memory, MB", "pss_mb", _count),
        ),
    ),
    "loader-parts": Table(
        "loader_parts",
        "part",
        (
            Column("part", "part", _text),
            Column("CPU, ms an image", "cpu_ms_per_image", lambda value: f"{value:.3g}"),
        ),
    ),
    "cifar10-parts": Table(
        "cifar10",
        "part",
        (
            Column("part alone", "part", _text),
            Column("images/s", "images_per_s", _count),
            Column("ms a global batch", "batch_ms", _decimal),
        ),
    ),
    "compare-cifar10": Table(
        "compare-cifar10",
        "policy",
        (
            Column("budget", "rate", _percent),
            Column("policy", "policy", _text),
            Column("epochs", "epochs", _count),
            Column("target rate", "target_rate", lambda value: f"{value:.3g}"),
            Column("cost, epochs", "cost", lambda value: f"{value:.2f}"),
            Column("top-1, %", "acc1_mean", lambda value: f"{value:.2f}"),
            Column("± sd", "acc1_sd", lambda value: f"{value:.2f}"),
            Column("lead", "acc1_lead", lambda value: f"{value:+.2f}"),
            Column("clear", "lead_is_clear", _yes),
            Column("seeds", "seeds", _count),
            Column("samples skipped", "samples_skipped", _count),
            Column("FLOPs saved", "flops_saved", _percent),
            Column("wall-clock, s", "wall_s", _count),
            Column("GPU, kJ", "gpu_joules", lambda value: f"{value / 1000:,.1f}"),
        ),
    ),
    "faults": Table(
        "faults",
        "fault",
        (
            Column("trained by", "tool", _text),
            Column("fault", "fault", _text),
            Column("saves", "saves", _text),
            Column("interval, s", "interval_s", _decimal),
            Column("tries", "tries", _count),
            Column("checkpoints damaged", "unloadable", _count),
            Column("steps repeated, median", "steps_lost_median", _count),
            Column("max", "steps_lost_max", _count),
            Column("recovery, s, median", "recovery_s_median", _decimal),
            Column("max", "recovery_s_max", _decimal),
            Column("detect, s", "detect_s_median", _decimal),
            Column("restart, s", "restart_s_median", _decimal),
            Column("load, s", "load_s_median", _decimal),
            Column("first step, s", "first_step_s_median", _decimal),
        ),
    ),
    "faults-exact": Table(
        "faults",
        "exact",
        (
            Column("trained by", "tool", _text),
            Column("saves", "saves", _text),
            Column("steps", "steps", _count),
            Column("killed at step", "killed_at_step", _count),
            Column("resumed from step", "resumed_from_step", _count),
            Column("steps of the killed run", "steps_killed", _count),
            Column("same weights as never killed", "identical", _yes),
        ),
    ),
    "faults-saving": Table(
        "faults",
        "saving",
        (
            Column("saved by", "tool", _text),
            Column("model", "model", _text),
            Column("checkpoint, MB", "checkpoint_mb", _decimal),
            Column("saves", "saves", _count),
            Column("stall, ms", "stall_ms", _decimal),
            Column("max", "stall_max_ms", _decimal),
            Column("of the time, every 120 s", "stall_share_120s", _percent),
            Column("every 10 s", "stall_share_10s", _percent),
            Column("all that a save takes, ms", "total_ms", _decimal),
            Column("± SEM", "total_sem_ms", _decimal),
            Column("of the time, every 120 s", "total_share_120s", _percent),
            Column("every 10 s", "total_share_10s", _percent),
            Column("until committed, s", "commit_s", _decimal),
            Column("verify, s", "verify_s", _decimal),
            Column("load, s", "load_s", _decimal),
        ),
    ),
    "faults-kills": Table(
        "faults",
        "kills",
        (
            Column("saved by", "tool", _text),
            Column("checkpoint, MB", "checkpoint_mb", _decimal),
            Column("kills around saves", "tries", _count),
            Column("newest does not load", "unloadable", _count),
            Column("nothing loads", "nothing_loads", _count),
            Column("mixture of two saves", "mixed", _count),
        ),
    ),
    "faults-goodput": Table(
        "faults",
        "goodput",
        (
            Column("trained by", "tool", _text),
            Column("saves", "saves", _text),
            Column("a kill every, s", "kill_every_s", _count),
            Column("source", "source", _text),
            Column("minutes", "minutes", _decimal),
            Column("kills", "kills", _count),
            Column("goodput", "goodput", _percent),
            Column("kills as a Poisson process", "goodput_poisson", _percent),
            Column("steps repeated", "steps_lost", _count),
        ),
    ),
    "faults-prediction": Table(
        "faults",
        "prediction",
        (
            Column("MTBF of", "mtbf_of", _text),
            Column("MTBF, h", "mtbf_h", _count),
            Column("ranks", "ranks", _text),
            Column("a fault of the job every, s", "job_mtbf_s", _decimal),
            Column("goodput, a save every 120 s", "goodput_default", _percent),
            Column("best interval, s", "best_every_s", _decimal),
            Column("goodput at it", "goodput_best", _percent),
            Column("recovery ten times as long", "goodput_best_slow", _percent),
        ),
    ),
    "make-shards": Table(
        "make_shards",
        "conversion",
        (
            Column("conversion", "kind", _text),
            Column("workers", "workers", _count),
            Column("images", "images", _count),
            Column("JPEG, kB", "jpeg_kb", _count),
            Column("images/s", "images_per_s", _count),
            Column("MB/s", "mb_per_s", _count),
        ),
    ),
}
