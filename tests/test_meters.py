"""ast_dist/meters.py: the accuracy on all samples, from those that were selected and their chances."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ast_dist.trainer
from ast_dist.config import GateConfig
from ast_dist.data.order import Plan, epoch_order
from ast_dist.distributed import World
from ast_dist.errors import run_command
from ast_dist.fault.commit import committed
from ast_dist.fault.state import join, split
from ast_dist.gate.policy import Policy, PolicySetup, RememberingPolicy, checked_plan
from ast_dist.gate.registry import make_policy
from ast_dist.meters import AccuracyOfAll
from ast_dist.mixing import Mix
from ast_dist.step import TrainStep
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.states import ORDERS, fresh_state
from tests.test_mixing import make_batch, make_step
from tests.training import NUM_SAMPLES, state_hash, words, write_shards

COUNT = 2000
DRAWS = 300
RNG = np.random.default_rng(0)
SCORES = RNG.lognormal(-1.0, 1.5, COUNT).astype(np.float32)
# The harder a sample, the rarer it is right: what is selected is no picture of what is not.
IS_CORRECT = RNG.random(COUNT) < np.exp(-SCORES)
# The easier classes keep few samples by the draws, so that a floor has to add some.
LABELS = np.argsort(np.argsort(SCORES)) * 7 // COUNT
GATED = ("--gate.policy", "sundew", "--gate.anneal-share", "0", "--data.cache", "none")


@pytest.fixture
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def trained_policy(scores: np.ndarray = SCORES, **options: Any) -> Any:
    """A policy that has seen the samples of known score once, and never comes to its last, full epochs."""
    config = GateConfig(**{"p_min": 0.2, **options})
    policy = make_policy(PolicySetup(config, COUNT, 100 * DRAWS, labels=LABELS))
    if isinstance(policy, RememberingPolicy):
        known = np.flatnonzero(np.isfinite(scores))
        policy.observe(torch.from_numpy(known), torch.from_numpy(scores[known]))
        policy.merge(0)
    return policy


def estimates(policy: Any, world: World) -> tuple[np.ndarray, np.ndarray]:
    """What many epochs' plans let one say of all samples, percent; and the plain mean of what they selected."""
    estimated, plain = [], []
    meter = AccuracyOfAll(torch.device("cpu"))
    for epoch in range(1, DRAWS + 1):
        plan = checked_plan(policy, epoch, epoch_order(COUNT, 0, epoch))
        assert len(plan.ids) < COUNT
        is_correct = torch.from_numpy(IS_CORRECT[plan.ids])
        chances = torch.from_numpy(plan.chances) if isinstance(plan.chances, np.ndarray) else None
        meter.add(is_correct, torch.ones(len(plan.ids), dtype=torch.bool), chances)
        estimated.append(meter.read(world))
        plain.append(100 * IS_CORRECT[plan.ids].mean())
    return np.array(estimated), np.array(plain)


UNSEEN = np.where(np.arange(COUNT) % 5 == 0, np.float32(np.nan), SCORES)


@pytest.mark.parametrize(
    ("scores", "options", "is_skewed"),
    [
        (SCORES, {}, True),
        (SCORES, {"target_rate": 0.1, "p_min": 0.1}, False),
        (UNSEEN, {"target_rate": 0.5}, True),
        # Equal scores: the threshold's own bin decides, half by chance.
        (np.ones(COUNT, np.float32), {}, False),
        (np.round(SCORES), {"p_min": 0.1}, True),
        (SCORES, {"class_floor": 0.95, "p_min": 0.1}, True),
        (SCORES, {"policy": "infobatch", "prune_ratio": 0.6}, True),
        (SCORES, {"policy": "random"}, False),
    ],
    ids=["sundew", "p-min-alone", "unseen", "one-bin", "few-bins", "class-floor", "infobatch", "random"],
)
def test_over_many_draws_the_estimate_is_the_accuracy_on_all_samples(
    world: World, scores: np.ndarray, options: dict[str, Any], is_skewed: bool
) -> None:
    truth = 100 * IS_CORRECT.mean()
    estimated, plain = estimates(trained_policy(scores, **options), world)
    standard_error = estimated.std() / np.sqrt(DRAWS)
    assert abs(estimated.mean() - truth) < 3 * standard_error
    assert standard_error < 0.2
    if is_skewed:
        assert abs(plain.mean() - truth) > 20 * standard_error, "what was selected alone would not tell it"


