"""Claims about saving and loading a training state, in one process."""

import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_dist.data.order import Orders, epoch_order
from ast_dist.distributed import World
from ast_dist.errors import UserError
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import Checkpoints, NonFiniteStateError, read
from ast_dist.fault.state import hash_state, join, split
from tests.launching import finish, start
from tests.states import NUM_SAMPLES, fresh_state, saved, train


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fresh_process_goes_on_bit_for_bit(world: World, tmp_path: Path, optimizer: str) -> None:
    state = fresh_state(optimizer)
    train(state, 3)
    state.gate.observe(torch.arange(NUM_SAMPLES), torch.rand(NUM_SAMPLES))
    state.gate.merge(0)
    state.epoch, state.step_in_epoch = 1, 2
    state.plan = state.gate.plan(1, epoch_order(NUM_SAMPLES, 0, 1))
    assert 0 < len(state.plan.ids) < NUM_SAMPLES
    path = saved(Checkpoints(tmp_path, world, keep_last=3), state)
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
    good = saved(checkpoints, state)
    train(state, 1)
    bad = saved(checkpoints, state)
    shard = next(bad.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=rf"{shard.name}: SHA-256 .* moved to \.corrupt-step-00000001"):
        assert Checkpoints(tmp_path, world, keep_last=3).find() == good
    assert not bad.exists()
    assert list(tmp_path.glob(".corrupt-*"))


