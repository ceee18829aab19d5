"""Claims about the average of the weights: what it averages, by which clock, and that it goes on exactly."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ast_dist.average import Average
from ast_dist.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig
from ast_dist.data.batch import Batch
from ast_dist.data.order import Orders
from ast_dist.distributed import World
from ast_dist.errors import run_command
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints, read
from ast_dist.fault.commit import committed
from ast_dist.fault.state import TrainState, hash_state
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.registry import make_policy
from ast_dist.model import build_model
from ast_dist.step import TrainStep
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests import training
from tests.launching import finish, start, steps_done, wait_for
from tests.states import saved
from tests.training import write_shards

DECAY = 0.9


@pytest.fixture
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def train_one(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,))).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_step(world: World, decay: float) -> TrainStep:
    config = Config(
        run_dir="x",
        data=DataConfig(train="x", val="x", image_size=8),
        model=ModelConfig(name="small_cnn", width=8),
        optim=OptimConfig(lr=0.1, ema_decay=decay),
    )
    torch.manual_seed(0)
    return TrainStep(build_model(config.model, 10), config, world)


def make_batch(weight: float) -> Batch:
    """Four samples, of which one weighs `weight`."""
    return Batch(
        step=0,
        ids=torch.arange(4),
        images=torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
        labels=torch.arange(4),
        weights=torch.tensor([weight, 1.0, 1.0, 1.0]),
        is_active=torch.ones(4, dtype=torch.bool),
        planned=4,
    )


def floats(module: nn.Module) -> torch.Tensor:
    """Every weight and batch statistic in one row."""
    return torch.cat([value.flatten() for value in module.state_dict().values() if value.is_floating_point()]).double()


@pytest.mark.parametrize("pace", [1.0, 2.5])
def test_weights_and_batch_statistics_follow_the_recurrence(pace: float) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(model, DECAY)
    expected, seen = None, 0.0
    for _ in range(120):
        average.advance(pace)
        train_one(model, optimizer)
        average.update()
        seen += pace
        kept = min(DECAY, (1 + seen) / (10 + seen)) ** pace
        now = floats(model)
        expected = now if expected is None else kept * expected + (1 - kept) * now
    assert (1 + seen) / (10 + seen) > DECAY, "the run should reach the decay itself"
    torch.testing.assert_close(floats(average.module), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(floats(average.module), floats(model))


def test_one_step_that_stands_for_three_forgets_as_much_as_three() -> None:
    def kept_of_the_old(paces: list[float]) -> float:
        model = nn.Linear(1, 1, bias=False)
        average = Average(model, DECAY)
        nn.init.ones_(model.weight)
        average.advance(1000.0)
        average.update()
        nn.init.zeros_(model.weight)
        for pace in paces:
            average.advance(pace)
            average.update()
        return average.module.weight.item()

    assert kept_of_the_old([3.0]) == pytest.approx(kept_of_the_old([1.0, 1.0, 1.0]), rel=1e-6)
    assert kept_of_the_old([3.0]) == pytest.approx(DECAY**3, rel=1e-6)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_the_average_finite_and_nearer_to_the_weights_that_stand(
    world: World, weight: float
) -> None:
    step = make_step(world, DECAY)

    def train_on(weight: float) -> None:
        step.average.advance(1.0)
        step(make_batch(weight), 0.1)

    train_on(1.0)
    train_on(1.0)
    standing, before = floats(step.module), floats(step.average.module)
    train_on(weight)
    assert torch.equal(floats(step.module), standing)
    kept = 4 / 13  # (1 + t) / (10 + t) after 3 steps
    torch.testing.assert_close(floats(step.average.module), kept * before + (1 - kept) * standing)


def test_off_there_is_none(world: World) -> None:
    assert make_step(world, 0.0).average is None


def test_a_checkpoint_restores_it_bit_for_bit(world: World, tmp_path: Path) -> None:
    def fresh(seed: int) -> TrainState:
        torch.manual_seed(seed)
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        policy = make_policy(PolicySetup(GateConfig(policy="full"), 100, epochs=10))
        state = TrainState(
            model, optimizer, torch.amp.GradScaler("cpu", enabled=False), policy, Orders(np.array([100]), seed=0)
        )
        state.average = Average(model, DECAY)
        return state

    def train(state: TrainState, steps: int) -> None:
        for _ in range(steps):
            state.average.advance(1.75)
            train_one(state.model, state.optimizer)
            state.average.update()

    state, other = fresh(0), fresh(1)
    train(state, 3)
    state.average.advance(0.25)  # as between a skipped step and the next
    path = saved(Checkpoints(tmp_path, world, keep_last=3), state)
    train(state, 4)
    Checkpoints(tmp_path, world, keep_last=3).load(path, other)
    train(other, 4)
    assert hash_state(other.state_dict(0)) == hash_state(state.state_dict(0))
    assert other.state_dict(0)["ema"]["updates"] == 7


def test_the_best_checkpoint_is_the_one_whose_better_weights_are_best(tmp_path: Path) -> None:
    scores = [(50.0, None), (70.0, 60.0), (65.0, 80.0), (75.0, 79.0), (None, None)]
    for step, (acc1, ema_acc1) in enumerate(scores, start=1):
        stage = commit.new_stage(tmp_path, f"step-{step:08d}")
        commit.commit(stage, tmp_path / f"step-{step:08d}", {"val_acc1": acc1, "val_ema_acc1": ema_acc1})
    assert commit.best(tmp_path) == "step-00000003"


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    gate = ("--gate.target-rate", "0.5", "--gate.anneal-share", "0.3", "--gate.p-min", "0.1")
    return [*training.words(shards, run_dir, *gate, "--optim.ema-decay", "0.9"), *more]


def epoch_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]


def test_both_are_evaluated_each_time_and_both_accuracies_stand_in_the_manifest(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--track.quiet", "--checkpoint.keep-last", "9")) == 0
    rows = epoch_rows(run_dir)
    assert len(rows) == 3
    saved = [json.loads((path / "manifest.json").read_text()) for path in committed(run_dir / "checkpoints")]
    assert [row["val/ema_acc1"] for row in rows] == [manifest["val_ema_acc1"] for manifest in saved]
    assert [row["val/acc1"] for row in rows] == [manifest["val_acc1"] for manifest in saved]
    assert all(row["val/ema_loss"] != row["val/loss"] for row in rows)
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    assert state["ema"]["updates"] == state["global_step"]
    assert state["ema"]["unread"] == 0.0


def test_a_gated_epoch_advances_it_as_far_as_a_full_one(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--track.quiet", "--checkpoint.keep-last", "9")) == 0
    states = [read(path)[0] for path in committed(run_dir / "checkpoints")]
    steps = [after - before for before, after in itertools.pairwise([0, *(state["global_step"] for state in states)])]
    assert steps[1] < steps[0], "the second epoch should be gated"
    full_steps = training.NUM_SAMPLES // 16
    assert [state["ema"]["seen"] for state in states] == pytest.approx([full_steps, 2 * full_steps, 3 * full_steps])


def test_scored_batches_advance_it_by_the_data_they_were_chosen_from(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    online = ("--gate.policy", "online", "--track.quiet", "--checkpoint.keep-last", "9")
    assert run_command(main, words(shards, run_dir, *online)) == 0
    last = read(committed(run_dir / "checkpoints")[-1])[0]["ema"]
    assert last["seen"] + last["unread"] == pytest.approx(3 * training.NUM_SAMPLES // 16)
    assert last["updates"] < 3 * training.NUM_SAMPLES // 16


def test_off_nothing_is_evaluated_twice(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, training.words(shards, run_dir, "--track.quiet", "--loop.epochs", "1")) == 0
    assert not [key for row in epoch_rows(run_dir) for key in row if "ema" in key]
    assert read(committed(run_dir / "checkpoints")[-1])[0]["ema"] == {}


def test_a_decay_of_1_and_another_decay_on_resume_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert "optim.ema_decay is 1, not in [0, 1)" in training.refused(
        words(shards, run_dir, "--optim.ema-decay=1"), capsys
    )
    assert run_command(main, words(shards, run_dir, "--track.quiet", "--loop.epochs", "1")) == 0
    changed = words(shards, run_dir, "--loop.epochs", "1", "--optim.ema-decay", "0.99")
    assert "optim.ema_decay: 0.9 → 0.99" in training.refused(changed, capsys)


@pytest.mark.faults
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_in_mid_epoch_and_restarted_it_equals_the_one_that_never_stopped(
    tmp_path: Path, world_size: int
) -> None:
    shards = write_shards(tmp_path / "shards", 240)
    more = ("--loop.global-batch-size", "12", "--loop.epochs", "4", "--checkpoint.every-steps", "7")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("-m", "ast_dist.train", *words(shards, whole, *more), world_size=world_size))
    job = start("-m", "ast_dist.train", *words(shards, killed, *more), world_size=world_size, max_restarts=1)
    wait_for(lambda: steps_done(killed) >= 25, "step 25", job)
    os.kill(json.loads((killed / ".lease").read_bytes()[16:])["pid"], signal.SIGKILL)
    finish(job)
    assert len([row for row in read_rows(killed / "sessions.jsonl") if "event" not in row]) == 2
    assert training.state_hash(killed) == training.state_hash(whole)
