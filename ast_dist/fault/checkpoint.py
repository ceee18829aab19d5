"""Save and load checkpoints: sharded by torch.distributed.checkpoint, committed as commit.py says.

A checkpoint is a folder `step-00000160`: `.metadata` and `__R_0.distcp` (tensors), state.json (plain values),
manifest.json (SHA-256 of every file). All ranks enter `save`, `wait`, `find` and `load`.

Training waits only while the state is copied (staging.py). One thread writes the copies, over a process group of its
own, so that its collectives never meet those of the training. It is a thread of ours around `dcp.save`, not
`dcp.async_save`: that one's arguments and results differ between the versions of torch, it ends before the commit,
and its executor is waited for when the interpreter ends, which never comes where a peer hangs. Its processes
(`AsyncCheckpointerType.PROCESS`) have been seen to commit after the trainers were killed.
"""

import atexit
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

from ast_dist.distributed import World
from ast_dist.errors import UserError, described
from ast_dist.fault import commit
from ast_dist.fault.commit import DamagedCheckpointError
from ast_dist.fault.contents import difference, read, read_verified, verified_reader
from ast_dist.fault.lease import LostLeaseError
from ast_dist.fault.safe_load import SafeReader
from ast_dist.fault.staging import Staging
from ast_dist.fault.state import TrainState, hash_state, split
from ast_dist.fault.writer import CheckpointWriter, Ended, Flight

__all__ = ["Checkpoints", "Ended", "NonFiniteStateError", "checkpoint_name", "read"]

_FAILURES_LIMIT = 3
# A disk or a peer that hangs: a save may take ten times as long as the slowest so far, and this at least.
_SLOWEST_FACTOR = 10.0
_HANGS_AFTER_S = 600.0
_TOLD_AFTER_S = 60.0
_CLOSE_PATIENCE_S = 5.0


class NonFiniteStateError(RuntimeError):
    """The state that was to be saved holds NaN or infinity; raised on all ranks."""


