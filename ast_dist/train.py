"""Train: `python -m ast_dist.train …`, alone or under torchrun.

The state of a run is (epochs done, steps done of the epoch's plan); everything else follows from it and from the
checkpoint. All ranks walk through the same loop and meet in its collectives; rank 0 alone writes.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from ast_dist import run_dir as run_folder
from ast_dist.clock import Clock
from ast_dist.config import Config, parse
from ast_dist.counter_rng import STREAM_INIT, hash_key
from ast_dist.damage import DamageLog
from ast_dist.data.index import Index
from ast_dist.data.loader import Batch, Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.distributed import LaggedRead, World
from ast_dist.errors import run_command
from ast_dist.evaluate import evaluate
from ast_dist.fault.checkpoint import Checkpoints, checkpoint_name
from ast_dist.fault.guard import Guard, die_with_parent
from ast_dist.fault.lease import Lease
from ast_dist.fault.state import TrainState
from ast_dist.gate.cost import Ledger
from ast_dist.gate.policy import Policy, make_policy
from ast_dist.model import build_model, lr_at
from ast_dist.preflight import check_data, print_dry_run
from ast_dist.step import VOTE_DAMAGED, VOTE_SAVE, VOTE_STOP, Meters, TrainStep
from ast_dist.track.tracker import Tracker

_STARTED = time.monotonic()


class Trainer:
    """Everything that one rank needs to train, and the loop."""

    def __init__(self, config: Config, world: World, train: Index, val: Index, num_classes: int) -> None:
        self.config = config
        self.world = world
        torch.manual_seed(hash_key(STREAM_INIT, config.seed))
        self.step = TrainStep(build_model(config.model, num_classes), config, world)
        # Ranks draw apart from here on (dropout); what they must agree on is drawn from counters.
        torch.manual_seed(hash_key(STREAM_INIT, config.seed, 1 + world.rank))
        self.loader = Loader(train, config.data, world.rank, world.size, world.local_size)
        self.val_loader = Loader(val, config.data, world.rank, world.size, world.local_size)
        self.policy: Policy = make_policy(
            config.gate,
            train.num_samples,
            config.loop.epochs,
            config.seed,
            world.rank,
            world.size,
            world.sum,
            world.gather_rows,
        )
        self.state = TrainState(
            self.step.module, self.step.optimizer, self.step.scaler, self.policy, train.num_samples, config.seed
        )
        self.ledger = Ledger()
        self.checkpoints = Checkpoints(
            run_folder.checkpoints_path(Path(config.run_dir)), world, config.checkpoint.keep_last
        )
        deadline = _STARTED + config.session.hours * 3600 if config.session.hours else None
        self.guard = Guard(config.checkpoint.grace_s, deadline)
        # Rank 0 alone has one.
        self.tracker: Tracker | None = None
        self.lease: Lease | None = None
        self.damage = DamageLog(config.data.damaged_limit, train.num_samples, str(train.root), world)
        self.lagged = LaggedRead()
        # Set by what the ranks agreed on, and so the same on all of them.
        self._wants_stop = False
        self._wants_save = False
        self.clock = Clock()

    def run(self) -> Literal["finished", "paused"]:
        """Train until all epochs are done or someone asks to stop. Returns the run's state: finished or paused."""
        state, epochs = self.state, self.config.loop.epochs
        while state.epoch < epochs:
            if state.plan is None:
                state.plan = self.policy.plan(state.epoch, epoch_order(state.num_samples, state.seed, state.epoch))
            num_steps = state.plan.num_steps(self.config.loop.global_batch_size)
            for batch in self.clock.waiting(self._batches(state.plan)):
                self._train(batch, num_steps)
                if state.step_in_epoch == num_steps:
                    break
                if self._wants_save or self._wants_stop or self._is_save_step():
                    self.save()
                if self._wants_stop:
                    return "paused"
            self._end_epoch(state.plan)
            if self._wants_stop and state.epoch < epochs:
                return "paused"
        return "finished"

    @property
    def num_weights(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.step.module.parameters())

    def open_tracker(self, run_dir: Path, lease: Lease, checkpoint: str | None) -> None:
        """Begin this session's reports; rank 0 calls it once the state is the one to go on from."""
        config, state, world = self.config, self.state, self.world
        self.lease = lease
        self.tracker = Tracker(run_dir, config, world.size, world.restart)
        gated = f", target rate {config.gate.target_rate:g}" if config.gate.policy != "full" else ""
        cache = "decoded images kept in memory" if self.loader.cache else "no cache"
        self.tracker.start(
            checkpoint=checkpoint,
            resumed_from_step=state.global_step,
            previous_beat=lease.previous_beat,
            session=state.session,
            versions=run_folder.versions(),
            num_samples=state.num_samples,
            info={
                "run": str(run_dir),
                "data": f"{state.num_samples:,} train, {self.val_loader.index.num_samples:,} val",
                "model": f"{config.model.name}, {self.num_weights:,} weights, {config.loop.precision}",
                "policy": config.gate.policy + gated,
                "ranks": f"{world.size} on {world.device.type}, global batch {config.loop.global_batch_size}",
                "decoder": f"torch, {self.loader.threads} threads a rank, {cache}",
            },
        )

    def resume(self) -> str | None:
        """Load the newest checkpoint that verifies, if there is one, and return its name."""
        checkpoint = self.checkpoints.find()
        if checkpoint is None:
            return None
        self.checkpoints.load(checkpoint, self.state)
        self.ledger = Ledger(**self.state.counts)
        return checkpoint.name

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is of the present step: a disk may have refused it."""
        return self.checkpoints.newest == checkpoint_name(self.state.global_step)

    def save(self, val_acc1: float | None = None) -> None:
        """Commit a checkpoint; all ranks must call. val_acc1: percent, where exactly this state was evaluated."""
        began = time.monotonic()
        self._agree(self.lagged.flush())
        self.policy.merge(self.state.epoch)
        self.state.counts = self.ledger.to_dict()
        if self.tracker:
            self.state.session = {"total_s": self.tracker.total_s, "history_bytes": self.tracker.history_bytes}
        self.checkpoints.save(self.state, val_acc1)
        self._wants_save = False
        self.clock.saved(time.monotonic() - began)
        self.report_progress()

    def report_progress(self) -> None:
        """Tell progress.json where the run is."""
        if self.tracker:
            state = self.state
            self.tracker.progress(
                epoch=state.epoch,
                step=state.global_step,
                best_acc1=state.best_acc1,
                last_acc1=state.last_acc1,
                eta_s=self._eta_s(),
                checkpoint=self.checkpoints.newest,
            )

    def close(self) -> None:
        """Stop threads and give the signals back."""
        self.loader.close()
        self.val_loader.close()
        self.guard.close()

    def _batches(self, plan: Plan) -> Iterator[Batch]:
        state, loop = self.state, self.config.loop
        return self.loader.train_batches(plan, loop.global_batch_size, state.seed, state.epoch, state.step_in_epoch)

    def _train(self, host_batch: Batch, num_steps: int) -> None:
        """One step, and its reports."""
        state, config = self.state, self.config
        batch = host_batch.to(self.world.device)
        # The middle of the step: neither the first nor the last step of a run has a learning rate of 0.
        progress = (state.epoch + (state.step_in_epoch + 0.5) / num_steps) / config.loop.epochs
        lr = lr_at(progress, config.loop.epochs, config.optim)
        every_s = config.checkpoint.every_s
        save_due = self.world.is_main and every_s > 0 and self.clock.since_save_s() >= every_s
        scores, votes = self.step(batch, lr, stop=self.guard.wants_stop, save=save_due)
        # Rows that did not train must not be remembered.
        self.policy.observe(torch.where(batch.is_active, batch.ids, -1), scores)
        state.step_in_epoch += 1
        state.global_step += 1
        self._count(batch.planned)
        if self.lease:
            self.lease.beat(state.global_step)
        self.damage.note(batch.damaged)
        self._agree(self.lagged.swap(votes))
        self.clock.step_done(batch.planned)
        if self.tracker and self.clock.is_first_step:
            self.tracker.first_step()
        if state.global_step % config.track.every_steps == 0:
            self._report_step(lr, num_steps)

    def _is_save_step(self) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return every_steps > 0 and self.state.global_step % every_steps == 0

    def _count(self, planned: int) -> None:
        """Advance the ledger to the present position; the skipped samples of an epoch count as its steps pass."""
        state, ledger = self.state, self.ledger
        ledger.forwarded += planned
        ledger.backwarded += planned
        assert state.plan is not None
        in_plan = len(state.plan.ids)
        consumed = min(state.step_in_epoch * self.config.loop.global_batch_size, in_plan)
        ledger.full_equivalent = round(state.num_samples * (state.epoch + consumed / in_plan))

    def _agree(self, votes: list[int] | None) -> None:
        """Take in a step's summed votes: all ranks read the same ones at the same place in the loop."""
        if votes is None:
            return
        self._wants_stop |= votes[VOTE_STOP] > 0
        self._wants_save |= votes[VOTE_SAVE] > 0
        damaged = votes[VOTE_DAMAGED]
        self.ledger.damaged += damaged
        self.ledger.forwarded -= damaged
        self.ledger.backwarded -= damaged
        self._tell_damaged(self.damage.agree(damaged))

    def _tell_damaged(self, damaged: list[str]) -> None:
        if self.tracker:
            for text in damaged:
                self.tracker.warn(f"damaged sample left out: {text}")

    def _end_epoch(self, plan: Plan) -> None:
        """Share what was remembered, evaluate, report, save."""
        state, loop = self.state, self.config.loop
        self._agree(self.lagged.flush())
        self.damage.epoch_done()
        self.policy.merge(state.epoch)
        report = {f"gate/{key}": value for key, value in self.policy.report().items()} | self.clock.epoch_trained()
        state.epoch += 1
        state.step_in_epoch = 0
        state.plan = None
        self.ledger.full_equivalent = state.num_samples * state.epoch
        scores: dict[str, float] = {}
        if state.epoch % loop.eval_every_epochs == 0 or state.epoch == loop.epochs:
            scores, damaged = evaluate(
                self.step.module,
                self.val_loader,
                self.world,
                self.step.normalize,
                loop.global_batch_size,
                self.step.autocast,
            )
            self._tell_damaged(damaged)
            state.last_acc1 = scores["val/acc1"]
            state.best_acc1 = max(state.last_acc1, state.best_acc1 or 0.0)
        reads = torch.tensor([self.loader.reader.samples_read, self.loader.samples_decoded], device=self.world.device)
        samples_read, samples_decoded = self.world.sum(reads).tolist()
        timing = self.clock.epoch_done()
        if self.tracker:
            self.tracker.epoch(
                {
                    "epoch": state.epoch,
                    "global_step": state.global_step,
                    "progress/epoch": float(state.epoch),
                    **report,
                    **self._costs(),
                    "cost/samples_planned": len(plan.ids),
                    "cost/session_samples_read": samples_read,
                    "cost/session_samples_decoded": samples_decoded,
                    **scores,
                    **timing,
                    "progress/eta_h": self._eta_s() / 3600,
                }
            )
        self.save(scores.get("val/acc1"))

    def _report_step(self, lr: float, num_steps: int) -> None:
        loss, acc1 = self.step.meters.read(self.world)
        self.step.meters = Meters.zero(self.world.device)
        timing = self.clock.interval_row()
        if self.tracker:
            state = self.state
            gate = {f"gate/{key}": value for key, value in self.policy.report().items()}
            self.tracker.step(
                {
                    "global_step": state.global_step,
                    "progress/epoch": state.epoch + state.step_in_epoch / num_steps,
                    "train/loss": loss,
                    "train/acc1_selected": acc1,
                    "train/lr": lr,
                    **gate,
                    **self._costs(),
                    **timing,
                    "progress/eta_h": self._eta_s() / 3600,
                }
            )

    def _costs(self) -> dict[str, float]:
        return {
            "cost/samples_skipped": self.ledger.samples_skipped,
            "cost/flops_saved": self.ledger.flops_saved(self.step.flops),
        }

    def _eta_s(self) -> float:
        """Seconds left at this session's pace: samples that the policy still means to train over samples a second."""
        state, epochs = self.state, self.config.loop.epochs
        passes = sum(self.policy.target_rate(epoch) for epoch in range(state.epoch, epochs))
        left = passes * state.num_samples
        if state.plan is not None:
            left -= state.step_in_epoch * self.config.loop.global_batch_size
        return max(left, 0.0) * self.clock.seconds_per_sample()


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what the user can mend."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    config = parse(argv)
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    train, val = Index.open(config.data.train), Index.open(config.data.val)
    num_classes = check_data(config, train, val, int(os.environ.get("WORLD_SIZE", "1")))
    manifests = {"train": train.hash, "val": val.hash}
    run_folder.check(config, manifests)
    if config.dry_run:
        build_model(config.model, num_classes)
        print_dry_run(config, train, val)
        return 0
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.loop.deterministic
    world = World.start()
    try:
        train_in(config, world, train, val, num_classes, manifests)
    except BaseException:
        world.abandon()
        raise
    world.close()
    return 0