def test_where_all_checkpoints_are_damaged_nothing_is_moved_and_a_person_decides(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    for _ in range(2):
        (saved(checkpoints, state) / "state.json").unlink()
        state.global_step += 1
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of its 2 .*step-00000001/state\.json: missing.*--resume never"):
            Checkpoints(tmp_path, world, keep_last=3).find()
    assert sorted(tmp_path.rglob("*")) == before


def test_where_only_checkpoints_that_were_moved_aside_are_left_a_person_decides(world: World, tmp_path: Path) -> None:
    commit.quarantine(saved(Checkpoints(tmp_path, world, keep_last=3), fresh_state()))
    with pytest.raises(UserError, match=r"none of its 1 checkpoints is sound\. Put"):
        Checkpoints(tmp_path, world, keep_last=3).find()


def test_without_a_checkpoint_nothing_is_found(world: World, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", world, keep_last=3).find() is None


def test_a_disk_that_refuses_warns_twice_and_stops_at_the_third_time(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    good = saved(checkpoints, state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The kernel refuses to write past 1 KiB a file, as a full disk refuses.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        for _ in range(2):
            state.global_step += 1
            with pytest.warns(RuntimeWarning, match=f"was not saved: .*the last good one is {good.name}"):
                assert saved(checkpoints, state) is None
        state.global_step += 1
        with pytest.raises(UserError, match="failure 3 in a row"):
            saved(checkpoints, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert commit.committed(tmp_path) == [good]
    commit.verify(good)
    assert saved(checkpoints, state) is not None, "once there is room again, saving works again"


def test_the_best_checkpoint_outlives_the_newest(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=2), fresh_state()
    for epoch, acc1 in enumerate([50.0, 90.0, 70.0, 60.0, 65.0], start=1):
        state.epoch, state.global_step = epoch, epoch
        saved(checkpoints, state, acc1)
    kept = [path.name for path in commit.committed(tmp_path)]
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]


def test_what_is_saved_is_the_state_at_the_save_though_training_goes_on(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state("adamw")
    train(state, 2)
    for _ in range(3):  # the second and third use the memory of the one before
        expected, step = hash_state(state.state_dict(0)), state.global_step
        may_commit = threading.Event()
        checkpoints.fence = may_commit.wait
        checkpoints.save(state)
        assert checkpoints.is_saving, "save returns before the commit"
        assert checkpoints.latest != f"step-{step:08d}"
        train(state, 1)
        state.gate.observe(torch.arange(NUM_SAMPLES), torch.rand(NUM_SAMPLES))
        state.gate.merge(0)
        may_commit.set()
        content, _ = read(checkpoints.wait())
        assert content["global_step"] == step
        assert hash_state(content) == expected
        assert hash_state(state.state_dict(0)) != expected


def test_one_save_is_under_way_at_a_time(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=9), fresh_state()
    order: list[str] = []
    may_commit = threading.Event()

    def fence() -> None:
        may_commit.wait()
        if list(tmp_path.glob("stage-*/manifest.json")):
            order.append("committed")

    checkpoints.fence = fence
    checkpoints.save(state)
    state.global_step += 1
    assert checkpoints.is_saving

    def save_again() -> None:
        checkpoints.save(state)
        order.append("started")

    other = threading.Thread(target=save_again)
    other.start()
    may_commit.set()
    other.join()
    checkpoints.wait()
    assert order == ["committed", "started", "committed"]


def test_rank_0_hears_of_a_commit_before_the_ranks_agree_on_it(world: World, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, world, keep_last=3)
    checkpoints.save(fresh_state())
    while (ended := checkpoints.poll()) is None:
        pass
    assert (ended.kind, ended.name) == ("saved", "step-00000000")
    assert checkpoints.latest == "step-00000000"
    assert checkpoints.newest is None
    assert checkpoints.poll() is None, "told once"
    assert ended.save_s > 0
    checkpoints.wait()
    assert checkpoints.newest == "step-00000000"


def test_nan_is_never_saved_as_good(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    good = saved(checkpoints, state)
    for value, where in ((float("nan"), "model/1.running_var"), (float("inf"), "optimizer/0/momentum_buffer")):
        state = fresh_state()
        train(state, 1)
        tensors, _ = split(state.state_dict(0))
        tensors[where].view(-1)[-1] = value
        with pytest.raises(NonFiniteStateError, match=f"{where} holds NaN or infinity on rank 0"):
            saved(checkpoints, state)
        assert checkpoints.is_urgent is False
    assert commit.committed(tmp_path) == [good]
    assert not list(tmp_path.glob("stage-*"))


def test_the_largest_finite_numbers_are_saved(world: World, tmp_path: Path) -> None:
    state = fresh_state()
    with torch.no_grad():
        state.model[0].weight.fill_(torch.finfo(torch.float32).max)
    assert saved(Checkpoints(tmp_path, world, keep_last=3), state)


def test_a_state_of_another_type_is_not_cast_silently(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=3), fresh_state()
    state.model.half()
    path = saved(checkpoints, state)
    with pytest.raises(RuntimeError, match=r"model/0\.weight was torch\.float16 .* is torch\.float32"):
        checkpoints.load(path, fresh_state())


def test_a_save_under_way_keeps_no_failed_process_alive(tmp_path: Path) -> None:
    program = (
        "import sys, threading; from pathlib import Path\n"
        "from ast_dist.distributed import World; from ast_dist.fault.checkpoint import Checkpoints\n"
        "from tests.states import fresh_state\n"
        f"checkpoints = Checkpoints(Path({str(tmp_path)!r}), World.start(), keep_last=3)\n"
        "checkpoints.fence = threading.Event().wait\n"
        "checkpoints.save(fresh_state())\n"
        "try: raise RuntimeError('training failed')\n"
        "finally: checkpoints.abandon()"
    )
    assert "RuntimeError: training failed" in finish(start("-c", program), expected=1)


def test_a_save_that_lost_an_item_is_not_committed(world: World, tmp_path: Path) -> None:
    class Forgetful(Checkpoints):
        def _write(self, stage: Path, tensors: dict[str, torch.Tensor]) -> None:
            super()._write(stage, tensors)
            shard = next(stage.glob("*.distcp"))
            shard.write_bytes(shard.read_bytes()[:-4000])

    with pytest.warns(RuntimeWarning, match="was not saved: DamagedCheckpointError"):
        assert saved(Forgetful(tmp_path, world, keep_last=3), fresh_state()) is None
    assert not list(tmp_path.iterdir())


def test_one_checkpoint_of_every_so_many_hours_is_kept(world: World, tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, world, keep_last=1, keep_every_h=2.0), fresh_state()
    for step, hours in enumerate([0.5, 1.0, 2.1, 2.5, 3.9, 4.2, 5.0]):
        state.global_step, state.session = step, {"total_s": hours * 3600}
        saved(checkpoints, state)
    assert [path.name[-1] for path in commit.committed(tmp_path)] == ["2", "5", "6"]


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
    other.orders = Orders(np.array([NUM_SAMPLES]), seed=5)
    with pytest.raises(RuntimeError, match="the plan of epoch 0"):
        other.load_state_dict(join(*split(saved)), rank=0)
    assert np.array_equal(np.sort(state.plan.ids), np.arange(NUM_SAMPLES))
