"""The training loop.

The state of a run is (epochs done, steps done of the epoch's plan); everything else follows from it and from the
checkpoint. All ranks walk through the same loop and meet in its collectives; rank 0 alone writes.
"""

import dataclasses
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ast_dist import run_dir as run_folder
from ast_dist.augmenter import Augmenter
from ast_dist.ballot import Ballot, StopAskedError
from ast_dist.candidates import Candidates
from ast_dist.clock import Clock
from ast_dist.config import Config
from ast_dist.counter_rng import STREAM_INIT, hash_key
from ast_dist.damage import DamageLog
from ast_dist.data.batch import Batch
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Orders, Plan, step_ids
from ast_dist.distributed import LaggedRead, World
from ast_dist.errors import UserError
from ast_dist.evaluator import Evaluator
from ast_dist.fault.checkpoint import Checkpoints, checkpoint_name
from ast_dist.fault.deadline import Deadline, session_age_s
from ast_dist.fault.guard import DEADLINE, Guard
from ast_dist.fault.lease import Lease
from ast_dist.fault.nonfinite import NonFiniteSteps
from ast_dist.fault.processes import local_peers
from ast_dist.fault.state import TrainState
from ast_dist.fault.watchdog import Watchdog
from ast_dist.gate.cost import Ledger
from ast_dist.gate.policy import Policy, PolicySetup, RememberingPolicy, checked_plan
from ast_dist.gate.registry import make_policy
from ast_dist.joules import Joules
from ast_dist.mixing import Mixer
from ast_dist.model import build_model, lr_at
from ast_dist.peak_flops import peak_of_world
from ast_dist.preflight import check_decoders
from ast_dist.reports import Reports
from ast_dist.resources import Resources, open_meter
from ast_dist.saves import Saves
from ast_dist.step import VOTE_DAMAGED, VOTE_NONFINITE, VOTE_SAVE, VOTE_STOP, TrainStep

# Added to the name of a checkpoint that follows another one of the same step, which was saved before its evaluation.
_EVALUATED = "-evaluated"
# What reading from a server may take with all its tries, before it says itself what failed.
_FETCH_S = 360.0


