"""SIGKILL at random moments of a process that does nothing but save: does the newest checkpoint still load?

`python -m benchmarks.faults_kills WAY FOLDER KILLS SEED WIDTH` prints a row as JSON. One process imports torch and
forks the children that save, so that hundreds of kills take a minute. Each child first resumes as its tool does, from
what the killed one left, and reports; every value that it saves is the number of the step, so that a mixture of two
saves shows. What a kill leaves in the kernel's page cache reaches the disk: a power failure is not tried here.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from ast_dist.config import GateConfig, ModelConfig
from ast_dist.data.order import Orders
from ast_dist.distributed import World
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints
from ast_dist.fault.state import TrainState
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.registry import make_policy
from ast_dist.model import build_model
from benchmarks.faults_peers import peer_optimizer
from benchmarks.faults_torchvision import save_epoch

# A kill comes at a random moment of the time that so many saves take, the first ones of a process: in one or between.
_WINDOW_SAVES = 3
_PATIENCE_S = 60.0
_NUM_SAMPLES = 50_000
_KEPT_EPOCHS = 3

# A child's report: what it resumed from, before it begins to save.
Report = dict[str, Any]
# Resume from a folder, report, and save for ever, calling back after each save. Never returns.
Way = Callable[[Path, TrainState, Callable[[Report], None], Callable[[], None]], None]


def main(argv: list[str]) -> None:
    """Kill, count, print."""
    way, folder, kills, seed, width = argv[0], Path(argv[1]), int(argv[2]), int(argv[3]), int(argv[4])
    torch.set_num_threads(1)
    state = _state(width)
    generator = random.Random(seed)
    found = []
    with _Child(WAYS[way], folder, state) as child:
        # It had nothing to resume from.
        window_s = child.saving_s(_WINDOW_SAVES)
        time.sleep(generator.uniform(0.0, window_s))
    for kill in range(1, kills + 1):
        with _Child(WAYS[way], folder, state) as child:
            found.append(child.report)
            if kill < kills:
                time.sleep(generator.uniform(0.0, window_s))
    row = {
        "tool": way,
        "tries": kills,
        "unloadable": sum(one["unloadable"] for one in found),
        "nothing_loads": sum(one["nothing_loads"] for one in found),
        "mixed": sum(one["mixed"] for one in found),
        "saves": found[-1]["step"],
        "checkpoint_mb": found[-1]["bytes"] / 1e6,
        "window_s": window_s,
        "seed": seed,
    }
    print(json.dumps(row))


class _Child:
    """A forked process that resumes, reports, and saves until the block's end, where it is killed."""

    def __init__(self, way: Way, folder: Path, state: TrainState) -> None:
        self._read_end, write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _run_child(way, folder, state, write_end)
        os.close(write_end)
        self.report: Report = {}

    def __enter__(self) -> "_Child":
        try:
            raw = b""
            while not raw.endswith(b"\n"):
                raw += self._read(1)
            self.report = json.loads(raw)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read_end)

    def saving_s(self, saves: int) -> float:
        """Seconds that its next so many saves take."""
        began, left = time.monotonic(), saves
        while left > 0:
            left -= len(self._read(left))
        return time.monotonic() - began

    def _read(self, most: int) -> bytes:
        if not select.select([self._read_end], [], [], _PATIENCE_S)[0]:
            raise RuntimeError(f"a child said nothing for {_PATIENCE_S:g} s")
        raw = os.read(self._read_end, most)
        if not raw:
            raise RuntimeError("a child ended by itself: its traceback stands above")
        return raw


def _write(descriptor: int, data: bytes) -> None:
    os.write(descriptor, data)


def _run_child(way: Way, folder: Path, state: TrainState, write_end: int) -> None:
    """What a forked child does until it is killed; what it raises, it prints."""
    try:
        way(
            folder,
            state,
            lambda report: _write(write_end, f"{json.dumps(report)}\n".encode()),
            lambda: _write(write_end, b"."),
        )
    except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(1)


def _state(width: int) -> TrainState:
    """small_cnn with its momentum and the gate's memory, built once for all children."""
    model = build_model(ModelConfig(name="small_cnn", width=width), num_classes=10)
    optimizer = peer_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    policy = make_policy(PolicySetup(GateConfig(), _NUM_SAMPLES, epochs=10))
    orders = Orders(np.array([_NUM_SAMPLES]), seed=0)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), policy, orders)


