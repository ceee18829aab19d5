"""Train: `python -m ast_dist.train …`, alone or under torchrun."""

import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from ast_dist import run_dir as run_folder
from ast_dist import startup
from ast_dist.allocator import keep_freed_memory
from ast_dist.command_line import parse
from ast_dist.config import Config
from ast_dist.data.index import Index
from ast_dist.data.remote import open_index
from ast_dist.distributed import World
from ast_dist.errors import UserError, run_command
from ast_dist.fault.guard import die_with_parent
from ast_dist.fault.lease import Lease
from ast_dist.fault.nonfinite import RollBack
from ast_dist.model import build_model
from ast_dist.preflight import check_data, print_dry_run, with_block_shards
from ast_dist.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what the user can mend."""
    startup.note("imported_s")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    config = parse(argv)
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    train, val = open_index(config.data.train, config.data), open_index(config.data.val, config.data)
    config = with_block_shards(config, train)
    num_classes = check_data(config, train, val, int(os.environ.get("WORLD_SIZE", "1")))
    manifests = {"train": train.hash, "val": val.hash}
    run_folder.check(config, manifests)
    if config.dry_run:
        build_model(config.model, num_classes)
        print_dry_run(config, train, val)
        return 0
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.loop.deterministic
    keep_freed_memory()
    world = World.start()
    startup.note("joined_s")
    try:
        train_in(config, world, train, val, num_classes, manifests)
    except BaseException:
        world.abandon()
        raise
    world.close()
    return 0


def train_in(
    config: Config, world: World, train: Index, val: Index, num_classes: int, manifests: dict[str, str]
) -> None:
    """Take the run directory, and train in it until there is an end."""
    with ExitStack() as stack:
        lease = world.on_main(lambda: run_folder.take(config, manifests, train.manifest["classes"]))
        if lease:
            stack.callback(lease.release)
        restart = world.restart
        while True:
            try:
                attempt(config, dataclasses.replace(world, restart=restart), train, val, num_classes, lease)
            except RollBack:
                restart += 1
                if lease:
                    lease.begin_again()
            else:
                return


def attempt(config: Config, world: World, train: Index, val: Index, num_classes: int, lease: Lease | None) -> None:
    """Go on from the newest checkpoint, train, and leave a clean end. Raises RollBack on all ranks alike."""
    with ExitStack() as stack:
        trainer = Trainer(config, world, train, val, num_classes)
        stack.callback(trainer.close)
        startup.note("built_s")
        checkpoint = trainer.resume()
        startup.note("loaded_s")
        world.on_main(lambda: trainer.own(lease, checkpoint) if lease else None)
        outcome: Literal["finished", "paused", "failed"] = "failed"
        message, needs_person = "", False
        try:
            trainer.reports.progress(trainer.checkpoints.newest)
            ended = trainer.run()
            if ended == "paused":
                message = trainer.why_paused()
            while ended == "finished" and not trainer.is_saved:
                trainer.save(at_all_costs=True)  # raises when the disk has refused three times in a row
            outcome = ended
        except RollBack as error:
            message = str(error)
            if trainer.reports.tracker:
                trainer.reports.tracker.rolled_back(trainer.state.epoch, trainer.state.global_step)
            raise
        except BaseException as error:
            needs_person = isinstance(error, UserError)
            message = str(error) if needs_person else f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise
        finally:
            trainer.reports.progress(trainer.checkpoints.newest)
            if trainer.reports.tracker:
                # Somebody who asked to stop is waiting: the last picture is not worth the grace.
                timeout_s = 30.0 if outcome == "finished" else 5.0
                if trainer.deadline:
                    timeout_s = min(timeout_s, max(1.0, trainer.deadline.left_s))
                trainer.reports.tracker.close(outcome, message, timeout_s, needs_person=needs_person)


if __name__ == "__main__":
    # torchrun shows the first rank's traceback when it was recorded.
    sys.exit(record(run_command)(main) if "TORCHELASTIC_RUN_ID" in os.environ else run_command(main))
