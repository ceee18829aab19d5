"""What the faults share: where they strike, what they strike, and what a run that nobody struck left."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import NUM_SAMPLES, Reference, Run, words
from tests.training import state_hash, write_shards


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder is a fault's, whether or not its author wrote so."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Draws the moments of one test, the same ones however many tests run; a failed test shows how to repeat them."""
    seed = request.config.getoption("--faults-seed")
    print(f"drawn with --faults-seed={seed}")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train and a val split that every fault may read and none may change."""
    return write_shards(tmp_path_factory.mktemp("shards"), NUM_SAMPLES, 31)


@pytest.fixture(scope="session")
def unfaulted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Reference]:
    """What a run of that many processes leaves that nobody struck; trained once for all tests."""
    trained: dict[int, Reference] = {}

    def reference(world_size: int) -> Reference:
        if world_size not in trained:
            run_dir = tmp_path_factory.mktemp("unfaulted") / f"world-{world_size}"
            with Run(words(shards, run_dir), world_size=world_size) as run:
                run.finish()
            trained[world_size] = Reference(state_hash(run_dir), run.progress()["step"])
        return trained[world_size]

    return reference
