"""One frozen configuration: every setting, its default and its range.

Everything that can be judged without touching data or devices is validated in `__post_init__`.

A saved run that lacks a setting is taken to have its default (`differences`): a new setting on which weights depend
must default to what was done before it was there.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ast_dist.data_config import DataConfig as DataConfig
from ast_dist.errors import UserError, require, require_share


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet50"
    """A torchvision classification model by name, or small_cnn (for images of 8 to 64 pixels)."""
    num_classes: int = 0
    """Outputs of the model; 0 takes the number of classes in data.train."""
    norm: Literal["batch", "sync", "group"] = "batch"
    """Normalisation: per-rank batch statistics, statistics synchronised across ranks (GPUs only), or groups."""
    width: int = 64
    """Channels of small_cnn's first stage."""
    stem_stride: Literal[1, 2] = 1
    """Stride of small_cnn's first stage; 2 halves the side of the images there and the time of a step."""
    channels_last: bool = True
    """Keep images and weights in channels_last memory format."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 0, f"model.num_classes is {self.num_classes}, but must be at least 0.")
        require(
            self.width >= 8 and self.width % 8 == 0,
            f"model.width is {self.width}, but must be a multiple of 8, at least 8.",
        )


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. sgd uses Nesterov momentum."""
    lr: float = 0.5
    """Peak learning rate, for the global batch size given."""
    momentum: float = 0.9
    """SGD's momentum; AdamW's first beta."""
    weight_decay: float = 5e-5
    """Weight decay of weights with two or more dimensions; norms and biases have none."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises linearly; at most 30 % of the run."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after the warm-up, as a function of data passes."""
    label_smoothing: float = 0.0
    """Label smoothing of the training loss; significance always uses hard labels."""
    mixup_alpha: float = 0.0
    """Mixup: the share of a sample's own image is drawn from Beta(alpha, alpha); 0 is off."""
    cutmix_alpha: float = 0.0
    """CutMix: the share of the image that stays is drawn from Beta(alpha, alpha); 0 is off."""
    mix_share: float = 0.5
    """Share of the steps that are mixed, where mixup or CutMix is on. Their losses are not remembered by the gate."""
    clip_grad_norm: float = 0.0
    """Largest L2 norm of the gradient; 0 does not clip."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights, evaluated beside them, with this decay for the data of one
    step, trained or skipped, and less in the first steps; 0 is off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr is {self.lr:g}, but must be above 0.")
        require(0.0 <= self.momentum < 1.0, f"optim.momentum is {self.momentum:g}, not in [0, 1).")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay:g}, but must be at least 0.")
        require(self.warmup_epochs >= 0, f"optim.warmup_epochs is {self.warmup_epochs:g}, must be at least 0.")
        require(0.0 <= self.label_smoothing < 1.0, f"optim.label_smoothing is {self.label_smoothing:g}, not in [0, 1)")
        require(self.clip_grad_norm >= 0, f"optim.clip_grad_norm is {self.clip_grad_norm:g}, must be at least 0.")
        require(0.0 <= self.ema_decay < 1.0, f"optim.ema_decay is {self.ema_decay:g}, not in [0, 1).")
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            require(0.0 <= value <= 4.0, f"optim.{name} is {value:g}, not in 0 … 4; published recipes use 0.2 to 1.")
        require_share("optim.mix_share", self.mix_share)


POLICY_NAMES = ("sundew", "online", "full", "short", "random", "infobatch", "selective_backprop")
# Those that plan by the losses of earlier training steps.
REMEMBERING_POLICIES = ("sundew", "infobatch")


@dataclass(frozen=True)
class GateConfig:
    policy: str = "sundew"
    """Which samples are trained: sundew (by remembered significance), online (by a scoring pass, for streams seen
    once), full (all), short (all, fewer epochs), random, infobatch, selective_backprop, or your own module:Class."""
    target_rate: float = 0.6
    """Share of the samples that a gated epoch trains on; short: share of all epochs."""
    rate_fall: float = 0.0
    """sundew, online: by how much the rate falls from the first gated epoch to the last; target_rate is its mean."""
    p_min: float = 0.2
    """sundew, online: chance that a sample below the threshold is kept all the same; at most the lowest rate."""
    weight_cap: float = 1.0
    """sundew, online: largest loss weight of kept samples below the threshold, which weigh 1 / p_min up to it."""
    warmup_epochs: int = 1
    """sundew, online: first epochs, trained on everything."""
    anneal_share: float = 0.1
    """sundew, online: last share of all epochs, trained on everything."""
    hard_tail_share: float = 0.0
    """sundew: samples that stay in this top share with flat loss count as average: likely wrong labels. 0 is off."""
    hard_tail_visits: int = 4
    """Visits in a row after which such a sample counts as average."""
    class_floor: float = 0.0
    """sundew: share of the rate that every class gets at least; 0 is off."""
    loss_weight: float = 0.7
    """Weight of the cross-entropy in a sample's significance (infobatch and selective_backprop: the loss alone)."""
    entropy_weight: float = 0.3
    """Weight of the prediction's entropy in a sample's significance."""
    memory_decay: float = 0.0
    """sundew: share of the old value kept when a sample's remembered significance is updated; 0 keeps the newest."""
    ki: float = 0.05
    """Gain of the threshold's integral term."""
    scoring_px: int = 0
    """Side of the images in a scoring pass (online, selective_backprop), pixels; 0 scores at data.image_size."""
    prune_ratio: float = 0.5
    """infobatch: chance that a sample below the mean loss is left out (r in its paper)."""
    infobatch_anneal_share: float = 0.125
    """infobatch: last share of all epochs, trained on everything (1 - delta in its paper)."""
    loss_history: int = 1024
    """selective_backprop: losses whose distribution decides (R in its paper)."""

    def __post_init__(self) -> None:
        _require_policy_name(self.policy)
        require(0.0 < self.target_rate <= 1.0, f"gate.target_rate is {self.target_rate:g}, not in (0, 1].")
        lowest, highest = self.target_rate - self.rate_fall / 2, self.target_rate + self.rate_fall / 2
        require(
            self.rate_fall == 0.0 or (min(lowest, highest) > 0.0 and max(lowest, highest) <= 1.0),
            f"gate.rate_fall is {self.rate_fall:g}: rates would go from {highest:g} to {lowest:g}, not in (0, 1]. "
            f"With gate.target_rate {self.target_rate:g} it may be "
            f"{2 * min(self.target_rate, 1.0 - self.target_rate):g} at most.",
        )
        # No other policy has this random share.
        require(
            0.0 <= self.p_min <= min(lowest, highest) + 1e-12 or self.policy not in ("sundew", "online"),
            f"gate.p_min is {self.p_min:g}, but must lie in 0 … {min(lowest, highest):g}, the lowest rate, since the "
            "random share is part of the target. Lower gate.p_min or raise gate.target_rate.",
        )
        require(0.0 <= self.p_min <= 1.0, f"gate.p_min is {self.p_min:g}, not in [0, 1].")
        require(self.weight_cap >= 1.0, f"gate.weight_cap is {self.weight_cap:g}, but must be at least 1.")
        require(self.warmup_epochs >= 0, f"gate.warmup_epochs is {self.warmup_epochs}, but must be at least 0.")
        for name in ("anneal_share", "infobatch_anneal_share", "class_floor"):
            require_share(f"gate.{name}", getattr(self, name))
        require(0.0 <= self.hard_tail_share < 0.5, f"gate.hard_tail_share is {self.hard_tail_share:g}, not in [0, 0.5)")
        require(self.hard_tail_visits >= 2, f"gate.hard_tail_visits is {self.hard_tail_visits}, must be at least 2.")
        require(0.0 <= self.memory_decay < 1.0, f"gate.memory_decay is {self.memory_decay:g}, not in [0, 1).")
        for name in ("ki", "loss_weight", "entropy_weight"):
            value = getattr(self, name)
            require(
                value >= 0 and math.isfinite(value), f"gate.{name} is {value:g}, but must be at least 0 and finite."
            )
        require(
            self.loss_weight + self.entropy_weight > 0,
            "gate.loss_weight and gate.entropy_weight are both 0, and every sample would count the same. Raise one.",
        )
        require(self.scoring_px >= 0, f"gate.scoring_px is {self.scoring_px}, but must be at least 0.")
        require(0.0 <= self.prune_ratio < 1.0, f"gate.prune_ratio is {self.prune_ratio:g}, not in [0, 1).")
        require(self.loss_history >= 1, f"gate.loss_history is {self.loss_history}, but must be at least 1.")