def _fill(state: TrainState) -> None:
    """Make every weight, statistic and momentum the number of the step."""
    with torch.no_grad():
        for tensor in _tensors(state):
            tensor.fill_(state.global_step)


def _tensors(state: TrainState) -> list[Tensor]:
    slots = state.optimizer.state_dict()["state"].values()
    momentum = [value for slot in slots for value in slot.values() if isinstance(value, Tensor)]
    return [*state.model.state_dict().values(), *momentum]


def _report(state: TrainState, size: int, *, unloadable: bool, nothing_loads: bool) -> Report:
    mixed = any(bool((tensor != state.global_step).any()) for tensor in _tensors(state))
    return {
        "step": state.global_step,
        "bytes": size,
        "unloadable": int(unloadable),
        "nothing_loads": int(nothing_loads),
        # Fresh weights are not all alike; that nothing was loaded is counted already.
        "mixed": int(mixed and state.global_step > 0 and not nothing_loads),
    }


def _save_ours(folder: Path, state: TrainState, report: Callable[[Report], None], saved: Callable[[], None]) -> None:
    world = World.start()
    checkpoints = Checkpoints(folder, world, keep_last=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = len(commit.committed(folder))
        found = checkpoints.find()
    damaged = before and (found is None or len(commit.committed(folder)) < before)
    if found:
        checkpoints.load(found, state)
    size = sum(file.stat().st_size for file in found.iterdir()) if found else 0
    report(_report(state, size, unloadable=bool(damaged), nothing_loads=found is None))
    while True:
        state.global_step += 1
        _fill(state)
        checkpoints.save(state)
        saved()


def _save_torchvision(
    folder: Path, state: TrainState, report: Callable[[Report], None], saved: Callable[[], None]
) -> None:
    newest = folder / "checkpoint.pth"
    # What --resume is given; a person would then try the numbered ones.
    numbered = sorted(folder.glob("model_*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    loaded = next((path for path in [newest, *numbered] if _load_file(path, state)), None)
    size = loaded.stat().st_size if loaded else 0
    report(_report(state, size, unloadable=loaded != newest, nothing_loads=loaded is None))
    while True:
        state.global_step += 1
        _fill(state)
        save_epoch(_content(state), folder, state.global_step)
        # The reference keeps them all; a benchmark's disk does not.
        (folder / f"model_{state.global_step - _KEPT_EPOCHS}.pth").unlink(missing_ok=True)
        saved()


def _save_lightning(
    folder: Path, state: TrainState, report: Callable[[Report], None], saved: Callable[[], None]
) -> None:
    plugin = TorchCheckpointIO()
    newest = folder / "last.ckpt"
    others = sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    loaded = next((path for path in [newest, *others] if _load_file(path, state)), None)
    size = loaded.stat().st_size if loaded else 0
    report(_report(state, size, unloadable=loaded != newest, nothing_loads=loaded is None))
    while True:
        state.global_step += 1
        _fill(state)
        # As ModelCheckpoint does it: the new best one, without the old one, then last.ckpt.
        plugin.save_checkpoint(_content(state), folder / f"step={state.global_step}.ckpt")
        (folder / f"step={state.global_step - 1}.ckpt").unlink(missing_ok=True)
        plugin.save_checkpoint(_content(state), newest)
        saved()


def _content(state: TrainState) -> dict[str, Any]:
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "gate": state.gate.state_dict(),
        "epoch": state.global_step,
    }


def _load_file(path: Path, state: TrainState) -> bool:
    """Load a torch.save file into the state; False where it is not there or cannot be read."""
    try:
        content = torch.load(path, weights_only=True)
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.global_step = content["epoch"]
    except Exception:  # noqa: BLE001 - whatever a damaged file makes torch raise: it does not load
        return False
    return True


WAYS: dict[str, Way] = {
    "ast_dist": _save_ours,
    "torchvision reference": _save_torchvision,
    "Lightning": _save_lightning,
}

if __name__ == "__main__":
    main(sys.argv[1:])