def train_in(
    config: Config, world: World, train: Index, val: Index, num_classes: int, manifests: dict[str, str]
) -> None:
    """Take the run directory, resume, train, and leave a clean end."""
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        lease = world.on_main(lambda: run_folder.take(config, manifests))
        if lease:
            stack.callback(lease.release)
        trainer = Trainer(config, world, train, val, num_classes)
        stack.callback(trainer.close)
        checkpoint = trainer.resume()
        world.on_main(lambda: trainer.open_tracker(run_dir, lease, checkpoint) if lease else None)
        outcome: Literal["finished", "paused", "failed"] = "failed"
        message = ""
        try:
            trainer.report_progress()
            ended = trainer.run()
            if ended == "paused":
                kept = "saved, nothing lost" if trainer.is_saved else "NOT saved, see the warnings"
                message = f"{trainer.guard.reason or 'a peer asked to stop'}: {kept}"
            while ended == "finished" and not trainer.is_saved:
                trainer.save()  # raises when the disk has refused three times in a row
            outcome = ended
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise
        finally:
            trainer.report_progress()
            if trainer.tracker:
                # Somebody who asked to stop is waiting: the last picture is not worth the grace.
                trainer.tracker.close(outcome, message, timeout_s=30.0 if outcome == "finished" else 5.0)


if __name__ == "__main__":
    # torchrun shows the first rank's traceback when it was recorded.
    sys.exit(record(run_command)(main) if "TORCHELASTIC_RUN_ID" in os.environ else run_command(main))