def _require_policy_name(name: str) -> None:
    module, _, class_name = name.partition(":")
    if name in POLICY_NAMES or (class_name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        return
    near = difflib.get_close_matches(name, POLICY_NAMES, n=1)
    hint = f"Perhaps you meant {near[0]}. " if near else ""
    raise UserError(
        f"gate.policy is {name}: no such policy. {hint}There are: {', '.join(POLICY_NAMES)}, or your own module:Class."
    )


@dataclass(frozen=True)
class LoopConfig:
    epochs: int = 30
    """Passes over the data set (a gated pass counts as one)."""
    global_batch_size: int = 256
    """Samples per optimizer step, over all ranks, however many ranks there are."""
    micro_batch_size: int = 0
    """Samples that a rank forwards at once; a larger share of the global batch takes several passes. 0: no limit."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision; fp16 adds a gradient scaler."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Use deterministic kernels only (bit-identical runs on GPUs, slower)."""
    eval_every_epochs: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"loop.epochs is {self.epochs}, but must be at least 1.")
        require(self.global_batch_size >= 1, f"loop.global_batch_size is {self.global_batch_size}, must be at least 1")
        require(self.micro_batch_size >= 0, f"loop.micro_batch_size is {self.micro_batch_size}, must be at least 0")
        require(self.micro_batch_size != 1, "loop.micro_batch_size is 1, but batch norm needs 2 samples at once.")
        require(self.eval_every_epochs >= 1, f"loop.eval_every_epochs is {self.eval_every_epochs}, must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    every_s: float = 120.0
    """Seconds between checkpoints, more where saving would hold up training by more than stall_share; 0 saves by steps
    and epochs only."""
    stall_share: float = 0.005
    """Largest share of the time that saves by the clock may hold up training; above it they become rarer."""
    every_steps: int = 0
    """Steps between checkpoints; 0 saves by time and epochs only."""
    keep_last: int = 3
    """Newest checkpoints that are kept, besides the one with the best validation accuracy."""
    keep_every_h: float = 2.0
    """One checkpoint is kept for every so many hours of training; 0 keeps none besides the newest and the best."""
    grace_s: float = 20.0
    """Seconds after SIGTERM in which the save must be done; then the worker ends by itself."""

    def __post_init__(self) -> None:
        require(self.every_s >= 0, f"checkpoint.every_s is {self.every_s:g}, but must be at least 0.")
        require(self.every_steps >= 0, f"checkpoint.every_steps is {self.every_steps}, but must be at least 0.")
        require(0.0 < self.stall_share <= 1.0, f"checkpoint.stall_share is {self.stall_share:g}, not in (0, 1].")
        require(self.keep_every_h >= 0, f"checkpoint.keep_every_h is {self.keep_every_h:g}, but must be at least 0.")
        require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}, but must be at least 1.")
        require(self.grace_s > 0, f"checkpoint.grace_s is {self.grace_s:g}, but must be above 0.")


