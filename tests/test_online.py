"""Policies that score batches (online, selective_backprop, a user's own) inside the training command."""

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ast_dist.command_line import parse
from ast_dist.config import GateConfig, OptimConfig
from ast_dist.data.index import Index
from ast_dist.distributed import World
from ast_dist.errors import run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.gate.baselines import SelectiveBackprop
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Online
from ast_dist.gate.threshold import histogram
from ast_dist.mixing import Mixer
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from ast_dist.trainer import Trainer
from tests import training
from tests.launching import finish, start, steps_done, wait_for
from tests.shards import overwrite, squares, write_split
from tests.training import progress, refused, state_hash, write_shards

NUM_SAMPLES = 120
GLOBAL_BATCH_SIZE = 16
STEPS_AN_EPOCH = math.ceil(NUM_SAMPLES / GLOBAL_BATCH_SIZE)
EPOCHS = 3
POLICIES = ("online", "selective_backprop")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), NUM_SAMPLES)


@pytest.fixture
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


def words(shards: Path, run_dir: Path, policy: str, *more: str) -> list[str]:
    """A small training whose epochs after the first are scored (selective_backprop: all of them)."""
    options = ("--gate.policy", policy, "--gate.target-rate", "0.4", "--gate.anneal-share", "0")
    return training.words(shards, run_dir, *options, "--loop.global-batch-size", str(GLOBAL_BATCH_SIZE), *more)


def make_trainer(world: World, argv: list[str]) -> Trainer:
    config = parse(argv)
    train, val = Index.open(config.data.train), Index.open(config.data.val)
    Path(config.run_dir).mkdir()
    return Trainer(config, world, train, val, train.num_classes)


def rows_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == kind]


def online(target_rate: float, p_min: float) -> Online:
    gate = GateConfig(policy="online", target_rate=target_rate, p_min=p_min, warmup_epochs=0, anneal_share=0.0)
    policy = Online(PolicySetup(gate, num_samples=1, epochs=1))
    policy.plan(0, np.arange(1))
    return policy


def test_scoring_leaves_batch_statistics_random_state_and_mode_as_they_were(
    world: World, shards: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(world, words(shards, tmp_path / "run", "online", "--loop.epochs", "1"))
    trainer.run()
    batch = next(trainer.loader.val_batches(NUM_SAMPLES))
    before = {name: buffer.clone() for name, buffer in trainer.step.module.named_buffers()}
    assert any("running_mean" in name for name in before)
    random_state = torch.get_rng_state()
    trainer.step.score_batch(batch)
    for name, buffer in trainer.step.module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in trainer.step.module.modules())
    assert all(parameter.grad is None for parameter in trainer.step.module.parameters())
    trainer.close()


