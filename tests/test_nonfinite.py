"""Claims about steps that are not finite: they leave nothing behind, and the run rolls back once, then ends."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ast_dist.config import Config, DataConfig, LoopConfig, ModelConfig, OptimConfig
from ast_dist.data.batch import Batch
from ast_dist.distributed import World
from ast_dist.errors import UserError, run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.fault.nonfinite import NonFiniteSteps, RollBack
from ast_dist.model import build_model
from ast_dist.step import VOTE_NONFINITE, TrainStep
from ast_dist.track.history import read as read_rows
from ast_dist.track.tracker import Tracker
from ast_dist.train import main
from tests.training import progress, refused, state_hash, words, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run_command(main, words(shards, run_dir, "--checkpoint.every-steps", "4")) == 0
    return run_dir


def make_step(world: World, optimizer: str, precision: str = "fp32") -> TrainStep:
    config = Config(
        run_dir="x",
        data=DataConfig(train="x", val="x", image_size=8),
        model=ModelConfig(name="small_cnn", width=8),
        optim=OptimConfig(name=optimizer, lr=0.1),
        loop=LoopConfig(precision=precision),
    )
    torch.manual_seed(0)
    return TrainStep(build_model(config.model, 10), config, world)


def make_batch(weight: float = 1.0) -> Batch:
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


def everything(step: TrainStep) -> dict[str, Tensor]:
    slots = {
        f"{number}/{name}": value
        for number, slot in step.optimizer.state_dict()["state"].items()
        for name, value in slot.items()
    }
    return {name: value.clone() for name, value in {**step.module.state_dict(), **slots}.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_weights_optimizer_and_batch_statistics_as_they_were(
    world: World, optimizer: str, weight: float
) -> None:
    step = make_step(world, optimizer)
    step(make_batch(), 0.1)
    before = everything(step)
    assert any("running_mean" in name for name in before)
    step(make_batch(weight), 0.1)
    after = everything(step)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    step(make_batch(), 0.1)
    assert any(not torch.equal(before[name], value) for name, value in everything(step).items())


def test_the_step_after_tells_the_ranks_of_it_once(world: World) -> None:
    step = make_step(world, "sgd")
    told = [step(make_batch(weight), 0.1)[1][VOTE_NONFINITE].item() for weight in (1.0, float("nan"), 1.0, 1.0)]
    assert told == [0, 0, 1, 0]


def test_half_precision_tells_an_overflow_from_a_gradient_that_stays_nan(world: World) -> None:
    step = make_step(world, "sgd", "fp16")
    parameter = next(step.module.parameters())
    handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
    told = [step(make_batch(), 0.1)[1][VOTE_NONFINITE].item() for _ in range(23)]
    assert told == [0] * 21 + [1] * 2
    handle.remove()
    step(make_batch(), 0.1)
    assert step(make_batch(), 0.1)[1][VOTE_NONFINITE].item() == 0


def test_the_mean_loss_leaves_skipped_steps_out(world: World) -> None:
    step = make_step(world, "sgd")
    batch = make_batch()
    step(batch, 0.1)
    [(loss, acc1), _] = step.meters.read(world, 0)
    step(make_batch(float("nan")), 0.1)
    assert step.meters.read(world, 0)[0] == (loss, acc1)


def test_the_limit_is_of_steps_in_a_row_and_one_more_rolls_back() -> None:
    steps = NonFiniteSteps(limit=2, rolled_back=set())
    for is_finite in (False, False, True, False, False):
        assert (steps.note(is_finite, 0, 10) is None) == is_finite
    with pytest.raises(RollBack, match=r"3 steps in a row where fault\.nonfinite_steps allows 2: going back"):
        steps.note(False, 0, 10)


def test_an_epoch_is_rolled_back_once() -> None:
    with pytest.raises(RollBack):
        NonFiniteSteps(limit=0, rolled_back={3}).note(False, 4, 10)
    with pytest.raises(UserError, match="did not help"):
        NonFiniteSteps(limit=0, rolled_back={3}).note(False, 3, 10)


def poisoned(is_hit: Callable[[int], bool]) -> Callable[[TrainStep, Tensor, Tensor], Tensor]:
    """Stands in for the loss, a mock of broken arithmetic: NaN in the training steps, by number, that are hit."""
    plain, count = TrainStep._losses, 0

    def losses(step: TrainStep, logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return plain(step, logits, labels) * (float("nan") if is_hit(count) else 1.0)

    return losses


def test_single_bad_steps_are_skipped_counted_and_told(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(TrainStep, "_losses", poisoned(lambda count: count in (3, 5)))
    assert run_command(main, words(shards, run_dir)) == 0
    assert capsys.readouterr().err.count("step skipped, 1 in a row, 5 allowed") == 2
    rows = read_rows(run_dir / "metrics.jsonl")
    assert rows[-1]["train/steps_nonfinite"] == 2
    assert all(row["train/loss"] is not None for row in rows if "train/loss" in row)
    assert progress(run_dir)["state"] == "finished"


def test_a_fault_that_passes_is_rolled_back_and_leaves_no_trace_in_the_weights(
    shards: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(TrainStep, "_losses", poisoned(lambda count: 9 <= count < 13))
    every = ("--checkpoint.every-steps", "4", "--fault.nonfinite-steps", "2")
    assert run_command(main, words(shards, run_dir, *every)) == 0
    events = [row for row in read_rows(run_dir / "sessions.jsonl") if row.get("event") == "rollback"]
    assert len(events) == 1
    assert state_hash(run_dir) == state_hash(undisturbed)
    steps = [row["global_step"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "rows of the attempt that was undone are cut"


def test_a_roll_back_that_the_disk_could_not_note_is_not_done_twice(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainStep, "_losses", poisoned(lambda count: count > 8))
    monkeypatch.setattr(Tracker, "rolled_back", lambda *_: None)
    assert run_command(main, words(shards, tmp_path / "run", "--fault.nonfinite-steps", "1")) == 2
    assert "did not help" in capsys.readouterr().err


def test_a_signal_right_before_a_roll_back_is_heeded_after_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"

    def told(tracker: Tracker, epoch: int, step: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        plain(tracker, epoch, step)

    plain = Tracker.rolled_back
    monkeypatch.setattr(Tracker, "rolled_back", told)
    monkeypatch.setattr(TrainStep, "_losses", poisoned(lambda count: 9 <= count < 13))
    every = ("--checkpoint.every-steps", "4", "--fault.nonfinite-steps", "2")
    assert run_command(main, words(shards, run_dir, *every)) == 0
    assert progress(run_dir)["state"] == "paused"
    assert "SIGTERM: preempted, nothing lost" in progress(run_dir)["message"]


def test_a_run_that_diverges_ends_with_one_line_and_no_checkpoint_that_is_not_finite(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    diverging = ("--optim.lr", "1e30", "--checkpoint.every-steps", "1", "--fault.nonfinite-steps", "1")
    assert run_command(main, words(shards, run_dir, *diverging)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "NaN or infinite" in line
    assert "Lower optim.lr" in line
    assert progress(run_dir)["state"] == "failed"
    assert progress(run_dir)["needs_person"]
    assert len([row for row in read_rows(run_dir / "sessions.jsonl") if row.get("event") == "rollback"]) == 1
    for checkpoint in committed(run_dir / "checkpoints"):
        state, _ = read(checkpoint)
        assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_the_same_agent_does_not_start_again_what_a_person_must_mend_and_another_does(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    diverging = words(shards, run_dir, "--optim.lr", "1e30", "--fault.nonfinite-steps", "1")
    # As torchrun's processes see it: several hosts, whose job's name outlives its agents.
    monkeypatch.setenv("AST_DIST_LAUNCH", "torchrun job7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert run_command(main, diverging) == 2
    capsys.readouterr()
    assert "did not help" in refused([*diverging, "--dry-run"], capsys)
    monkeypatch.setattr("ast_dist.run_dir.agent_id", lambda: "another torchrun")
    assert run_command(main, [*diverging, "--dry-run"]) == 0