@dataclass(frozen=True)
class FaultConfig:
    watchdog_s: float = 120.0
    """A step that takes longer than this, and longer than 10 of the slowest recent ones, ends the process, which prints
    where it hung; at least 360 s count where shards lie behind a URL; 0 waits for ever."""
    nonfinite_steps: int = 5
    """Steps in a row whose loss is NaN or infinite that are skipped; one more, and the run goes back to its last
    checkpoint, once an epoch, and then stops."""

    def __post_init__(self) -> None:
        require(self.watchdog_s >= 0, f"fault.watchdog_s is {self.watchdog_s:g}, but must be at least 0.")
        require(self.nonfinite_steps >= 0, f"fault.nonfinite_steps is {self.nonfinite_steps}, must be at least 0.")


@dataclass(frozen=True)
class SessionConfig:
    hours: float = 0.0
    """Hours after which this session saves and ends with exit code 0, more to do; 0 has no limit."""

    def __post_init__(self) -> None:
        require(self.hours >= 0, f"session.hours is {self.hours:g}, but must be at least 0 (0 = no limit).")


@dataclass(frozen=True)
class TrackConfig:
    every_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    dashboard: bool = True
    """Draw dashboard.png at each epoch's end and each save, in a process beside the training."""
    quiet: bool = False
    """Print warnings and errors only; --quiet is short for --track.quiet."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: off, a local offline run, or online."""
    wandb_project: str = "ast-dist"
    """W&B project of the run."""
    wandb_group: str = ""
    """W&B group of the run, for runs that are compared."""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags of the run, besides its policy and preset."""
    wandb_images: bool = False
    """Show the samples that the gate finds hardest on the W&B page, at most 32 at each evaluated epoch."""
    wandb_artifacts: bool = False
    """Send the best and the final checkpoint to W&B."""
    callbacks: str = ""
    """A .py file with any of on_step(row), on_epoch(row), on_checkpoint(info), called by rank 0; training waits."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"track.every_steps is {self.every_steps}, but must be at least 1.")
        require(len(self.wandb_group) <= 128, f"track.wandb_group has {len(self.wandb_group)} characters, at most 128.")
        for tag in self.wandb_tags:
            require(0 < len(tag) <= 64, f"track.wandb_tags: {tag!r} has {len(tag)} characters; W&B takes 1 to 64 each.")


