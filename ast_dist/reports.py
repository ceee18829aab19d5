"""What a training loop tells of itself: rows of metrics, progress, damaged samples.

Rank 0 alone has a tracker; the sums over the ranks need all of them, so every rank calls the same methods.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ast_dist import run_dir as run_folder
from ast_dist import startup
from ast_dist.candidates import Candidates
from ast_dist.clock import Clock
from ast_dist.config import Config
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan
from ast_dist.distributed import World
from ast_dist.fault import commit
from ast_dist.fault.deadline import Deadline
from ast_dist.fault.lease import Lease
from ast_dist.fault.state import TrainState
from ast_dist.gate.cost import Ledger
from ast_dist.gate.policy import Policy, RememberingPolicy
from ast_dist.meters import Meters
from ast_dist.resources import Resources, forget_peak, peak_bytes
from ast_dist.step import TrainStep
from ast_dist.track.hardest import Hardest
from ast_dist.track.progress import LEFT_KEYS
from ast_dist.track.time_left import TimeLeft, sessions_left, time_left
from ast_dist.track.tracker import Tracker


class Reports:
    """Makes the rows of a run from its parts, which it reads and does not change (but for the step's meters).

    tracker: rank 0's, from `open` on.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        state: TrainState,
        step: TrainStep,
        policy: Policy,
        candidates: Candidates,
        ledger: Ledger,
        resources: Resources,
        clock: Clock,
        deadline: Deadline | None,
    ) -> None:
        self.tracker: Tracker | None = None
        self._config = config
        self._world = world
        self._state = state
        self._step = step
        self._policy = policy
        self._candidates = candidates
        self._ledger = ledger
        self._resources = resources
        self._clock = clock
        self._deadline = deadline
        self._images_of: Index | None = None

    def open(self, run_dir: Path, lease: Lease, checkpoint: str | None, loader: Loader, num_val: int) -> None:
        """Begin this session's reports; rank 0 calls it once the state is the one to go on from."""
        config, state, world = self._config, self._state, self._world
        self.tracker = Tracker(run_dir, config, world.size, world.restart, self._policy.epochs)
        num_weights = sum(parameter.numel() for parameter in state.model.parameters())
        has_target = config.gate.policy not in ("full", "infobatch")
        gated = f", target rate {config.gate.target_rate:g}" if has_target else ""
        cache = "decoded images kept in memory" if loader.cache else "no cache"
        self.tracker.start(
            checkpoint=checkpoint,
            resumed_from_step=state.global_step,
            previous_beat=lease.previous_beat,
            session=state.session,
            versions=run_folder.versions(),
            started=startup.parts(),
            num_samples=state.num_samples,
            info={
                "run": str(run_dir),
                "data": f"{state.num_samples:,} train, {num_val:,} val",
                "model": f"{config.model.name}, {num_weights:,} weights, {config.loop.precision}",
                "policy": config.gate.policy + gated,
                "ranks": f"{world.size} on {world.device.type}, global batch {config.loop.global_batch_size}",
                "decoder": f"{loader.decoder.name}, {loader.threads} threads a rank, {cache}",
                "energy": self._resources.joules.describe(),
            },
        )
        if config.track.wandb_images and config.track.wandb != "off":
            self._choose_images(loader.index)

    def _choose_images(self, index: Index) -> None:
        if index.is_remote:
            self.warn("track.wandb_images: no images, since each would fetch a whole shard from its server.")
        elif not isinstance(self._policy, RememberingPolicy):
            policy = self._config.gate.policy
            self.warn(f"track.wandb_images: no images, since gate.policy {policy} remembers no samples.")
        else:
            self._images_of = index

    def progress(self, checkpoint: str | None, verified_at: float | None, *, session_is_over: bool = False) -> None:
        """Tell progress.json where the run is.

        checkpoint: the newest committed one. verified_at: when all of it was last read back and found sound, seconds
        since 1970, or None. session_is_over: whether what is left has to wait for the next session.
        """
        if self.tracker:
            state = self._state
            self.tracker.progress(
                epoch=state.epoch,
                step=state.global_step,
                best_acc1=state.best_acc1,
                last_acc1=state.last_acc1,
                gpu_joules=self._resources.joules.row().get("cost/gpu_joules"),
                **self._left_fields(session_is_over),
                checkpoint=checkpoint,
                checkpoint_verified_at=verified_at
                and datetime.fromtimestamp(verified_at, UTC).isoformat("T", "seconds"),
            )

    def checkpoint(self, path: Path, save_s: float) -> None:
        """Tell of a checkpoint that was committed. save_s: seconds from its start until then."""
        track = self._config.track
        if not (self.tracker and (track.callbacks or track.wandb_artifacts)):
            return
        try:
            about = commit.read_manifest(path)
            best = commit.best(path.parent)
        except (OSError, commit.DamagedCheckpointError) as error:
            self.warn(f"{path}: no view hears of it ({error}). Training goes on.")
            return
        info = {"name": path.name, "path": str(path), **{key: about.get(key) for key in ("step", "epoch", "val_acc1")}}
        self.tracker.checkpoint({**info, "save_s": save_s}, path.with_name(best) if best else None)

    def damaged(self, found: list[str]) -> None:
        """Name samples that could not be decoded."""
        for text in found:
            self.warn(f"damaged sample left out: {text}")

    def warn(self, text: str) -> None:
        """Show a warning once, whichever rank it is about."""
        if self.tracker:
            self.tracker.warn(text)

    def step(self, lr: float, num_steps: int) -> None:
        """A row of a step. All ranks must call. num_steps: of the epoch's plan."""
        device = self._world.device
        means, peak = self._step.meters.read(self._world, peak_bytes(device))
        self._step.meters = Meters.zero(device)
        forget_peak(device)
        timing = self._clock.interval_row()
        if self.tracker:
            state = self._state
            trained = dict(zip(("train/loss", "train/acc1_selected"), means, strict=True)) if means else {}
            self.tracker.step(
                {
                    "global_step": state.global_step,
                    "progress/epoch": state.epoch + state.step_in_epoch / num_steps,
                    **trained,
                    "train/lr": lr,
                    **self.gate(),
                    **self._costs(),
                    **timing,
                    "perf/mem_gb": peak / 1e9,
                    **self._eta_row(),
                }
            )

    def epoch(self, planned: int, trained: dict[str, float], scores: dict[str, float]) -> None:
        """A row of an epoch that is done. All ranks must call.

        planned: samples of its plan. trained: the gate's and the clock's values, taken before the evaluation. scores:
        what `evaluate` returned.
        """
        self._resources.tally()
        forget_peak(self._world.device)
        is_full = planned == self._state.num_samples and not self._policy.scores_epoch(self._state.epoch - 1)
        joules = self._resources.joules.end_epoch(is_full)
        timing = self._clock.epoch_done()
        if self.tracker:
            state, ledger = self._state, self._ledger
            self.tracker.epoch(
                {
                    "epoch": state.epoch,
                    "global_step": state.global_step,
                    "progress/epoch": float(state.epoch),
                    **trained,
                    **self._costs(),
                    "cost/samples_planned": planned,
                    "cost/samples_forwarded": ledger.forwarded,
                    "cost/samples_backwarded": ledger.backwarded,
                    "cost/samples_scored": ledger.scored,
                    **self._resources.row(),
                    **joules,
                    **scores,
                    **timing,
                    **self._eta_row(),
                },
                self._hardest() if scores else None,
            )

    def accuracy(self, plan: Plan) -> dict[str, float]:
        """The accuracy on all samples of an epoch that was trained by a plan, and begin anew. All ranks must call.

        Empty where nobody knows with which chance the samples were selected.
        """
        acc1 = self._step.accuracy.read(self._world)
        is_known = plan.chances is not None or len(plan.ids) == self._state.num_samples
        if acc1 is None or not is_known:
            return {}
        return {"train/acc1_all": acc1}

    def _hardest(self) -> Hardest | None:
        if self._images_of is None or not isinstance(self._policy, RememberingPolicy):
            return None
        return Hardest.of(self._images_of, self._policy.memory.significance, self._policy.memory.visits)

    def gate(self) -> dict[str, float]:
        """The policy's values; what was selected of scored batches is known to the candidates alone."""
        report = dict(self._policy.report())
        if self._policy.scores_epoch(self._state.epoch):
            report.pop("rate", None)
            report |= self._candidates.report()
        return {f"gate/{key}": value for key, value in report.items()}

    def session(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run's life beside its weights; empty where nothing is tracked.

        All ranks must call.
        """
        accuracy = self._step.accuracy.totals(self._world)
        if not self.tracker:
            return {}
        times = {"total_s": self.tracker.total_s, "history_bytes": self.tracker.history_bytes}
        told = {"accuracy_of_all": accuracy, "wandb_id": self.tracker.wandb_id}
        return {**times, "resources": self._resources.to_dict(), **told}

    def _costs(self) -> dict[str, float]:
        return {
            "cost/samples_skipped": self._ledger.samples_skipped,
            "cost/flops_saved": self._ledger.flops_saved(self._step.flops),
            "train/steps_nonfinite": self._ledger.steps_nonfinite,
        }

    def _time_left(self) -> TimeLeft | None:
        """Seconds left, by the cost of what the policy still means to do."""
        assert self.tracker
        state = self._state
        passes = sum(self._policy.cost(epoch) for epoch in range(state.epoch, self._policy.epochs))
        if state.plan is not None:
            done = state.step_in_epoch / state.plan.num_steps(self._config.loop.global_batch_size)
            passes -= done * self._policy.cost(state.epoch)
        clock, epochs = self._clock, list(self.tracker.stretches)
        return time_left(passes * state.num_samples, clock.process, epochs, list(clock.intervals))

    def _eta_row(self) -> dict[str, float]:
        left = self._time_left()
        return {"progress/eta_h": left.likely_s / 3600} if left else {}

    def _left_fields(self, session_is_over: bool) -> dict[str, Any]:
        """The keys of progress.json that tell of what is left; None where unknown."""
        left, deadline = self._time_left(), self._deadline
        fields: dict[str, Any] = dict.fromkeys(LEFT_KEYS)
        if left:
            fields |= {"eta_s": left.likely_s, "eta_low_s": left.low_s, "eta_high_s": left.high_s}
        if left and deadline:
            whole_s = deadline.session_s - deadline.margin_s
            now_s = 0.0 if session_is_over else max(0.0, deadline.left_s - deadline.margin_s)
            fields["sessions_left_low"] = sessions_left(left.low_s, whole_s, now_s)
            fields["sessions_left_high"] = sessions_left(left.high_s, whole_s, now_s)
        return fields
