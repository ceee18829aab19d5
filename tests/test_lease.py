"""Claims about who owns a run directory."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from ast_dist.errors import UserError
from ast_dist.fault.lease import LEASE_NAME, Lease, previous_launch
from tests.launching import finish, start


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