@dataclass(frozen=True)
class Config:
    """Train an image classifier on the samples that still teach it something."""

    run_dir: str = ""
    """Folder of the run: checkpoints, metrics, dashboard. Run the same command again to go on."""
    preset: str | None = None
    """Named settings to start from (see ast_dist/presets)."""
    config: str | None = None
    """YAML file of settings, applied after the preset and before the other arguments."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and selection."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto goes on where the run stopped, must refuses to start anew, never moves the old run aside first."""
    dry_run: bool = False
    """Check everything, print what would be done, write nothing."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "--run-dir is missing. Name the folder of the run, for instance --run-dir runs/1.")
        for name in ("train", "val"):
            require(
                bool(getattr(self.data, name)),
                f"--data.{name} is missing. Name the folder or URL of its shards.",
            )
        mixes = max(self.optim.mixup_alpha, self.optim.cutmix_alpha) > 0
        require(
            not (mixes and self.optim.mix_share == 1.0 and self.gate.policy in REMEMBERING_POLICIES),
            f"optim.mix_share is 1, but gate.policy {self.gate.policy} selects by what it remembers of steps that are "
            "not mixed, and there would be none. Lower optim.mix_share, to 0.5 for instance, or use another policy.",
        )


# Fields that may change between the sessions of one run: where, how fast and how safely it trains, not what.
FREE_BETWEEN_SESSIONS = {
    *("run_dir", "preset", "config", "resume", "dry_run", "checkpoint", "fault", "session", "track"),
    *("data.train", "data.val", "data.cache", "data.cache_mb", "data.threads", "data.prefetch_batches"),
    *("data.shard_cache_gb", "data.shard_cache_dir"),
    *("data.decoder", "data.damaged_limit", "loop.eval_every_epochs"),
    # Like the number of ranks: it decides which samples share batch statistics, and another machine needs another.
    "loop.micro_batch_size",
}


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Name the settings that differ and that trained weights depend on: ["gate.target_rate: 0.4 → 0.3"].

    old, new: results of `to_dict`; old may be another version's. Keys in FREE_BETWEEN_SESSIONS are passed over. A
    setting that the old lacks had its default, one that only the old has is a difference.
    """
    found = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        if name in FREE_BETWEEN_SESSIONS:
            continue
        after = new.get(key)
        before = old[key] if key in old else {} if isinstance(after, dict) else _default_of(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif key not in new:
            found.append(f"{name}: {before} → unknown here, the setting of a newer version: upgrade ast-dist")
        elif before != after:
            found.append(f"{name}: {before} → {after}")
    return found


# No weight depends on the three settings that have no default.
_DEFAULTS = to_dict(Config(run_dir="-", data=DataConfig(train="-", val="-")))


def _default_of(name: str) -> Any:
    """A setting's default by its dotted name; None where there is no such setting."""
    place: Any = _DEFAULTS
    for part in name.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    return place
