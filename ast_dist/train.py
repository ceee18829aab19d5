"""Train: `python -m ast_dist.train …`, alone or under torchrun, or `ast_dist.train(…)` from Python."""

import dataclasses
import os

from ast_dist import outcome_file
from ast_dist.fault.guard import DEADLINE, STOP_SIGNALS, die_with_parent, signal_comes, why_stopped

if "TORCHELASTIC_RUN_ID" in os.environ:
    # Before torch is imported, which takes seconds: an agent that is killed meanwhile must not leave orphans, either.
    die_with_parent(outcome_file.agent_pid())

import contextlib
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from ast_dist import run_dir as run_folder
from ast_dist import startup
from ast_dist.allocator import keep_freed_memory
from ast_dist.command_line import parse, to_argv
from ast_dist.config import Config
from ast_dist.data.index import Index
from ast_dist.data.remote import RemoteError, open_index
from ast_dist.distributed import World
from ast_dist.errors import RankError, UserError, described, run_command
from ast_dist.fault.lease import Lease
from ast_dist.fault.nonfinite import RollBack
from ast_dist.model import build_model
from ast_dist.preflight import check_callbacks, check_data, print_dry_run, with_block_shards
from ast_dist.track.progress import read_progress
from ast_dist.trainer import Trainer

# Signals reach the hosts of a job within a second or two of each other.
_PEER_PATIENCE_S = 3.0
# Held by the one call of `train` that this process is in: what it sets and gives back is the whole process's.
_CALL = threading.Lock()


def train(**settings: Any) -> dict[str, Any]:
    """Train in this process, or go on where the run stopped, and return how it ended.

        ended = ast_dist.train(
            preset="digits", run_dir="runs/1",
            data={"train": "shards/train", "val": "shards/val"}, gate={"target_rate": 0.4},
        )
        print(ended["state"], ended["best_acc1"])

    settings: those of the command line under the same names: `--gate.target-rate 0.4` is `gate={"target_rate": 0.4}`,
    `--quiet` is `quiet=True`. run_dir and data are needed; `preset` and `config` (a YAML file) come first, and what is
    given here wins. The same call again resumes; `resume="never"` moves the old run aside.

    Returns what progress.json holds at the end: state ("finished", or "paused" at session.hours), epoch and step (those
    done), best_acc1 and last_acc1 (percent, None where never evaluated), sessions, restarts, total_s (seconds spent),
    eta_s (seconds left), checkpoint (its name in run_dir/checkpoints), message, and more; {} after `dry_run=True`.

    Raises UserError, a ValueError of one line, for what you can mend: an unknown setting, a value out of range, data
    that are not there, a folder of another run; nothing on disk is changed then. RuntimeError where the run stopped and
    could not be saved. Other errors as they come; what was saved stays.

    Signals: called in the main thread, SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGUSR1 save first and then do what they
    did before, so Ctrl-C raises KeyboardInterrupt once the run is saved. In other threads signals are left alone, and
    only session.hours, which counts from the start of the process, stops a run early. A step that hangs
    (fault.watchdog_s) ends the whole process. One call at a time; a process group of your own must be closed before.
    Under torchrun, call it in every process.
    """
    if not _CALL.acquire(blocking=False):
        raise UserError(
            "ast_dist.train() is running in this process already, in another thread or around this call, and trains "
            "one run at a time. Train one after the other, or in a process each."
        )
    try:
        return _train_here(to_argv(settings))
    finally:
        _CALL.release()


def _train_here(argv: list[str]) -> dict[str, Any]:
    if torch.distributed.is_initialized():
        raise UserError(
            "ast_dist.train() makes a process group of its own, but this process is in one already, "
            "which torch.distributed.destroy_process_group() closes. Train one after the other."
        )
    if {"-h", "--help"} & set(argv):
        raise UserError(
            "help is no setting of ast_dist.train(). help(ast_dist.train) describes the call, and "
            "python -m ast_dist.train --help every setting."
        )
    with _process_as_before():
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    config = parse(argv)
    if config.dry_run:
        return {}
    ended = read_progress(config.run_dir)
    if code:
        raise RuntimeError(f"{config.run_dir}: {ended['state']}: {ended['message']}")
    reason = str(ended["message"]).partition(":")[0]
    was_signalled = ended["state"] == "paused" and reason in {number.name for number in STOP_SIGNALS}
    if was_signalled and threading.current_thread() is threading.main_thread():
        signal.raise_signal(signal.Signals[reason])
    return ended


@contextlib.contextmanager
def _process_as_before() -> Iterator[None]:
    """Give back what a training sets for its whole process, and torch's random state, which it seeds."""
    shown = warnings.formatwarning
    benchmark, is_strict = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            warnings.formatwarning = shown
            torch.backends.cudnn.benchmark = benchmark
            torch.use_deterministic_algorithms(is_strict)


class _CallableModule(types.ModuleType):
    """`ast_dist.train` is this module, which `python -m ast_dist.train` runs, and the function that a script calls.

    Importing a submodule makes it an attribute of its package, whatever stood there before: of a function and a module
    of one name, only the module can last. Python lets a module have a class of its own (the data model's "Customizing
    module attribute access"), and this one can be called.
    """

    def __call__(self, **settings: Any) -> dict[str, Any]:
        return train(**settings)