class Trainer:
    """Everything that one rank needs to train, and the loop.

    rolled_back: epochs in which this process went back to the last checkpoint before.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        train: Index,
        val: Index,
        num_classes: int,
        rolled_back: Collection[int] = (),
    ) -> None:
        self.config = config
        self.world = world
        # First: until the model is there, nothing of ours runs on a GPU, and what it draws is its idle power.
        meter = open_meter(world.device)
        setup = PolicySetup.of_run(config, train.num_samples, train.label)
        setup = dataclasses.replace(setup, rank=world.rank, world_size=world.size)
        setup = dataclasses.replace(setup, all_reduce=world.sum, gather=world.gather_rows)
        self.policy: Policy = make_policy(setup)
        # A policy may have fewer epochs than full training: the schedule is its own.
        self.epochs = self.policy.epochs
        torch.manual_seed(hash_key(STREAM_INIT, config.seed))
        model = build_model(config.model, num_classes)
        joules = Joules(world, meter)
        self.step = TrainStep(model, config, world, self.policy.score)
        # Ranks draw apart from here on (dropout); what they must agree on is drawn from counters.
        torch.manual_seed(hash_key(STREAM_INIT, config.seed, 1 + world.rank))
        self.loader = Loader(train, config.data, world.rank, world.size, world.local_size, world.device)
        self.val_loader = Loader(val, config.data, world.rank, world.size, world.local_size, world.device)
        orders = Orders(train.shard_sizes, config.seed, config.data.shuffle_block_shards)
        self.state = TrainState(self.step.module, self.step.optimizer, self.step.scaler, self.policy, orders)
        self.augment = Augmenter(config.data, config.seed, world.device)
        self.mixer = Mixer(config.optim, config.seed)
        self.candidates = Candidates(
            self.step, self.policy, self.augment, self.mixer, train.label, world, config.loop.global_batch_size
        )
        self.state.candidates = self.candidates
        self.state.average = self.step.average
        self.ledger = Ledger()
        self.resources = Resources(self.loader, world, joules)
        saving = config.checkpoint
        self.checkpoints = Checkpoints(
            run_folder.checkpoints_path(Path(config.run_dir)), world, saving.keep_last, saving.keep_every_h
        )
        self.deadline = Deadline(hours * 3600, session_age_s()) if (hours := config.session.hours) else None
        peers = local_peers(world.rank, world.gather)
        self.guard = Guard(config.checkpoint.grace_s, self.deadline, peers)
        floor_s = config.fault.watchdog_s
        fetch_s = _FETCH_S if floor_s > 0 and train.is_remote else 0.0
        self.watchdog = Watchdog(max(floor_s, fetch_s), world.rank, peers)
        # Rank 0's, which alone beats it.
        self.lease: Lease | None = None
        check_decoders(config.data.decoder, world.gather(self.loader.decoder.name))
        self.val_damage = DamageLog(config.data.damaged_limit, val.num_samples, val.location, world)
        self.damage = DamageLog(config.data.damaged_limit, train.num_samples, train.location, world)
        self.lagged = LaggedRead()
        # The disk remembers them over restarts; where it refused, this process does.
        told = world.broadcast(world.on_main(lambda: run_folder.rolled_back_epochs(Path(config.run_dir))))
        self.nonfinite = NonFiniteSteps(config.fault.nonfinite_steps, {*told, *rolled_back})
        # Set by what the ranks agreed on, and so the same on all of them.
        self._wants_stop = False
        self._wants_save = False
        # What the report of an epoch needs whose evaluation a stop cut short; it is kept with the checkpoint.
        self._unevaluated: dict[str, Any] = {}
        self._evaluated_late_at: int | None = None
        self.clock = Clock(peak_of_world(world, config.loop.precision))
        told_of = (self.state, self.step, self.policy, self.candidates, self.ledger, self.resources, self.clock)
        self.reports = Reports(config, world, *told_of, self.deadline)
        self.evaluate = Evaluator(config.loop, world, self.val_loader, self.step, self.state, self.reports)
        self.saves = Saves(saving, self.checkpoints, self.nonfinite, self.deadline, self.clock, self.reports)

    def run(self) -> Literal["finished", "paused"]:
        """Train until all epochs are done or someone asks to stop. Returns the run's state: finished or paused."""
        try:
            self._go_on()
        finally:
            self.watchdog.rest()
        return "paused" if self._unevaluated or self.state.epoch < self.epochs else "finished"

    def _go_on(self) -> None:
        state = self.state
        if self._unevaluated and not self._finish_epoch(**self._unevaluated):
            return
        while state.epoch < self.epochs:
            if state.plan is None:
                with self.watchdog.paused():
                    state.plan = self._plan()
            num_steps = state.plan.num_steps(self.config.loop.global_batch_size)
            self.resources.joules.enter("train")
            for batch in self.clock.waiting(self._batches(state.plan)):
                self._train(batch, num_steps)
                if state.step_in_epoch == num_steps:
                    break
                if self._wants_save or self._wants_stop or self._is_save_step():
                    self.save(at_all_costs=self._wants_stop)
                if self._wants_stop:
                    return
            with self.watchdog.paused():
                goes_on = self._end_epoch(state.plan)
            if not goes_on:
                return

    def own(self, lease: Lease, checkpoint: str | None) -> None:
        """Begin to report in the run directory; rank 0 calls it once the state is the one to go on from."""
        self.lease = lease
        self.checkpoints.fence = lease.check
        self.reports.open(Path(self.config.run_dir), lease, checkpoint, self.loader, self.val_loader.index.num_samples)

    def resume(self) -> str | None:
        """Load the newest checkpoint that verifies, if there is one, and return its name."""
        checkpoint = self.checkpoints.find()
        if checkpoint is None:
            return None
        self.checkpoints.load(checkpoint, self.state)
        self.ledger.load(self.state.counts)
        self._read_candidates()
        self.resources.load(self.state.session.get("resources", {}))
        self.step.accuracy.load(self.state.session.get("accuracy_of_all", [0, 0]), self.world)
        self._unevaluated = self.state.session.get("unevaluated", {})
        if checkpoint.name.endswith(_EVALUATED):
            self._evaluated_late_at = self.state.global_step
        return checkpoint.name

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is of the present step, once the save under way was waited for."""
        return self.checkpoints.newest == self._checkpoint_name

    @property
    def _checkpoint_name(self) -> str:
        step = self.state.global_step
        return checkpoint_name(step) + (_EVALUATED if step == self._evaluated_late_at else "")

    def save(
        self, val_acc1: float | None = None, val_ema_acc1: float | None = None, *, at_all_costs: bool = False
    ) -> None:
        """Start to save; all ranks must call.

        val_acc1, val_ema_acc1: of the weights and of their average, percent, where exactly this state was evaluated.
        Amid steps that were skipped because they were not finite nothing is saved, unless the run ends here: it would
        be no place to roll back to.
        """

        def begin() -> bool:
            self._settle()
            is_finite = self.nonfinite.in_row == 0 and self.world.sum(self.step.nonfinite.clone()).item() == 0
            if not is_finite and not at_all_costs:
                return False
            self.policy.merge(self.state.epoch)
            self.state.counts = self.ledger.to_dict()
            self.resources.tally()
            self.state.session = {**self.reports.session(), "unevaluated": self._unevaluated}
            self.checkpoints.save(self.state, val_acc1, val_ema_acc1, self._checkpoint_name)
            return True

        self._wants_save = False
        with self.watchdog.paused():
            self.saves.start(begin, self.state.epoch)

    def close(self) -> None:
        """Stop threads and give the signals back."""
        # First: what could be saved is saved, and a thread that waits for a server must not count against the grace.
        self.guard.close()
        self.watchdog.close()
        self.loader.close()
        self.val_loader.close()
        self.resources.close()

    def _plan(self) -> Plan:
        """The present epoch's plan, which must be the same on all ranks."""
        state = self.state
        plan = checked_plan(self.policy, state.epoch, state.orders.of(state.epoch))
        if len(set(self.world.gather(plan.id))) > 1:
            raise UserError(
                f"gate.policy is {self.config.gate.policy}, whose plans of epoch {state.epoch} differ between "
                "processes: derive them from seed, epoch and memory, never from the rank or a global generator."
            )
        return plan

    def _read_candidates(self) -> None:
        """Read what waited to be trained when the checkpoint was taken; its pixels follow from seed, epoch and id."""
        waiting = self.candidates.ids
        if len(waiting):
            [batch] = self.loader.train_batches(Plan(waiting), len(waiting), self.state.seed, self.state.epoch)
            for text in self.candidates.restore(batch, self.state.epoch):
                self.ledger.damaged += 1
                if self.world.is_main:
                    warnings.warn(f"damaged since it was selected, and left out: {text}", RuntimeWarning, stacklevel=2)

    def _batches(self, plan: Plan) -> Iterator[Batch]:
        state, loop = self.state, self.config.loop
        return self.loader.train_batches(plan, loop.global_batch_size, state.seed, state.epoch, state.step_in_epoch)

    def _train(self, host_batch: Batch, num_steps: int) -> None:
        """One step, and its reports."""
        state, config = self.state, self.config
        lr = self._lr(num_steps)
        if self.step.average:
            full_steps = -(-state.num_samples // config.loop.global_batch_size)
            self.step.average.advance(full_steps / num_steps)
        self.saves.note()
        wishes = {"stop": self.guard.wants_stop, "save": self.world.is_main and self.saves.is_due()}
        trained, scored = host_batch.planned, 0
        if self._is_scored:
            assert state.plan is not None
            global_ids = step_ids(state.plan.ids, host_batch.step, config.loop.global_batch_size)
            trained, votes_before = self.candidates.advance(host_batch, global_ids, lr, state.epoch, **wishes)
            scored = host_batch.planned
        else:
            batch = self.augment(host_batch, state.epoch)
            mix = self.mixer.draw(state.epoch, state.step_in_epoch, batch.images.shape[-1])
            scores, votes = self.step(batch, lr, mix=mix, **wishes)
            # Rows that did not train must not be remembered, nor scores of two samples at once.
            self.policy.observe(torch.where(batch.is_active & (mix is None), batch.ids, -1), scores)
            votes_before = self.lagged.swap(votes)
        state.step_in_epoch += 1
        state.global_step += 1
        self._count(trained, scored)
        if self.lease:
            self.lease.beat(state.global_step)
        self.watchdog.beat(state.global_step)
        if self.deadline:
            self.deadline.saw_steps(self.watchdog.slowest_s)
        self.damage.note(host_batch.damaged)
        self._agree(votes_before)
        self.clock.step_done(host_batch.planned, trained + self.policy.setup.scoring_cost * scored)
        if self.reports.tracker and self.clock.is_first_step:
            self.reports.tracker.first_step()
        if state.global_step % config.track.every_steps == 0:
            self.reports.step(lr, num_steps)

    @property
    def _is_scored(self) -> bool:
        """Whether the present epoch's batches are scored before they are trained."""
        return self.policy.scores_epoch(self.state.epoch)

    def _lr(self, num_steps: int) -> float:
        """Learning rate of the present step, or of the last one once all are done."""
        step = min(self.state.step_in_epoch, num_steps - 1)
        # The middle of the step: neither the first nor the last step of a run has a learning rate of 0.
        return lr_at((self.state.epoch + (step + 0.5) / num_steps) / self.epochs, self.epochs, self.config.optim)

    def _is_save_step(self) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return every_steps > 0 and self.state.global_step % every_steps == 0

    def _count(self, trained: int, scored: int) -> None:
        """Advance the ledger to the present position; the skipped samples of an epoch count as its steps pass."""
        state, ledger = self.state, self.ledger
        ledger.forwarded += trained
        ledger.backwarded += trained
        ledger.scored += scored
        self.clock.computed(trained * self.step.flops.step + scored * self.step.flops.scoring)
        assert state.plan is not None
        in_plan = len(state.plan.ids)
        consumed = min(state.step_in_epoch * self.config.loop.global_batch_size, in_plan)
        ledger.full_equivalent = round(state.num_samples * (state.epoch + consumed / in_plan))

    def _settle(self) -> None:
        """Wait for what the last step left under way, and take it in."""
        self._agree(self.lagged.flush())
        self._agree(self.candidates.settle())

    def _agree(self, votes: list[int] | None) -> None:
        """Take in a step's summed votes: all ranks read the same ones at the same place in the loop."""
        if votes is None:
            return
        self._wants_stop |= votes[VOTE_STOP] > 0
        self._wants_save |= votes[VOTE_SAVE] > 0
        warning = self.nonfinite.note(votes[VOTE_NONFINITE] == 0, self.state.epoch, self.state.global_step)
        if warning:
            self.ledger.steps_nonfinite += 1
            self.reports.warn(warning)
        damaged = votes[VOTE_DAMAGED]
        self.ledger.damaged += damaged
        if self._is_scored:
            self.ledger.scored -= damaged
        else:
            self.ledger.forwarded -= damaged
            self.ledger.backwarded -= damaged
        self.reports.damaged(self.damage.agree(damaged))

    def _end_epoch(self, plan: Plan) -> bool:
        """Share what was remembered, evaluate, report, save. Returns whether to go on."""
        state, loop = self.state, self.config.loop
        self._settle()
        lr = self._lr(plan.num_steps(loop.global_batch_size))
        self._count(self.candidates.drain(lr, state.epoch), 0)
        self.damage.epoch_done()
        self.policy.merge(state.epoch)
        self.resources.joules.enter(None)
        report = self.reports.gate() | self.clock.epoch_trained() | self.reports.accuracy(plan)
        self.candidates.epoch_done()
        if self.mixer.is_on and isinstance(self.policy, RememberingPolicy) and not self._is_scored:
            share = self.mixer.whole_share(state.epoch, len(plan.ids), loop.global_batch_size)
            report["gate/observed_share"] = share
        state.epoch += 1
        state.step_in_epoch = 0
        state.plan = None
        self.ledger.full_equivalent = state.num_samples * state.epoch
        return self._finish_epoch(len(plan.ids), report)

    def _finish_epoch(self, planned: int, trained: dict[str, float]) -> bool:
        """Evaluate, report and save an epoch that is trained. Returns whether to go on. Arguments: as for its report.

        Where the ranks agree to stop, the weights are saved without waiting for the evaluation's end, which may take
        longer than the grace: it is done when the run goes on.
        """
        state = self.state
        is_late, self._unevaluated = bool(self._unevaluated), {}
        scores: dict[str, float] = {}
        ballot = Ballot(self.world, lambda: self._must_leave(is_late))
        if state.epoch % self.config.loop.eval_every_epochs == 0 or state.epoch == self.epochs:
            try:
                if self._wants_stop:
                    raise StopAskedError
                self.resources.joules.enter("eval")
                scores = self.evaluate(self.val_damage, ballot)
            except StopAskedError:
                self._wants_stop = True
                # Plain numbers: a policy of the user's own may have reported others.
                plain = {key: float(value) for key, value in trained.items()}
                self._unevaluated = {"planned": planned, "trained": plain}
                self.save(at_all_costs=True)
                return False
            finally:
                self.resources.joules.enter(None)
        if is_late:
            self._evaluated_late_at = state.global_step
        self.reports.epoch(planned, trained, scores)
        self.save(scores.get("val/acc1"), scores.get("val/ema_acc1"), at_all_costs=self._wants_stop)
        self._wants_stop |= ballot.result()
        return not self._wants_stop

    def _must_leave(self, is_late: bool) -> bool:
        """Whether this rank must leave an evaluation. A deadline that is near puts none off twice."""
        return self.guard.wants_stop and not (is_late and self.guard.reason == DEADLINE)