def test_samples_that_had_no_chance_leave_the_accuracy_unknown() -> None:
    policy = trained_policy(p_min=0.0)
    assert policy.plan(1, epoch_order(COUNT, 0, 1)).chances is None


def test_chances_change_no_plan_and_no_plans_id() -> None:
    plan = trained_policy().plan(1, epoch_order(COUNT, 0, 1))
    assert plan.chances is not None
    assert Plan(plan.ids, plan.weights).id == plan.id


@pytest.mark.parametrize("chances", [0.3, np.linspace(0.1, 1.0, 40, dtype=np.float32), None])
def test_a_checkpoint_keeps_a_plans_chances(chances: np.ndarray | float | None) -> None:
    state, restored = fresh_state(), fresh_state()
    state.plan = Plan(ORDERS.of(0)[:40], chances=chances)
    tensors, plain = split(state.state_dict(rank=0))
    restored.load_state_dict(join(tensors, plain), rank=0)
    assert restored.plan is not None
    np.testing.assert_array_equal(restored.plan.chances, chances)


def test_the_sums_are_the_same_integers_over_any_number_of_ranks_and_interruptions(world: World) -> None:
    rows = [torch.from_numpy(RNG.random(COUNT) < 0.5), torch.ones(COUNT, dtype=torch.bool)]
    chances = torch.from_numpy(RNG.uniform(0.01, 1.0, COUNT).astype(np.float32))
    whole, parts = (AccuracyOfAll(torch.device("cpu")) for _ in range(2))
    whole.add(*rows, chances)
    for part in np.array_split(RNG.permutation(COUNT), 13):
        parts.add(*(each[part] for each in rows), chances[part])
        resumed = AccuracyOfAll(torch.device("cpu"))
        resumed.load(parts.totals(world), world)
        parts = resumed
    assert parts.totals(world) == whole.totals(world)
    assert whole.read(world) == pytest.approx(100 * (rows[0] / chances).sum().item() / (1 / chances).sum().item())


def test_a_row_mixed_mostly_from_its_partner_stands_for_the_partner(world: World) -> None:
    step, batch = make_step(world), make_batch([True] * 5 + [False])
    batch.chances = torch.tensor([0.1, 0.2, 0.4, 0.5, 1.0, 1.0])
    seen: list[Any] = []
    step._measure = lambda *arguments: seen.append(arguments)  # type: ignore[method-assign]
    for own_share in (0.7, 0.3):
        step(batch, 0.1, mix=Mix(own_share))
    assert [seen[0][1].tolist(), seen[0][4].tolist()] == [batch.labels.tolist(), batch.chances.tolist()]
    assert seen[1][1].tolist() == [1, 2, 3, 4, 0, 5]
    torch.testing.assert_close(seen[1][4], batch.chances[[1, 2, 3, 4, 0, 5]])


def epochs_of(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]


