"""Claims about what must not start: a second run in one's directory, and a run that is no longer the same."""

import random
from pathlib import Path

import pytest

from tests import training
from tests.faults.harness import Run, random_steps, words
from tests.training import snapshot


def described(run_dir: Path) -> dict[str, bytes | None]:
    """What a run writes when it starts and at no other time."""
    names = ("config.yaml", "env.json", "sessions.jsonl")
    return {name: data for name, data in snapshot(run_dir).items() if name in names}


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in mid-training."""
    run_dir = tmp_path_factory.mktemp("runs") / "killed"
    with Run(words(shards, run_dir)) as run:
        run.wait_for_step(50)
    return run_dir


def test_a_second_run_in_a_directory_is_refused_with_the_owners_name_and_the_first_does_not_notice(
    shards: Path, tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    argv = words(shards, run_dir, "--loop.epochs", "1000")
    with Run(argv, world_size=2) as first:
        first.wait_for_step(1)
        owner, before = first.all_pids()[0], described(run_dir)
        for step in random_steps(rng, 200):
            first.wait_for_step(step)
            line = training.refused(argv[2:], capsys)
            assert f'another process trains here ({{"pid": {owner}' in line
            assert described(run_dir) == before
        with Run(argv, world_size=2) as second:
            output = second.finish(expected=1)
        assert output.count("error: ") == 1, "one of the ranks tells it"
        assert f'another process trains here ({{"pid": {owner}' in output
        assert described(run_dir) == before
        first.wait_for_step(first.step + 1)
        assert first.job.poll() is None


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (("--seed", "1"), "seed: 0 → 1"),
        (("--optim.lr", "0.1"), "optim.lr: 0.05 → 0.1"),
        (("--gate.target-rate", "0.4"), "gate.target_rate: 0.5 → 0.4"),
        (("--loop.global-batch-size", "24"), "loop.global_batch_size: 12 → 24"),
        (("--loop.epochs", "17"), "loop.epochs: 16 → 17"),
    ],
)
def test_a_setting_that_changes_weights_is_refused_on_resume_with_its_difference_and_nothing_is_touched(
    shards: Path, killed: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], difference: str
) -> None:
    before = snapshot(killed)
    assert f"({difference})" in training.refused(words(shards, killed, *more)[2:], capsys)
    assert snapshot(killed) == before


def test_torchrun_tells_a_refused_configuration_once_and_touches_nothing(shards: Path, killed: Path) -> None:
    before = snapshot(killed)
    with Run(words(shards, killed, "--optim.lr", "0.1"), world_size=2) as run:
        output = run.finish(expected=1)
    assert output.count("error: ") == 1
    assert "(optim.lr: 0.05 → 0.1)" in output
    assert snapshot(killed) == before
