"""The energy of all GPUs of a run: in all, in each epoch's training and evaluation, and when idle.

One window an epoch and one an evaluation, each the difference of two readings of the GPUs' own counters, which move
every 20 to 100 ms. Nothing waits for a GPU to read them: before a window ends, the last step's sums have been read.
"""

import warnings
from typing import Any, Literal

from ast_dist.distributed import World
from ast_dist.track.energy import GpuMeter, Power

# Stretches of an epoch whose energy is told apart.
Window = Literal["train", "eval"]
_WINDOWS: tuple[Window, ...] = ("train", "eval")


class Joules:
    """Running totals, the same on every rank, as of the last sums that `take` was given.

    millijoules: what all GPUs used, their idle share while the run waited included; None unless every rank has had a
    meter in every session, since a part of the sum would pass for all of it. Ranks that share a GPU count it once.
    The same holds for an epoch's windows, over the sessions in which it was trained and evaluated.
    idle: mean power of all GPUs together, over the shortest of the ranks' measurements; None where one is missing.

    meter: of this rank's GPU; closed by `close`. Make this before anything of ours runs on that GPU: what it has drawn
    since the meter was opened is taken for its idle power.
    """

    def __init__(self, world: World, meter: GpuMeter | None) -> None:
        self._meter = meter
        self._is_main = world.is_main
        told = world.gather((meter.uuid, meter.power()) if meter else None)
        by_uuid = {each[0]: each[1] for each in reversed(told) if each}
        first = [each and each[0] for each in told].index(meter.uuid) if meter else None
        self._counts_gpu = first == world.rank
        self._is_metered = None not in told
        self.num_gpus = len(by_uuid) if self._is_metered else 0
        self.idle = _together(list(by_uuid.values())) if self._is_metered else None
        zero = 0 if self._is_metered else None
        self._before: dict[str, int | None] = {"gpu": zero, "train": zero, "eval": zero}
        self._session: dict[str, int] = dict.fromkeys(self._before, 0)
        # This rank's: the last reading, and what the present epoch's windows hold.
        self._seen = 0
        self._window: Window | None = None
        self._in_window = dict.fromkeys(_WINDOWS, 0)
        # Epochs whose training was measured, and those of them that trained everything: how many, mJ.
        self._epochs, self._full_epochs = (0, 0), (0, 0)

    @property
    def millijoules(self) -> int | None:
        """Energy of all GPUs, mJ."""
        return self._total("gpu")

    def enter(self, window: Window | None) -> None:
        """Count this rank's energy from here on as an epoch's training, as its evaluation, or as neither."""
        self._read()
        self._window = window

    def counts(self) -> list[int]:
        """This rank's numbers for all ranks to sum, as `take` takes them."""
        self._read()
        failed = int(self._meter is not None and self._seen < 0)
        own = [max(self._seen, 0), *self._in_window.values()] if self._counts_gpu else [0, 0, 0]
        return [*own, failed]

    def take(self, sums: list[int]) -> None:
        """Take in what the ranks' `counts` sum up to."""
        *session, failed = sums
        self._session = dict(zip(self._before, session, strict=True))
        if failed and self._is_metered:
            self._is_metered = False
            self._before = dict.fromkeys(self._before)
            if self._is_main:
                message = "NVML no longer answers: cost/gpu_joules is left out from here on."
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def row(self) -> dict[str, float]:
        """What was measured since the run began, by its key; empty where nothing was."""
        row = {} if self.millijoules is None else {"cost/gpu_joules": self.millijoules / 1000}
        return row | ({} if self.idle is None else {"cost/gpu_idle_w": self.idle.watts})

    def end_epoch(self, is_full: bool) -> dict[str, float]:
        """What was measured of the epoch that is done, by its key; the next one's windows begin.

        is_full: whether it trained every sample. `cost/joules_saved` is 1 - the joules of training so far ÷ what as
        many full epochs of this run take, as measured; epochs that were not measured are left out of both.
        """
        trained, evaluated = self._total("train"), self._total("eval")
        if trained:
            self._epochs = _added(self._epochs, trained)
            self._full_epochs = _added(self._full_epochs, trained) if is_full else self._full_epochs
        self._in_window = dict.fromkeys(_WINDOWS, 0)
        self._session.update(train=0, eval=0)
        self._before |= dict.fromkeys(_WINDOWS, 0 if self._is_metered else None)
        windows = {"cost/epoch_gpu_joules": trained, "cost/eval_gpu_joules": evaluated}
        # A counter that has not moved has measured nothing: no evaluation, or one shorter than its period.
        row = {key: millijoules / 1000 for key, millijoules in windows.items() if millijoules}
        (count, spent), (full_count, full_spent) = self._epochs, self._full_epochs
        if trained and full_spent:
            row["cost/joules_saved"] = 1.0 - spent * full_count / (count * full_spent)
        return row

    def describe(self) -> str:
        """What is measured, in a line for people."""
        if not self._is_metered:
            return "not measured (no GPU with an energy counter that NVML can read)"
        gpus = f"{self.num_gpus} GPU" + ("s" if self.num_gpus > 1 else "")
        if self.idle is None:
            return f"{gpus}, by NVML; idle power not measured"
        return f"{gpus}, by NVML; idle {self.idle.watts:.0f} W (measured for {self.idle.seconds:.1f} s)"

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for the checkpoint."""
        totals = {f"{name}_millijoules": self._total(name) for name in self._before}
        return {**totals, "epochs_millijoules": self._epochs, "full_epochs_millijoules": self._full_epochs}

    def load(self, before: dict[str, Any]) -> None:
        """Go on from what `to_dict` gave; from an empty dict, the sessions before were not measured."""
        if self._is_metered:
            self._before = {name: before.get(f"{name}_millijoules") for name in self._before}
        self._epochs, self._full_epochs = (
            (int(count), int(millijoules))
            for count, millijoules in (before.get(f"{name}_millijoules", (0, 0)) for name in ("epochs", "full_epochs"))
        )

    def close(self) -> None:
        """Close the meter."""
        if self._meter:
            self._meter.close()

    def _total(self, name: str) -> int | None:
        before = self._before[name]
        return None if before is None else before + self._session[name]

    def _read(self) -> None:
        """Read the meter, and give what it moved to the window that is open. A failure stays: its share is lost."""
        if self._meter is None or self._seen < 0:
            return
        now = self._meter.millijoules()
        if now is not None and self._window:
            self._in_window[self._window] += now - self._seen
        self._seen = -1 if now is None else now


def _together(powers: list[Power | None]) -> Power | None:
    known = [power for power in powers if power]
    if len(known) < len(powers):
        return None
    return Power(sum(power.watts for power in known), min(power.seconds for power in known))


def _added(epochs: tuple[int, int], millijoules: int) -> tuple[int, int]:
    return epochs[0] + 1, epochs[1] + millijoules
