"""What all tests share."""

import os

from hypothesis import settings

# A bare `pytest` then sums floats in the same order as `make test` does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says something about the machine, not about the claim.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
