"""What all tests share."""

import os

import pytest
from hypothesis import settings

# A bare `pytest` then sums floats in the same order as `make test` does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says something about the machine, not about the claim.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-seed", type=int, default=0, help="seed of the moments at which tests/faults strikes")


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults strike at moments drawn with --faults-seed={config.getoption('--faults-seed')}"
