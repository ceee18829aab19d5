"""What a run's files tell of its gate: the numbers for the diagrams. No torch, and nothing invented."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ast_dist.fault.arrays import read_part
from ast_dist.fault.commit import DamagedCheckpointError, committed
from ast_dist.track.history import read
from ast_dist.track.progress import read_progress

# The bins in which the gate's threshold counts; gate/threshold.py has them, and needs torch.
LOG2_MIN, BINS_PER_OCTAVE, NUM_BINS = -24, 16, 480
COUNTS = "gate/threshold/counts"


@dataclass(frozen=True)
class Histogram:
    """The scores that a threshold was set from.

    counts: (NUM_BINS,) float64, samples by bin; online, older batches count less. threshold_bin: the bin that the
    threshold lies in. checkpoint: the name of the one that it comes from.
    """

    counts: np.ndarray
    threshold: float
    threshold_bin: int
    checkpoint: str

    @property
    def total(self) -> float:
        """Samples counted."""
        return float(self.counts.sum())


@dataclass(frozen=True)
class GateNumbers:
    """A gate's settings and the last gated epoch's numbers; None is unknown.

    error: share of the scored samples at or above the threshold, minus its target. missing: why there is no
    histogram.
    """

    run: str
    policy: str
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    epochs: int | None = None
    num_samples: int | None = None
    rate: float | None = None
    rate_target: float | None = None
    threshold: float | None = None
    integral: float | None = None
    error: float | None = None
    suspects: int = 0
    ranks: int | None = None
    model: str | None = None
    global_batch_size: int | None = None
    checkpoint: str | None = None
    histogram: Histogram | None = None
    missing: str = ""

    @property
    def is_gated(self) -> bool:
        """Whether the run has had an epoch with a threshold."""
        return self.threshold is not None

    @property
    def target_above(self) -> float | None:
        """Share to keep for the score, so that chance among the rest makes up the target rate in all."""
        p_min = self.settings.get("p_min")
        if self.rate_target is None or p_min is None:
            return None
        return 1.0 if p_min >= 1.0 else max(0.0, (self.rate_target - p_min) / (1.0 - p_min))

    @property
    def seen(self) -> int | None:
        """Samples whose significance was known when the epoch was planned."""
        is_memory = self.histogram is not None and self.policy == "sundew"
        return round(self.histogram.total) if is_memory and self.histogram else None

    @property
    def trained(self) -> int | None:
        """Samples that the epoch trains."""
        return None if self.rate is None or self.num_samples is None else round(self.rate * self.num_samples)

    @property
    def skipped(self) -> int | None:
        """Samples that it does not."""
        return None if self.trained is None or self.num_samples is None else self.num_samples - self.trained

    @property
    def kept_above(self) -> int | None:
        """Samples kept since they lie at or above the threshold."""
        if self.seen is None or self.error is None or self.target_above is None:
            return None
        return round((self.target_above + self.error) * self.seen)

    @property
    def kept_below(self) -> int | None:
        """Samples kept by chance: below the threshold, or never seen."""
        return None if self.trained is None or self.kept_above is None else self.trained - self.kept_above


def read_numbers(run_dir: Path) -> GateNumbers:
    """The numbers of a run, as far as its files go. Raises UserError when the folder is not a run."""
    progress = read_progress(run_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # status and dashboard tell of damaged rows
        rows, sessions = read(run_dir / "metrics.jsonl"), read(run_dir / "sessions.jsonl")
    settings = _settings(run_dir)
    policy = str(progress.get("policy") or settings.get("gate", {}).get("policy") or "unknown")
    histogram, missing = read_histogram(run_dir)
    row = _gated_row(rows, histogram)
    passes = row.get("progress/epoch")
    return GateNumbers(
        run=run_dir.resolve().name,
        policy=policy,
        settings=settings.get("gate", {}),
        epoch=None if passes is None else math.ceil(passes),
        epochs=progress.get("epochs"),
        num_samples=progress.get("num_samples"),
        **{name: row.get(f"gate/{name}") for name in ("rate", "rate_target", "threshold", "integral", "error")},
        suspects=int(row.get("gate/hard_tail") or 0),
        ranks=next((start["world_size"] for start in reversed(sessions) if "world_size" in start), None),
        model=settings.get("model", {}).get("name"),
        global_batch_size=settings.get("loop", {}).get("global_batch_size"),
        checkpoint=progress.get("checkpoint"),
        histogram=histogram,
        missing=missing,
    )


def read_histogram(run_dir: Path) -> tuple[Histogram | None, str]:
    """The histogram in the newest checkpoint that can be read, or None and why there is none."""
    missing = "no checkpoint"
    for checkpoint in reversed(committed(run_dir / "checkpoints")):
        try:
            state, arrays = read_part(checkpoint, {COUNTS: "f8"})
        except (DamagedCheckpointError, OSError) as error:
            missing = f"{checkpoint.name} cannot be read ({type(error).__name__})"
            continue
        threshold, counts = (state.get("gate") or {}).get("threshold") or {}, arrays.get(COUNTS)
        if counts is None or counts.size != NUM_BINS or not threshold.get("steps") or not counts.sum() > 0:
            return None, f"{checkpoint.name} holds no histogram: no window was gated before it"
        if threshold.get("centre"):
            return None, f"{checkpoint.name} holds a histogram in bins of its own"
        return Histogram(counts, float(threshold["threshold"]), int(threshold["bin"]), checkpoint.name), ""
    return None, missing


def bin_edges(first: int, last: int) -> list[float]:
    """Lower edges of the bins first … last - 1 and the upper one of the last, nats."""
    return [2.0 ** (LOG2_MIN + number / BINS_PER_OCTAVE) for number in range(first, last + 1)]


def _gated_row(rows: Sequence[dict[str, Any]], histogram: Histogram | None) -> dict[str, Any]:
    """The last row of the epoch that the histogram belongs to; of the last gated one, where there is none."""
    gated = [row for row in rows if row.get("gate/threshold") is not None]
    same = [row for row in gated if histogram and row["gate/threshold"] == histogram.threshold]
    return (same or gated or [{}])[-1]


def _settings(run_dir: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