class NoHostWait(TorchDispatchMode):
    """Fails on operations for which a GPU's host waits: they turn a tensor's values into Python's, or into shapes."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = str(operation)
        waits = name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal"))
        indices = [index for index in arguments[1] if index is not None] if name.startswith("aten.index.") else []
        assert not waits and all(index.dtype == torch.int64 for index in indices), name
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_from_scoring_to_training_asks_the_device_for_a_value(
    world: World, shards: Path, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked on a CPU only, whether the step was finite.
    monkeypatch.setattr("ast_dist.step.known_to_host", lambda flag: True)
    trainer = make_trainer(world, words(shards, tmp_path / "run", policy, "--loop.epochs", "2"))
    trainer.run()
    batch = next(trainer.loader.val_batches(GLOBAL_BATCH_SIZE))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostWait():
        batch.weights.sum().item()
    with NoHostWait():
        scores = trainer.step.score_batch(batch)
        trainer.policy.select(batch.ids, scores)
        histogram(scores)
        trainer.step.train(batch, 0.1, trainer.step.votes(batch, stop=False, save=False)[0])
    trainer.close()


@pytest.mark.parametrize("scoring_px", ["0", "12"])
def test_a_score_does_not_depend_on_the_rest_of_its_batch(
    world: World, shards: Path, tmp_path: Path, scoring_px: str
) -> None:
    argv = words(shards, tmp_path / "run", "online", "--loop.epochs", "1", "--gate.scoring-px", scoring_px)
    trainer = make_trainer(world, argv)
    trainer.run()
    whole = next(trainer.loader.val_batches(NUM_SAMPLES))
    scores = trainer.step.score_batch(whole)
    alone = [trainer.step.score_batch(batch)[0] for batch in trainer.loader.val_batches(1)]
    torch.testing.assert_close(torch.stack(alone), scores, rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.01
    trainer.close()


def test_the_ledger_equals_what_went_through_the_model(world: World, tmp_path: Path) -> None:
    write_split(tmp_path / "train", squares(NUM_SAMPLES, side=16))
    write_split(tmp_path / "val", squares(20, side=16))
    more = ("--data.image-size", "16", "--gate.scoring-px", "8", "--loop.global-batch-size", "15")
    trainer = make_trainer(world, words(tmp_path, tmp_path / "run", "online", *more))
    counts: Counter[str] = Counter()

    def note_gradient(gradient: Tensor) -> None:
        counts["backwarded"] += int((gradient != 0).any(dim=1).sum())

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if inputs[0].shape[-1] == 8:
            assert not module.training
            counts["scored"] += len(output)
        elif module.training:
            counts["forwarded"] += len(torch.unique(inputs[0].flatten(1), dim=0))  # padding repeats a row
            output.register_hook(note_gradient)

    trainer.step.module.register_forward_hook(note)
    trainer.run()
    ledger, flops = trainer.ledger, trainer.step.flops
    assert counts == {"forwarded": ledger.forwarded, "backwarded": ledger.backwarded, "scored": ledger.scored}
    assert ledger.scored == 2 * NUM_SAMPLES
    assert NUM_SAMPLES < ledger.backwarded < 2.5 * NUM_SAMPLES
    # A quarter of the pixels is a quarter of the convolutions' work.
    assert flops.scoring == pytest.approx(flops.forward / 4, rel=0.05)
    spent = ledger.backwarded * flops.step + ledger.scored * flops.scoring
    assert ledger.flops_saved(flops) == pytest.approx(1 - spent / (3 * NUM_SAMPLES * flops.step))
    trainer.close()


def test_without_scoring_px_scoring_costs_a_forward_pass(world: World, shards: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, words(shards, tmp_path / "run", "online"))
    assert trainer.step.flops.scoring == trainer.step.flops.forward
    trainer.close()


def test_a_scoring_size_that_the_model_does_not_take_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: Path
) -> None:
    line = refused(words(shards, tmp_path / "run", "online", "--gate.scoring-px", "2"), capsys)
    assert "gate.scoring_px 2" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_reports_the_share_that_it_trained_of_what_it_drew(shards: Path, tmp_path: Path, policy: str) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, policy)) == 0
    before = {"cost/samples_backwarded": 0}
    for row in rows_of(run_dir, "epoch"):
        trained = row["cost/samples_backwarded"] - before["cost/samples_backwarded"]
        assert row["gate/rate"] == pytest.approx(trained / NUM_SAMPLES)
        assert row["gate/rate_target"] == (1.0 if policy == "online" and row["epoch"] == 1 else 0.4)
        before = row
    steps = rows_of(run_dir, "step")
    # Nothing is known yet of an epoch's first batch: its results come with the second.
    assert "gate/rate" not in steps[-STEPS_AN_EPOCH]
    assert 0.0 <= steps[-STEPS_AN_EPOCH + 1]["gate/rate"] < 1.0
    assert before["cost/samples_scored"] == (2 if policy == "online" else 3) * NUM_SAMPLES
    assert before["cost/samples_skipped"] == 3 * NUM_SAMPLES - before["cost/samples_backwarded"]


def test_a_run_that_selects_next_to_nothing_finishes_and_reports_no_loss_of_nothing(
    shards: Path, tmp_path: Path
) -> None:
    tiny = ("--gate.target-rate", "0.0001", "--gate.warmup-epochs", "0", "--loop.epochs", "1")
    assert run_command(main, words(shards, tmp_path / "run", "online", "--gate.p-min", "0", *tiny)) == 0
    steps = rows_of(tmp_path / "run", "step")
    assert len(steps) == STEPS_AN_EPOCH
    assert "train/loss" not in steps[0]
    assert all(math.isfinite(row.get("train/loss", 0.0)) for row in steps)


def test_a_users_own_policy_scores_and_remembers_what_was_trained_alone(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "tests.candidates_program:EvenIds")) == 0
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    assert state["gate"]["memory"]["visits"].tolist() == [3, 0] * (NUM_SAMPLES // 2)
    assert state["counts"]["backwarded"] == 3 * NUM_SAMPLES // 2
    assert state["counts"]["scored"] == 3 * NUM_SAMPLES


def test_mixed_steps_of_scored_batches_are_not_remembered(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mixed = ("--optim.mixup-alpha", "0.4", "--optim.mix-share", "0.5", "--loop.epochs", "1")
    assert run_command(main, words(shards, run_dir, "tests.candidates_program:EveryId", *mixed)) == 0
    state, _ = read(committed(run_dir / "checkpoints")[-1])
    remembered = sum(state["gate"]["memory"]["visits"].tolist())
    steps = range(0, NUM_SAMPLES, GLOBAL_BATCH_SIZE)
    is_mixed = Mixer(OptimConfig(mixup_alpha=0.4, mix_share=0.5), seed=0).mixed_steps(0, np.arange(len(steps)))
    whole = sum(min(GLOBAL_BATCH_SIZE, NUM_SAMPLES - s) for s, mix in zip(steps, is_mixed, strict=True) if not mix)
    assert 0 < remembered == whole < NUM_SAMPLES


def test_a_dry_run_states_the_cost_of_scoring(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, words(shards, tmp_path / "run", "selective_backprop", "--dry-run")) == 0
    assert "about 2.20 epochs of full training" in capsys.readouterr().out  # 3 · (0.4 + 1/3)


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("online", ("--gate.weight-cap", "2", "--gate.scoring-px", "12", "--gate.warmup-epochs", "0")),
        ("selective_backprop", ("--gate.loss-history", "40", "--optim.name", "adamw", "--loop.precision", "bf16")),
        ("tests.candidates_program:EveryId", ("--optim.mixup-alpha", "0.4", "--optim.mix-share", "0.5")),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(
    shards: Path, tmp_path: Path, policy: str, more: tuple[str, ...]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_command(main, words(shards, whole, policy, *more)) == 0
    # The deadline ends the first session after its second batch.
    assert run_command(main, words(shards, stopped, policy, *more, "--session.hours", "1e-9")) == 0
    state, _ = read(committed(stopped / "checkpoints")[-1])
    assert len(state["candidates"]["ids"]) > 0, "something should wait at the checkpoint, or this shows little"
    assert run_command(main, words(shards, stopped, policy, *more)) == 0
    assert state_hash(stopped) == state_hash(whole)


def test_a_sample_that_is_damaged_while_it_waits_is_left_out_and_named(tmp_path: Path) -> None:
    write_split(tmp_path / "val", squares(20, side=8))
    index = write_split(tmp_path / "train", squares(NUM_SAMPLES, side=8))
    argv = words(tmp_path, tmp_path / "run", "tests.candidates_program:EvenIds", "--loop.epochs", "1")
    assert run_command(main, [*argv, "--session.hours", "1e-9"]) == 0
    state, _ = read(committed(tmp_path / "run/checkpoints")[-1])
    waiting = int(state["candidates"]["ids"][0])
    overwrite(index, waiting, b"not a JPEG")
    with pytest.warns(RuntimeWarning, match=f"left out: .*{waiting:07d}-x"):
        assert main(argv) == 0
    assert progress(tmp_path / "run")["state"] == "finished"
    state, _ = read(committed(tmp_path / "run/checkpoints")[-1])
    assert state["counts"]["damaged"] == 1
    assert state["counts"]["backwarded"] == NUM_SAMPLES // 2 - 1
    expected = [int(i % 2 == 0 and i != waiting) for i in range(NUM_SAMPLES)]
    assert state["gate"]["memory"]["visits"].tolist() == expected


def kill(run_dir: Path) -> None:
    """SIGKILL rank 0, the one that writes."""
    os.kill(json.loads((run_dir / ".lease").read_bytes()[16:])["pid"], signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.parametrize(("world_size", "policy"), [(1, "selective_backprop"), (2, "online")])
def test_killed_in_mid_epoch_and_restarted_equals_never_stopped(
    shards: Path, tmp_path: Path, world_size: int, policy: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    every = ("--checkpoint.every-steps", "3", "--loop.epochs", "12")
    finish(start("-m", "ast_dist.train", *words(shards, whole, policy, *every), world_size=world_size))
    argv = ("-m", "ast_dist.train", *words(shards, killed, policy, *every))
    job = start(*argv, world_size=world_size, max_restarts=1)
    wait_for(lambda: steps_done(killed) >= STEPS_AN_EPOCH + 4, "step 12", job)
    kill(killed)
    finish(job)
    starts = [row for row in read_rows(killed / "sessions.jsonl") if "event" not in row]
    assert starts[1]["restart"] == 1
    assert starts[1]["resumed_from_step"] > 0
    assert state_hash(killed) == state_hash(whole)


@pytest.mark.parametrize(("target", "p_min"), [(0.1, 0.0), (0.4, 0.0), (0.4, 0.2), (0.7, 0.5)])
@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_onlines_rate_meets_the_target_although_scores_drift(target: float, p_min: float, drift: float) -> None:
    policy = online(target, p_min)
    rng = np.random.default_rng(0)
    kept = []
    for number in range(400):
        scores = torch.from_numpy(rng.lognormal(-drift * number, 1.0, 128).astype(np.float32))
        ids = torch.arange(number * 128, (number + 1) * 128)
        kept.append(int((policy.select(ids, scores) > 0).sum()))
        policy.absorb(histogram(scores))
    assert sum(kept) / (400 * 128) == pytest.approx(target, rel=0.01)
    # An epoch of a few batches comes near to it, too.
    assert sum(kept[:40]) / (40 * 128) == pytest.approx(target, rel=0.06)


def test_online_keeps_what_is_above_the_threshold_and_a_share_of_the_rest_with_its_weight() -> None:
    gate = GateConfig(policy="online", target_rate=0.4, p_min=0.2, weight_cap=3.0, warmup_epochs=0, anneal_share=0.0)
    policy = Online(PolicySetup(gate, num_samples=1, epochs=1))
    policy.plan(0, np.arange(1))
    scores = torch.from_numpy(np.random.default_rng(0).lognormal(0.0, 1.0, 40_000).astype(np.float32))
    policy.absorb(histogram(scores))
    weights = policy.select(torch.arange(40_000), scores)
    threshold = policy.threshold.threshold
    assert (weights[scores > 1.05 * threshold] == 1.0).all()
    easy = weights[scores < threshold / 1.05]
    assert {*easy.unique().tolist()} == {0.0, 3.0}
    assert (easy > 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (weights > 0).float().mean().item() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("target_rate", [1 / 3, 0.5, 0.2])
def test_selective_backprop_trains_with_the_chance_cdf_to_the_power_of_beta(target_rate: float) -> None:
    gate = GateConfig(policy="selective_backprop", target_rate=target_rate)
    policy = SelectiveBackprop(PolicySetup(gate, num_samples=1, epochs=1))
    policy.plan(0, np.arange(1))
    # Losses are exponential with mean 1, so that CDF(x) = 1 - exp(-x); the paper's R of them, many times over.
    losses = torch.from_numpy(-np.log1p(-(np.arange(200_000) + 0.5) / 200_000)).float()
    policy.absorb(histogram(losses))
    beta = 1 / target_rate - 1
    count = 20_000
    for loss in (0.05, 0.2, 0.7, 1.5, 3.0):
        ids = torch.arange(count) + int(1e6 * loss)
        chosen = (policy.select(ids, torch.full((count,), loss)) > 0).float().mean().item()
        # A bin is 4.4 % wide, and where in it a loss lies is drawn.
        low, high = ((1 - math.exp(-loss * factor)) ** beta for factor in (1 / 1.045, 1.045))
        spread = 4 * math.sqrt(high * (1 - low) / count)
        assert low - spread <= chosen <= high + spread
    weights = policy.select(torch.arange(200_000), losses)
    assert (weights > 0).float().mean().item() == pytest.approx(target_rate, rel=0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_that_are_no_number_are_trained_and_move_nothing(policy: str) -> None:
    gate = GateConfig(policy=policy, target_rate=0.4, warmup_epochs=0, anneal_share=0.0)
    kinds = {"online": Online, "selective_backprop": SelectiveBackprop}
    made = kinds[policy](PolicySetup(gate, num_samples=1, epochs=1))
    made.plan(0, np.arange(1))
    scores, ids = torch.linspace(0.1, 3.0, 500), torch.arange(500)
    made.absorb(histogram(scores))
    before = made.select(ids, scores)
    nothing = torch.full((500,), math.nan)
    nothing[::2] = math.inf
    assert (made.select(ids, nothing) > 0).all()
    made.absorb(histogram(nothing))
    if policy == "online":
        assert made.report()["scores_non_finite"] == 500
    else:
        assert torch.equal(made.select(ids, scores), before)
    assert made.select(torch.zeros(0, dtype=torch.int64), torch.zeros(0)).shape == (0,)
