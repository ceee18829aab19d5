"""Kill processes that do nothing but save, at random moments, and see what the next ones find.

    python -m tests.faults.save_kills FOLDER [--tries 200] [--seed 0]

One process imports torch and forks the others, which start in a few milliseconds each: a world of one, or of two every
fourth time. Each goes on from the newest checkpoint that verifies, as a restart does, trains, and saves each step,
until SIGKILL hits all its ranks. Prints one JSON object: tries, mid_save (kills that left a save half-done), unloadable
(checkpoints that were committed and do not load, or are not what they say), outdated (times that a checkpoint older
than one that was committed was found), and saves (checkpoints committed in all).
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from ast_dist.config import GateConfig
from ast_dist.data.order import Orders
from ast_dist.distributed import World
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.safe_load import SafeReader
from ast_dist.fault.state import TrainState, hash_state, split
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Sundew

NUM_SAMPLES = 1000
_PATIENCE_S = 60.0
_NOTE = struct.Struct("<q")
# How long a world lives at most, in the time that a save takes on this machine.
_LONGEST_LIFE_SAVES = 4.0
_NOTHING = -1


class Note:
    """One number that a parent and the processes it forks share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _NOTE.size)
        self.value = _NOTHING

    @property
    def value(self) -> int:
        return int(_NOTE.unpack(self._memory[:])[0])

    @value.setter
    def value(self, number: int) -> None:
        self._memory[:] = _NOTE.pack(number)


def fresh_state() -> TrainState:
    """A state of about a megabyte, all of whose weights are the number of steps done."""
    model = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Linear(512, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gate = Sundew(PolicySetup(GateConfig(), NUM_SAMPLES, epochs=10))
    orders = Orders(np.array([NUM_SAMPLES]), seed=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, optimizer, scaler, gate, orders)


def step(state: TrainState) -> None:
    """Do a step: every weight is then the number of steps."""
    state.global_step += 1
    with torch.no_grad():
        for weight in state.model.parameters():
            weight.fill_(state.global_step)


def is_whole(state: TrainState) -> bool:
    """Whether all weights are of the step that the state says it is of."""
    return all(bool((weight == state.global_step).all()) for weight in state.model.parameters())


def save_until_killed(folder: Path, store: Path, rank: int, size: int, resumed: Note, is_ready: Note) -> NoReturn:
    """Go on from the newest checkpoint, and save each step. resumed: told the step. is_ready: 1 once it saves."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)
    world = World(rank, size, rank, size, 0, torch.device("cpu"))
    checkpoints, state = Checkpoints(folder, world, keep_last=3), fresh_state()
    found = checkpoints.find()
    if found is not None:
        checkpoints.load(found, state)
        assert is_whole(state), f"{found} holds weights of another step"
    if rank == 0:
        resumed.value = state.global_step
        is_ready.value = 1
    while True:
        step(state)
        checkpoints.save(state)


def start(folder: Path, store: Path, size: int, resumed: Note, is_ready: Note) -> list[int]:
    """Fork the ranks of a world and return their process ids."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                save_until_killed(folder, store, rank, size, resumed, is_ready)
            except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        pids.append(pid)
    return pids


def wait_until_ready(is_ready: Note, pids: list[int]) -> bool:
    """Watch until the ranks save; False where one of them has failed instead."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if is_ready.value == 1:
            return True
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            return False
        time.sleep(0.0005)
    raise TimeoutError(f"no save within {_PATIENCE_S:g} s")


def warm_up(folder: Path) -> None:
    """Import what torch imports when it is first used, so that the forked processes need not. Starts no thread."""
    state = fresh_state()
    tensors, _ = split(state.state_dict(0))
    stage = commit.new_stage(folder, "warm-up")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(stage), no_dist=True)
        dcp.load(tensors, storage_reader=SafeReader(stage), no_dist=True)
    hash_state(state.state_dict(0))


def steps_of(checkpoints: list[Path]) -> list[int]:
    """The steps that committed checkpoints are of."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints]


def save_s(folder: Path) -> float:
    """Seconds that a save takes on this machine: a world that nobody kills does a few."""
    is_ready, count = Note(), 5
    [pid] = start(folder / "checkpoints", folder / "store", 1, Note(), is_ready)
    ready = wait_until_ready(is_ready, [pid])
    began, done = time.monotonic(), 0
    while ready and done < count:
        done = max(steps_of(commit.committed(folder / "checkpoints")), default=0)
        assert time.monotonic() - began < _PATIENCE_S, "no save"
    taken_s = (time.monotonic() - began) / count
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    shutil.rmtree(folder / "checkpoints")
    (folder / "store").unlink()
    return taken_s


def kill_while_saving(folder: Path, tries: int, seed: int) -> dict[str, int]:
    """Kill `tries` worlds at random moments, the same for the same seed. Returns the counts told above."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    tally = {"tries": tries, "mid_save": 0, "unloadable": 0, "outdated": 0, "saves": 0}
    newest = 0
    warm_up(checkpoints)
    longest_life_s = _LONGEST_LIFE_SAVES * save_s(folder)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    for number in range(tries + 1):  # the last world is not killed at random: it looks at what the others left
        size = 2 if number % 4 == 3 else 1
        resumed, is_ready = Note(), Note()
        store = folder / f"store-{number}"
        pids = start(checkpoints, store, size, resumed, is_ready)
        if wait_until_ready(is_ready, pids):
            tally["outdated"] += resumed.value < newest
            tally["saves"] += max(0, resumed.value - newest)
            if number < tries:
                time.sleep(rng.uniform(0.0, longest_life_s))  # the random moment
        else:
            tally["unloadable"] += 1
        # Looked at before the kill: these stood, and whoever comes next has to find the newest of them, or a newer one.
        before = steps_of(commit.committed(checkpoints))
        for pid in rng.sample(pids, len(pids)):
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        tally["saves"] += max(0, max(before, default=0) - max(newest, resumed.value))
        newest = max(before, default=0)
        tally["mid_save"] += any(checkpoints.glob("stage-*"))
        store.unlink(missing_ok=True)
    tally["unloadable"] += len(list(checkpoints.glob(".corrupt-*")))
    return tally


def main(argv: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Kill processes that save, and count what cannot be loaded.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("default")
    print(json.dumps(kill_while_saving(arguments.folder, arguments.tries, arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
