"""Claims about saving and loading a training state, in one process."""

import io
import pickle
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from ast_dist.config import GateConfig
from ast_dist.data.order import Orders, epoch_order
from ast_dist.distributed import World
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints, read
from ast_dist.fault.commit import DamagedCheckpointError
from ast_dist.fault.safe_load import _Unpickler
from ast_dist.fault.state import TrainState, hash_state, join, split
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Sundew

NUM_SAMPLES = 100
ORDERS = Orders(np.array([NUM_SAMPLES]), seed=0)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


def fresh_state(optimizer: str = "sgd", seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
    kinds: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }
    gate = Sundew(PolicySetup(GateConfig(), NUM_SAMPLES, epochs=10))
    return TrainState(model, kinds[optimizer](), torch.amp.GradScaler("cpu", enabled=False), gate, ORDERS)


def train(state: TrainState, steps: int) -> None:
    """Steps on random data that the process's random state draws, dropout included."""
    for _ in range(steps):
        loss = nn.functional.cross_entropy(state.model(torch.randn(8, 6)), torch.randint(0, 3, (8,)))
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.global_step += 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fresh_process_goes_on_bit_for_bit(world: World, tmp_path: Path, optimizer: str) -> None:
    state = fresh_state(optimizer)
    train(state, 3)
    state.gate.observe(torch.arange(NUM_SAMPLES), torch.rand(NUM_SAMPLES))
    state.gate.merge(0)
    state.epoch, state.step_in_epoch = 1, 2
    state.plan = state.gate.plan(1, epoch_order(NUM_SAMPLES, 0, 1))
    assert 0 < len(state.plan.ids) < NUM_SAMPLES
    path = Checkpoints(tmp_path, world, keep_last=3).save(state)
    train(state, 4)
    other = fresh_state(optimizer, seed=1)
    Checkpoints(tmp_path, world, keep_last=3).load(path, other)
    assert other.plan.ids.tolist() == state.plan.ids.tolist()
    train(other, 4)
    assert hash_state(other.state_dict(0)) == hash_state(state.state_dict(0))


def test_the_hash_sees_every_tensor_and_every_plain_value() -> None:
    state = fresh_state()
    train(state, 1)
    before = hash_state(state.state_dict(0))
    tensors, plain = split(state.state_dict(0))
    for name in tensors:
        changed = {key: value.clone() for key, value in tensors.items()}
        flat = changed[name].reshape(-1)
        flat[-1:] = 1 - flat[-1:].to(torch.float64).nan_to_num().to(flat.dtype)
        changed[name] = flat.reshape(changed[name].shape)
        assert hash_state(join(changed, plain)) != before, name
    assert hash_state(join(tensors, {**plain, "global_step": 99})) != before
    assert hash_state(join(tensors, plain)) == before


def test_split_and_join_are_inverse() -> None:
    state = fresh_state().state_dict(0)
    joined = join(*split(state))
    assert hash_state(joined) == hash_state(state)
    assert joined.keys() == state.keys()


def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_is_found(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    good = checkpoints.save(state)
    train(state, 1)
    bad = checkpoints.save(state)
    shard = next(bad.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=rf"{shard.name}: SHA-256 .* moved to \.corrupt-step-00000001"):
        assert Checkpoints(tmp_path, world, keep_last=3).find() == good
    assert not bad.exists()
    assert list(tmp_path.glob(".corrupt-*"))


def test_without_a_checkpoint_nothing_is_found(world: World, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", world, keep_last=3).find() is None


class Hostile:
    """Unpickles to a call of open(path, "w")."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def recommit(checkpoint: Path) -> None:
    """Make the manifest agree with the files again, as a stranger would who made the checkpoint."""
    stage = checkpoint.with_name("stage-x")
    checkpoint.rename(stage)
    (stage / commit.MANIFEST_NAME).unlink()
    commit.commit(stage, checkpoint, {"step": 0})


def test_hostile_metadata_is_refused_and_does_not_run(world: World, tmp_path: Path) -> None:
    checkpoint = Checkpoints(tmp_path, world, keep_last=3).save(fresh_state())
    trace = tmp_path / "it-ran"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"io\.open is not allowed|_io\.open is not allowed"):
        read(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("owner", "name"), [("Metadata", "__init__"), ("_MEM_FORMAT_ENCODING", "__init__"), ("_MEM_FORMAT_ENCODING", "mro")]
)
def test_getattr_in_metadata_reaches_one_enums_members_and_nothing_else(
    world: World, tmp_path: Path, owner: str, name: str
) -> None:
    checkpoint = Checkpoints(tmp_path, world, keep_last=3).save(fresh_state())
    pickled = f"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n{owner}\nV{name}\ntR."
    (checkpoint / ".metadata").write_bytes(pickled.encode())
    recommit(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"getattr.* is not allowed"):
        read(checkpoint)


@pytest.mark.parametrize("name", list(_MEM_FORMAT_ENCODING.__members__))
def test_an_enum_member_pickled_by_getattr_is_read(name: str) -> None:
    pickled = f"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nV{name}\ntR."
    assert _Unpickler(io.BytesIO(pickled.encode())).load() is _MEM_FORMAT_ENCODING[name]


def test_a_disk_that_refuses_warns_twice_and_stops_at_the_third_time(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    good = checkpoints.save(state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The kernel refuses to write past 1 KiB a file, as a full disk refuses.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        for _ in range(2):
            state.global_step += 1
            with pytest.warns(RuntimeWarning, match=f"was not saved .*the last good one is {good.name}"):
                assert checkpoints.save(state) is None
        state.global_step += 1
        with pytest.raises(RuntimeError, match="failure 3 in a row"):
            checkpoints.save(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert commit.committed(tmp_path) == [good]
    commit.verify(good)
    assert checkpoints.save(state) is not None, "once there is room again, saving works again"


def test_the_best_checkpoint_outlives_the_newest(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=2), fresh_state()
    for epoch, acc1 in enumerate([50.0, 90.0, 70.0, 60.0, 65.0], start=1):
        state.epoch, state.global_step = epoch, epoch
        checkpoints.save(state, val_acc1=acc1)
    kept = [path.name for path in commit.committed(tmp_path)]
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]


def test_the_state_refuses_observations_that_were_not_merged() -> None:
    state = fresh_state()
    state.gate.observe(torch.tensor([1]), torch.tensor([0.5]))
    with pytest.raises(RuntimeError, match="merge"):
        state.state_dict(0)


def test_a_plan_that_would_differ_from_the_saved_one_is_refused() -> None:
    state = fresh_state()
    state.plan = state.gate.plan(0, epoch_order(NUM_SAMPLES, 0, 0))
    saved = state.state_dict(0)
    other = fresh_state()
    other.seed = 5
    with pytest.raises(RuntimeError, match="the plan of epoch 0"):
        other.load_state_dict(join(*split(saved)), rank=0)
    assert np.array_equal(np.sort(state.plan.ids), np.arange(NUM_SAMPLES))