class Checkpoints(CheckpointWriter):
    """The checkpoints of one run.

    folder: RUN/checkpoints, on storage that all ranks see. keep_last, keep_every_h: see `retention.to_prune`.
    newest: name of the newest one that all ranks know to be committed. verified_at: when rank 0 last read it back and
    all of it agreed with its SHA-256, seconds since 1970, None where it could not. fence: rank 0's, asked right before
    a commit; it raises LostLeaseError where this process may not write here any more.

    `save` starts to save and `wait` takes in how it ended; the next `save` does so first. So all ranks learn of it at
    the same place of their program: what follows from it (the count of failures, an error) is the same on all.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every_h: float = 0.0) -> None:
        super().__init__(folder, world, keep_last, keep_every_h)
        self.newest: str | None = None
        self.verified_at: float | None = None
        self._staging = Staging(world.device)
        self._flight: Flight | None = None
        self._unread: Ended | None = None
        self._failures = 0
        self._slowest_s = 0.0

    def save(
        self,
        state: TrainState,
        val_acc1: float | None = None,
        val_ema_acc1: float | None = None,
        name: str | None = None,
    ) -> None:
        """Start to save this step on all ranks; training may go on when it returns.

        val_acc1, val_ema_acc1: validation accuracy of exactly these weights and of their average, percent; None where
        they were not evaluated. name: of the checkpoint's folder, checkpoint_name of the step unless given. One that is
        already committed is not saved again. Raises what `wait` raises, of the save before.
        """
        self.wait()
        name = name or checkpoint_name(state.global_step)
        if self.newest == name:
            return
        began = time.monotonic()
        # Each rank keeps its own batch statistics between forwards, and the checkpoint holds one copy of each.
        self.world.broadcast_buffers(state.model)
        if state.average:
            self.world.broadcast_buffers(state.average.module)
        tensors, plain = split(state.state_dict(self.world.rank))
        content = json.dumps({"state": plain, "session": state.session}, indent=1) + "\n"
        accuracies = {"val_acc1": val_acc1, "val_ema_acc1": val_ema_acc1}
        about = {"step": state.global_step, "epoch": state.epoch, **accuracies, "total_s": state.session.get("total_s")}
        flight = Flight(name, self._staging.copy(tensors), content, about, began)
        self._flight = flight
        # A daemon: it must not keep alive a process whose training failed, while it waits for a peer that is gone.
        threading.Thread(target=self._fly, args=(flight,), name="save", daemon=True).start()

    def wait(self) -> Path | None:
        """Wait for the save under way; all ranks must call. Returns its path, None where it failed or there was none.

        A failed save warns and training goes on with the previous checkpoint standing; the third failure in a row
        raises UserError. A peer that was lost meanwhile, a save that hangs and a run directory that is another's by now
        (LostLeaseError) raise RuntimeError. Raises NonFiniteStateError when the state held NaN or infinity.
        """
        flight = self._flight
        if flight is None:
            return None
        self._await(flight)
        ended = self._see(flight)
        self._flight = None
        if ended.kind == "saved":
            self._failures = 0
            self.newest = ended.name
            return self.folder / ended.name
        message = self._message(ended)
        if ended.kind == "nonfinite":
            raise NonFiniteStateError(message)
        if ended.kind == "lost lease":
            raise LostLeaseError(message)
        self._failures += 1
        if self._failures >= _FAILURES_LIMIT:
            raise UserError(
                f"{message}; that was failure {self._failures} in a row. Make room or mend the disk, and run the same "
                "command again."
            )
        return None

    def _await(self, flight: Flight) -> None:
        """Wait for the end of a save, but not for ever. Raises RuntimeError where it hangs."""
        limit_s = max(_HANGS_AFTER_S, _SLOWEST_FACTOR * self._slowest_s)
        if flight.is_done.wait(_TOLD_AFTER_S):
            return
        if self.world.is_main:
            message = f"the save of {flight.name} takes more than {_TOLD_AFTER_S:g} s; training waits for it"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        if not flight.is_done.wait(limit_s - _TOLD_AFTER_S):
            raise RuntimeError(f"the save of {flight.name} hangs: not done after {limit_s:.0f} s; {self.newest} stands")

    def poll(self) -> Ended | None:
        """How the last save ended, told once, as soon as this rank knows; None before. Waits for nobody.

        Raises RuntimeError where the save broke off because a peer was lost.
        """
        if self._flight and self._flight.is_done.is_set():
            self._see(self._flight)
        ended, self._unread = self._unread, None
        return ended

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._flight is not None and not self._flight.is_done.is_set()

    @property
    def is_urgent(self) -> bool:
        """Whether the ranks should `wait` at once, since what they would learn ends the run or rolls it back."""
        ended = self._flight.ended if self._flight else None
        if ended is None or ended.kind == "saved":
            return False
        return ended.kind != "refused" or self._failures + 1 >= _FAILURES_LIMIT

    @property
    def latest(self) -> str | None:
        """Name of the newest committed checkpoint, as far as this rank knows, which may be before the others do."""
        ended = self._flight.ended if self._flight else None
        return ended.name if ended and ended.kind == "saved" else self.newest

    def close(self) -> None:
        """Leave the process group of the saves; all ranks must call, after `wait`."""
        self.world.leave(self._group)

    def abandon(self, exit_code: int = 1) -> None:
        """Give a save under way a moment to end, without the others; for a rank that fails.

        Where it does not end, because a peer or the disk hangs, this process ends all the same, with `exit_code`.
        """
        if self._flight and not self._flight.is_done.wait(_CLOSE_PATIENCE_S):
            # A thread that comes back from C++ while the interpreter ends is unwound there, which aborts the process.
            atexit.register(_leave, exit_code)

    def find(self) -> Path | None:
        """The newest checkpoint that verifies, agreed on by all ranks; None where there never was one.

        Damaged ones that are newer are moved aside to `.corrupt-…`, with a warning that names the file. Raises
        UserError when there are only damaged ones: to start anew is for a person to decide.
        """
        return self.world.broadcast(self.world.on_main(self._find))

    def _find(self) -> Path | None:
        damaged: list[tuple[Path, DamagedCheckpointError]] = []
        unread: list[tuple[Path, OSError]] = []
        for checkpoint in reversed(commit.committed(self.folder)):
            try:
                verified_reader(checkpoint).read_metadata()
            except DamagedCheckpointError as error:
                damaged.append((checkpoint, error))
                continue
            except OSError as error:
                # The disk did not answer: what lies there may be sound, and stays where it is.
                unread.append((checkpoint, error))
                continue
            for bad, fault in unread:
                message = f"{bad}: cannot be read ({described(fault)}); left there, trying the one before"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            for bad, why in damaged:
                message = f"{why}; moved to {commit.quarantine(bad).name}, trying the one before"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return checkpoint
        if unread:
            raise RuntimeError(f"{unread[0][0]}: cannot be read ({described(unread[0][1])}), nor is an older one sound")
        lost = [*(checkpoint for checkpoint, _ in damaged), *commit.set_aside(self.folder)]
        if lost:
            newest = f" The newest: {damaged[0][1]}." if damaged else ""
            raise UserError(
                f"{self.folder}: none of its {len(lost)} checkpoints is sound.{newest} Put a sound copy there, or "
                "start anew with --resume never, which moves the run aside."
            )
        return None

    def load(self, checkpoint: Path, state: TrainState) -> None:
        """Restore a checkpoint that `find` returned into `state`.

        Raises RuntimeError when a rank then holds anything but what was saved (a cast, a part left out), or when the
        ranks hold different states.
        """
        loaded, session = read_verified(checkpoint, SafeReader(checkpoint))
        expected = {key: value for key, value in loaded.items() if key != "rng"}
        state.load_state_dict(loaded, self.world.rank)
        state.session = session
        self.newest, self.verified_at = checkpoint.name, time.time()
        held = state.state_dict(self.world.rank)
        if (digest := hash_state(held, with_rng=False)) != hash_state(expected):
            told = difference(expected, held)
            raise RuntimeError(f"{checkpoint}: the state after loading is not the saved one ({told})")
        hashes = set(self.world.gather(digest))
        if len(hashes) != 1:
            raise RuntimeError(f"{checkpoint}: ranks hold {len(hashes)} different states after loading")

    def _see(self, flight: Flight) -> Ended:
        """Take note, once, of a save that came to its end."""
        if flight.error is not None:
            # Not taken in: whoever asks again must hear it again.
            raise RuntimeError(f"the save of {flight.name} broke off ({described(flight.error)})") from flight.error
        ended = flight.ended
        assert ended is not None
        if not flight.is_seen:
            flight.is_seen = True
            self._unread = ended
            self._slowest_s = max(self._slowest_s, ended.save_s)
            if ended.kind == "saved":
                self.verified_at = ended.verified_at
            if self.world.is_main:
                goes_on = ended.kind == "refused" and self._failures + 1 < _FAILURES_LIMIT
                failed = (f"{self._message(ended)}; training goes on",) if goes_on else ()
                for text in (*failed, *ended.remarks):
                    warnings.warn(text, RuntimeWarning, stacklevel=4)
        return ended

    def _message(self, ended: Ended) -> str:
        return f"checkpoint {self.folder / ended.name} was not saved: {ended.why}; the last good one is {self.newest}"

    # Below: in the thread, over the group of the saves.

    def _fly(self, flight: Flight) -> None:
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)
            flight.ended = self._saved(flight)
        except BaseException as error:  # noqa: BLE001 - told to the main thread, which raises it
            flight.error = error
        finally:
            flight.is_done.set()


def _leave(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


def checkpoint_name(global_step: int) -> str:
    """The folder of a step's checkpoint; names sort by step."""
    return f"step-{global_step:08d}"
