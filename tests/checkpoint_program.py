"""What each rank of test_checkpoint_world does: `torchrun … checkpoint_program.py OUT WHAT` leaves OUT/rank-R.json."""

import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ast_dist.distributed import World
from ast_dist.errors import UserError
from ast_dist.fault.checkpoint import Checkpoints, read
from ast_dist.fault.lease import LostLeaseError
from ast_dist.fault.state import hash_state
from tests.states import fresh_state, saved, train

PATIENCE_S = 60.0


def raised(action: Callable[[], Any]) -> str:
    """What an action raises, in words; what it returns where it raises nothing."""
    try:
        return str(action())
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__}: {error}"


def buffers_and_rng(world: World, folder: Path) -> dict[str, Any]:
    """Batch statistics and random states that differ between the ranks: what is saved of them, and what comes back."""
    state, checkpoints = fresh_state(), Checkpoints(folder, world, keep_last=3)
    state.model[1].running_mean.fill_(float(world.rank))
    torch.manual_seed(100 + world.rank)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(100 + world.rank)).tolist()
    path = saved(checkpoints, state)
    content, _ = read(path)
    torch.manual_seed(0)
    checkpoints.load(path, fresh_state(seed=9))
    drawn = torch.rand(3).tolist()
    checkpoints.close()
    return {
        "mean_saved": content["model"]["1.running_mean"].tolist(),
        "mean_held": state.model[1].running_mean.tolist(),
        "draws_come_back": drawn == expected,
    }


def one_ranks_disk(world: World, folder: Path) -> list[str]:
    """The last rank alone cannot write; each save's outcome here, until it raises."""
    state, checkpoints = fresh_state(), Checkpoints(folder, world, keep_last=3)
    outcomes = [raised(lambda: saved(checkpoints, state))]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    for _ in range(3):
        state.global_step += 1
        outcomes.append(raised(lambda: saved(checkpoints, state)))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.close()
    return [*outcomes, *(path.name for path in sorted(folder.iterdir()))]


def one_ranks_nan(world: World, folder: Path) -> str:
    """The last rank alone holds a NaN; what the save raises here."""
    state, checkpoints = fresh_state(), Checkpoints(folder, world, keep_last=3)
    if world.rank == world.size - 1:
        with torch.no_grad():
            state.model[3].bias[1] = float("nan")
    told = raised(lambda: saved(checkpoints, state))
    checkpoints.close()
    return told


def lost_lease(world: World, folder: Path) -> str:
    """Rank 0's fence objects; what the save raises here."""
    checkpoints = Checkpoints(folder, world, keep_last=3)

    def fence() -> None:
        raise LostLeaseError("it is another's")

    checkpoints.fence = fence
    told = raised(lambda: saved(checkpoints, fresh_state()))
    checkpoints.close()
    return told


def go_on(world: World, folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint, note what it is, train a step and save."""
    checkpoints, state = Checkpoints(folder, world, keep_last=9), fresh_state("adamw", seed=world.size)
    found = checkpoints.find()
    if found:
        checkpoints.load(found, state)
    loaded = hash_state(state.state_dict(world.rank), with_rng=False)
    torch.manual_seed(state.global_step)  # all ranks train the same, as synchronised ranks do
    train(state, 1)
    torch.manual_seed(world.rank)
    after = hash_state(state.state_dict(world.rank), with_rng=False)
    path = saved(checkpoints, state)
    ranks = sorted(read(path)[0]["rng"])
    checkpoints.close()
    return {"found": found.name if found else None, "loaded": loaded, "after": after, "rng_of": ranks}


class Deadly(Checkpoints):
    """The last rank dies amid writing."""

    def _write(self, stage: Path, tensors: dict[str, torch.Tensor]) -> None:
        if self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._write(stage, tensors)


def lose_a_peer(world: World, folder: Path, out: Path) -> None:
    """Look after a save, as the training loop does, whose peer dies; write down what is raised, and fail."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's answer to the peer's death: we must find out ourselves
    checkpoints = Deadly(folder, world, keep_last=3)
    checkpoints.save(fresh_state())
    deadline = time.monotonic() + PATIENCE_S
    told = "nothing"
    try:
        while time.monotonic() < deadline:
            checkpoints.poll()
    except RuntimeError as error:
        told = str(error)
        raise
    finally:
        checkpoints.abandon()
        (out / f"rank-{world.rank}.json").write_text(json.dumps({"polled": told, "waited": raised(checkpoints.wait)}))


def main() -> None:
    """Do what is asked, and write down what this rank saw."""
    warnings.simplefilter("ignore", RuntimeWarning)
    out, what = Path(sys.argv[1]), sys.argv[2]
    world = World.start()
    if what == "lose_a_peer":
        lose_a_peer(world, out / "checkpoints", out)
    if what == "go_on":
        results = go_on(world, out / "checkpoints")
    else:
        results = {
            action.__name__: action(world, out / action.__name__)
            for action in (buffers_and_rng, one_ranks_disk, one_ranks_nan, lost_lease)
        }
    (out / f"rank-{world.rank}.json").write_text(json.dumps(results))
    world.close()


if __name__ == "__main__":
    main()
