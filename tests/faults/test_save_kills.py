"""The claim about SIGKILL around saves: whatever stands under a checkpoint's name loads."""

import json
import random
from pathlib import Path

from tests.launching import finish, start

TRIES = 200


def test_after_200_kills_around_saves_every_checkpoint_that_was_committed_loads(
    tmp_path: Path, rng: random.Random
) -> None:
    seed = rng.randrange(2**31)
    job = start("-m", "tests.faults.save_kills", str(tmp_path), "--tries", str(TRIES), "--seed", str(seed))
    told = finish(job, patience_s=600.0)
    print(told)
    tally = json.loads(told.splitlines()[-1])
    assert tally["tries"] == TRIES
    assert tally["mid_save"] >= TRIES // 4, "kills that hit nothing prove nothing"
    assert tally["saves"] >= TRIES // 2
    assert (tally["unloadable"], tally["outdated"]) == (0, 0)
