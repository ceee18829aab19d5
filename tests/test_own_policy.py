"""A policy in one file of the user's own, through the training command."""

from pathlib import Path

import pytest

from tests.launching import finish, start
from tests.training import progress, refused, words, write_shards

POLICIES = """
import os
from ast_dist.data.order import Plan
from ast_dist.gate.policy import Policy

class EveryOther(Policy):
    def target_rate(self, epoch):
        return 0.5

    def plan(self, epoch, order):
        return Plan(order[epoch % 2 :: 2])

class Failing(Policy):
    def plan(self, epoch, order):
        raise ValueError("no plan")

class ByRank(Policy):
    def plan(self, epoch, order):
        return Plan(order[int(os.environ["RANK"]) :])
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of policies, importable here and in processes that are started."""
    (tmp_path / "policies_of_my_own.py").write_text(POLICIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def test_one_that_fails_is_refused_before_anything_is_written(
    shards: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = own / "run"
    line = refused(words(shards, run_dir, "--gate.policy", "policies_of_my_own:Failing"), capsys)
    assert "Failing.plan of epoch 0 raises ValueError: no plan" in line
    assert not run_dir.exists()


def test_it_trains_what_it_plans_and_the_metrics_say_so(shards: Path, own: Path) -> None:
    run_dir = own / "run"
    finish(start("-m", "ast_dist.train", *words(shards, run_dir, "--gate.policy", "policies_of_my_own:EveryOther")))
    assert progress(run_dir)["state"] == "finished"
    metrics = (run_dir / "metrics.jsonl").read_text()
    assert '"gate/rate": 0.5' in metrics and '"gate/rate_target": 0.5' in metrics
    assert '"cost/samples_planned": 48' in metrics


def test_plans_that_differ_between_processes_end_the_run_before_a_step(shards: Path, own: Path) -> None:
    run_dir = own / "run"
    argv = words(shards, run_dir, "--gate.policy", "policies_of_my_own:ByRank")
    told = finish(start("-m", "ast_dist.train", *argv, world_size=2), expected=1)
    assert "plans of epoch 0 differ between processes" in told
    assert progress(run_dir)["step"] == 0