_CallableModule.__call__.__doc__ = train.__doc__
sys.modules[__name__].__class__ = _CallableModule


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what the user can mend."""
    startup.note("imported_s")
    try:
        return _train(argv)
    except UserError as error:
        may_pass = isinstance(error.__context__, OSError | RemoteError)
        outcome_file.tell("refused", message=str(error), may_pass=may_pass)
        if os.environ.get("LOCAL_RANK") == "0" or isinstance(error, RankError):
            outcome_file.stop_agent_at_exit()
        raise
    except Exception as error:
        outcome_file.tell("failed", message=described(error)[:300])
        raise


def _train(argv: Sequence[str]) -> int:
    config = parse(argv)
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    outcome_file.tell("started", run_dir=str(Path(config.run_dir).absolute()), restart=restart)
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    train, val = open_index(config.data.train, config.data), open_index(config.data.val, config.data)
    config = with_block_shards(config, train)
    num_classes = check_data(config, train, val, int(os.environ.get("WORLD_SIZE", "1")))
    manifests = {"train": train.hash, "val": val.hash}
    run_folder.check(config, manifests)
    check_callbacks(config, int(os.environ.get("RANK", "0")))
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
        is_over = train_in(config, world, train, val, num_classes, manifests)
    except BaseException:
        world.abandon()
        raise
    world.close()
    return 0 if is_over or signal_comes(_PEER_PATIENCE_S) else 1


def train_in(
    config: Config, world: World, train: Index, val: Index, num_classes: int, manifests: dict[str, str]
) -> bool:
    """Take the run directory, and train in it until there is an end.

    Returns False where other hosts were told to stop, and this one was not: an agent whose workers end with exit code
    0 takes the job to be done and closes it for all, while with another code it meets those that are left.
    """
    with ExitStack() as stack:
        lease = world.on_main(lambda: run_folder.take(config, manifests, train.manifest["classes"]))
        if lease:
            stack.callback(lease.release)
        restart = max(world.restart, lease.restarts) if lease else world.restart
        before = Before()
        while True:
            try:
                again = dataclasses.replace(world, restart=restart)
                return attempt(config, again, train, val, num_classes, lease, before)
            except RollBack as error:
                before.rolled_back.add(error.epoch)
                restart += 1
                if lease:
                    lease.begin_again()


@dataclass
class Before:
    """What an attempt hands on to the one after it: epochs rolled back, and a signal that was not heeded yet."""

    rolled_back: set[int] = field(default_factory=set)
    stop: str | None = None


def attempt(
    config: Config, world: World, train: Index, val: Index, num_classes: int, lease: Lease | None, before: Before
) -> bool:
    """Go on from the newest checkpoint, train, and leave a clean end. Raises RollBack on all ranks alike.

    Returns what train_in returns.
    """
    with ExitStack() as stack:
        trainer = Trainer(config, world, train, val, num_classes, before.rolled_back)
        stack.callback(trainer.close)
        if before.stop and before.stop != DEADLINE:
            signal.raise_signal(signal.Signals[before.stop])
        startup.note("built_s")
        checkpoint = trainer.resume()
        startup.note("loaded_s")
        world.on_main(lambda: trainer.own(lease, checkpoint) if lease else None)
        outcome: Literal["finished", "paused", "failed"] = "failed"
        message, needs_person = "", False
        try:
            trainer.reports.progress(trainer.checkpoints.newest, trainer.checkpoints.verified_at)
            ended = trainer.run()
            trainer.saves.wait(trainer.state.epoch)
            reasons: list[str | None] = [trainer.guard.reason or "a peer"]
            if ended == "paused" and not trainer.is_saved:
                # A disk that refused, or a stop amid steps that were not finite: what was trained is still here.
                trainer.save(at_all_costs=True)
                trainer.saves.wait(trainer.state.epoch)
            if ended == "paused":
                with contextlib.suppress(RuntimeError):  # a peer in a hurry is gone, after the save of all
                    reasons = world.gather(trainer.guard.reason)
                message = why_stopped(reasons, trainer.is_saved)
            while ended == "finished" and not trainer.is_saved:
                trainer.save(at_all_costs=True)
                trainer.saves.wait(trainer.state.epoch)  # raises when the disk has refused three times in a row
            outcome = ended
        except RollBack as error:
            message = str(error)
            if trainer.reports.tracker:
                trainer.reports.tracker.rolled_back(trainer.state.epoch, trainer.state.global_step)
            trainer.saves.leave()
            before.stop = trainer.guard.reason
            raise
        except BaseException as error:
            needs_person = isinstance(error, UserError)
            message = str(error) if needs_person else f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise
        finally:
            trainer.checkpoints.abandon(2 if needs_person else 1)
            saved = (trainer.checkpoints.latest, trainer.checkpoints.verified_at)
            trainer.reports.progress(*saved, session_is_over=True)
            if trainer.reports.tracker:
                # Somebody who asked to stop is waiting: the last picture is not worth the grace.
                timeout_s = min(30.0 if outcome == "finished" else 5.0, trainer.guard.left_s)
                if trainer.deadline:
                    timeout_s = min(timeout_s, trainer.deadline.left_s)
                timeout_s = max(1.0, timeout_s)
                agent = run_folder.agent_id() if needs_person else None
                trainer.reports.tracker.close(outcome, message, timeout_s, needs_person=needs_person, agent=agent)
        outcome_file.tell(outcome, message=message, is_saved=trainer.is_saved, is_deadline=DEADLINE in reasons)
        with contextlib.suppress(*([RuntimeError] if outcome == "paused" else [])):  # a peer in a hurry, as above
            trainer.saves.leave()
        if outcome == "paused" and not trainer.is_saved:
            raise SystemExit(1)  # 0 would say that nothing is lost
        if outcome == "finished" or os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            return True
        return DEADLINE in reasons or trainer.guard.reason is not None


if __name__ == "__main__":
    # torchrun shows the first rank's traceback when it was recorded.
    sys.exit(record(run_command)(main) if "TORCHELASTIC_RUN_ID" in os.environ else run_command(main))