@pytest.mark.parametrize("more", [("--gate.policy", "full"), (*GATED, "--optim.mixup-alpha", "1.0")])
def test_where_everything_is_trained_it_is_the_mean_of_what_was_selected(
    shards: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    steps = -(-NUM_SAMPLES // 16)
    argv = words(shards, tmp_path, *more, "--loop.epochs", "1", "--track.every-steps", str(steps))
    assert run_command(main, argv) == 0
    step_row, epoch_row = read_rows(tmp_path / "metrics.jsonl")
    assert step_row["train/acc1_selected"] == epoch_row["train/acc1_all"]


class Recorder:
    """Records what the step measures, and the plans' chances by sample, of the real trainer and policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chances: list[dict[int, float]] = []
        self.answers: list[list[tuple[int, bool]]] = []
        measure, checked = TrainStep._measure, ast_dist.trainer.checked_plan

        def record(step: TrainStep, logits: Any, labels: Any, counts: Any, losses: Any, chances: Any) -> None:
            is_correct = (logits.argmax(dim=1) == labels)[counts].tolist()
            self.answers[-1] += zip(self._ids[counts].tolist(), is_correct, strict=True)
            measure(step, logits, labels, counts, losses, chances)

        def train(step: TrainStep, batch: Any, *arguments: Any) -> Any:
            self._ids = batch.ids
            return real_train(step, batch, *arguments)

        def plan(*arguments: Any) -> Plan:
            plan = checked(*arguments)
            known = [1.0] * len(plan.ids) if plan.chances is None else plan.chances.tolist()
            self.chances.append(dict(zip(plan.ids.tolist(), known, strict=True)))
            self.answers.append([])
            return plan

        real_train = TrainStep.train
        monkeypatch.setattr(TrainStep, "_measure", record)
        monkeypatch.setattr(TrainStep, "train", train)
        monkeypatch.setattr(ast_dist.trainer, "checked_plan", plan)

    def estimate(self, epoch: int) -> float:
        """Hájek's estimator as it is written down."""
        chances = self.chances[epoch]
        correct = sum(is_correct / chances[sample] for sample, is_correct in self.answers[epoch])
        return 100 * correct / sum(1 / chances[sample] for sample, _ in self.answers[epoch])


def test_a_gated_run_reports_what_its_answers_and_chances_say_and_a_resume_in_mid_epoch_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    every_step = ("--checkpoint.every-steps", "1", "--checkpoint.keep-last", "99")
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        assert run_command(main, words(shards, whole, *GATED, *every_step)) == 0
    reported = [row["train/acc1_all"] for row in epochs_of(whole)]
    assert len(recorder.answers[1]) == len(recorder.chances[1]) < NUM_SAMPLES
    assert reported == pytest.approx([recorder.estimate(epoch) for epoch in range(3)], rel=1e-6)
    shutil.copytree(whole, resumed)
    # The epochs take 6, 3 to 5, and 3 to 5 steps.
    for checkpoint in committed(resumed / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > 8:
            shutil.rmtree(checkpoint)
    assert run_command(main, words(shards, resumed, *GATED, *every_step)) == 0
    assert [row["train/acc1_all"] for row in epochs_of(resumed)] == reported
    assert state_hash(resumed) == state_hash(whole)


@pytest.mark.parametrize("policy", ["online", "selective_backprop"])
def test_scored_epochs_report_what_the_scoring_pass_got_right_of_every_sample(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    answers: list[bool] = []
    score = TrainStep.score_batch

    def scoring(step: TrainStep, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            step.module.eval()
            right = step.module(step._inputs(batch)).argmax(dim=1) == batch.labels
            step.module.train()
        answers.extend(right[batch.is_active].tolist())
        return score(step, batch)

    monkeypatch.setattr(TrainStep, "score_batch", scoring)
    more = ("--gate.policy", policy, "--gate.anneal-share", "0", "--gate.warmup-epochs", "0", "--loop.epochs", "1")
    assert run_command(main, words(shards, tmp_path, *more)) == 0
    assert len(answers) == NUM_SAMPLES
    assert epochs_of(tmp_path)[0]["train/acc1_all"] == 100 * sum(answers) / NUM_SAMPLES


class EveryOther(Policy):
    """Selects by the position in the order, and does not say with which chance."""

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        return Plan(order[::2])


def test_a_policy_of_ones_own_that_states_no_chances_gets_no_accuracy_on_all(shards: Path, tmp_path: Path) -> None:
    argv = words(shards, tmp_path, "--gate.policy", "tests.test_meters:EveryOther", "--loop.epochs", "1")
    assert run_command(main, argv) == 0
    assert "train/acc1_all" not in epochs_of(tmp_path)[0]
