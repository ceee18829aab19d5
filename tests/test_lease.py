"""Claims about who owns a run directory."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from ast_dist.distributed import World
from ast_dist.errors import UserError
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.lease import LEASE_NAME, Lease, LostLeaseError, previous_launch
from tests.launching import finish, start, wait_for
from tests.states import fresh_state, saved


def test_a_second_owner_is_refused_and_the_first_keeps_the_lease(tmp_path: Path) -> None:
    first = Lease(tmp_path)
    with pytest.raises(UserError, match=f'"pid": {os.getpid()}'):
        Lease(tmp_path)
    first.release()
    Lease(tmp_path).release()


def test_a_look_from_outside_does_not_keep_an_owner_out(tmp_path: Path) -> None:
    Lease(tmp_path).release()
    with (tmp_path / LEASE_NAME).open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        Lease(tmp_path).release()


def test_the_heartbeat_outlives_its_owner(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from ast_dist.fault.lease import Lease\n"
        f"lease = Lease(Path({str(tmp_path)!r})); lease.beat(41); lease.beat(42); os.kill(os.getpid(), signal.SIGKILL)"
    )
    before = time.time()
    finish(start("-c", program), expected=-9)
    lease = Lease(tmp_path)
    assert lease.previous_beat is not None
    steps, at = lease.previous_beat
    assert steps == 42
    assert before <= at <= time.time()
    lease.release()


def test_a_new_lease_has_no_previous_heartbeat_and_names_its_owner(tmp_path: Path) -> None:
    assert previous_launch(tmp_path) is None
    lease = Lease(tmp_path, "launch 7")
    assert lease.previous_beat is None
    assert previous_launch(tmp_path) == "launch 7"
    assert json.loads((tmp_path / LEASE_NAME).read_bytes()[16:])["pid"] == os.getpid()
    lease.release()


OWNER = (
    "import signal, sys; from pathlib import Path; from ast_dist.fault.lease import Lease\n"
    "lease = Lease(Path(sys.argv[1]), 'the second'); lease.beat(7); signal.pause()"
)


def test_an_owner_knows_that_it_is_one(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    lease.beat(1)
    lease.check()
    lease.release()


def test_nothing_is_committed_into_a_run_directory_that_is_anothers_by_now(tmp_path: Path) -> None:
    run_dir, world = tmp_path / "run", World.start()
    run_dir.mkdir()
    lease = Lease(run_dir, "the first")
    checkpoints, state = Checkpoints(run_dir / "checkpoints", world, keep_last=3), fresh_state()
    checkpoints.fence = lease.check
    assert saved(checkpoints, state)
    # Somebody moves the run away while it trains, and another begins in its place.
    run_dir.rename(tmp_path / "aside")
    run_dir.mkdir()
    second = start("-c", OWNER, str(run_dir))
    wait_for(lambda: previous_launch(run_dir) == "the second", "the second owner", second)
    state.global_step += 1
    with pytest.raises(LostLeaseError, match="another stands in its place"):
        saved(checkpoints, state)
    assert sorted(path.name for path in run_dir.iterdir()) == [LEASE_NAME]
    assert len(commit.committed(tmp_path / "aside/checkpoints")) == 1
    second.kill()
    second.communicate()
    lease.release()
    world.close()


def test_an_owner_whose_directory_is_gone_knows_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lease = Lease(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "aside")
    with pytest.raises(LostLeaseError, match="does not hold"):
        lease.check()
    lease.release()


def test_an_owner_whose_lock_was_lost_to_another_knows_it(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    fcntl.flock(lease._file, fcntl.LOCK_UN)  # what a network file system may do on its own
    second = Lease(tmp_path, "the second")
    with pytest.raises(LostLeaseError, match="does not hold"):
        lease.check()
    second.release()
    with pytest.raises(LostLeaseError, match='"launch": "the second"'):
        lease.check()
    lease.release()
