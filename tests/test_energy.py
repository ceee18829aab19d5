"""ast_dist/track/energy.py and ast_dist/joules.py: joules come from a meter, or not at all.

No GPU runs these tests. `FakeNvml` is a mock of the calls of pynvml that we make, with a counter that the test moves.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ast_dist.errors import run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.joules import Joules
from ast_dist.resources import Resources
from ast_dist.track.energy import GpuMeter, Power
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.training import progress, words, write_shards

STEP_MJ = 7_000


class FakeNvml:
    """A mock of pynvml for one GPU, named GPU-1. Each reading of its counter is `step_mj` above the last."""

    class NVMLError(Exception):
        pass

    def __init__(self, readings: int = 1_000_000, has_driver: bool = True) -> None:
        self.readings_left = readings
        self.has_driver = has_driver
        self.opened = 0
        self.step_mj = STEP_MJ
        self.counter_mj = 5_000_000  # what the GPU used before this process: the driver was loaded long ago

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if not self.readings_left:
            raise self.NVMLError("Not Supported")
        self.readings_left -= 1
        self.counter_mj += self.step_mj
        return self.counter_mj


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    """Let `import pynvml` give the mock, or fail as where nvidia-ml-py is not installed."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


class Ranks:
    """The two collectives that Resources uses, for a rank whose peers report what they are told to.

    uuids: every rank's meter. peers: the sum of the other ranks' counts: samples read and decoded, mJ in all, in
    training and in evaluation, meters that failed; and in the last place the one other rank's peak memory.
    """

    def __init__(
        self, rank: int, uuids: list[str | None], peers: tuple[int, ...] = (), idle: dict[str, Power] | None = None
    ) -> None:
        self.rank, self.uuids, self.idle, self.size = rank, uuids, idle or {}, len(uuids)
        self.is_main = rank == 0
        self.device = torch.device("cpu")
        self._peers = torch.zeros(6 + self.size, dtype=torch.int64)
        self._peers[: len(peers)] = torch.tensor(peers, dtype=torch.int64)

    def gather(self, mine: tuple[str, Power | None] | None) -> list[tuple[str, Power | None] | None]:
        assert (mine and mine[0]) == self.uuids[self.rank]
        others = [uuid and (uuid, self.idle.get(uuid)) for uuid in self.uuids]
        return [*others[: self.rank], mine, *others[self.rank + 1 :]]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self._peers


def loader(samples_read: int = 0, samples_decoded: int = 0) -> SimpleNamespace:
    return SimpleNamespace(reader=SimpleNamespace(samples_read=samples_read), samples_decoded=samples_decoded)


def resources(ranks: Ranks, *counts: int) -> Resources:
    """A rank's resources, with a meter where its uuid is that of the mock's GPU. Its idle power is one reading."""
    meter = GpuMeter.open("GPU-1") if ranks.uuids[ranks.rank] == "GPU-1" else None
    return Resources(loader(*counts), ranks, Joules(ranks, meter))


def test_a_meter_counts_from_when_it_was_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    install(monkeypatch, nvml)
    meter = GpuMeter.open("GPU-1")
    assert meter is not None
    assert [meter.millijoules(), meter.millijoules()] == [STEP_MJ, 2 * STEP_MJ]
    meter.close()
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("nvml", "uuid"),
    [
        (None, "GPU-1"),
        (FakeNvml(has_driver=False), "GPU-1"),
        (FakeNvml(), "MIG-2"),
        (FakeNvml(readings=0), "GPU-1"),
    ],
    ids=["not-installed", "no-driver", "not-a-gpu", "no-counter"],
)
def test_where_there_is_no_counter_there_is_no_meter(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, uuid: str
) -> None:
    install(monkeypatch, nvml)
    assert GpuMeter.open(uuid) is None
    assert nvml is None or nvml.opened == 0


def test_ranks_that_share_a_gpu_count_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())
    joules = []
    for rank in range(2):
        taken = resources(Ranks(rank, ["GPU-1", "GPU-1"], idle={"GPU-1": Power(50.0, 1.0)}))
        taken.joules.enter("train")
        taken.tally()
        joules.append([taken.row()["cost/gpu_joules"], taken.joules.end_epoch(is_full=True)])
        assert taken.joules.num_gpus == 1
    # Each rank sums with a peer that counts nothing. The first reading was that of the idle power.
    own = {"cost/epoch_gpu_joules": STEP_MJ / 1000, "cost/joules_saved": 0.0}
    assert joules == [[3 * STEP_MJ / 1000, own], [0.0, {}]]


def test_joules_of_several_gpus_and_of_earlier_sessions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())
    taken = resources(Ranks(0, ["GPU-1", "GPU-9"], (30, 20, 100_000, 60_000, 0)), 4, 2)
    taken.load({"samples_read": 1000, "samples_decoded": 500, "gpu_millijoules": 1_000_000, "train_millijoules": 500})
    taken.joules.enter("train")
    taken.tally()
    assert taken.to_dict() == {
        "samples_read": 1034,
        "samples_decoded": 522,
        "gpu_millijoules": 1_100_000 + 3 * STEP_MJ,
        "train_millijoules": 60_500 + STEP_MJ,
        "eval_millijoules": None,
        "epochs_millijoules": (0, 0),
        "full_epochs_millijoules": (0, 0),
    }
    assert taken.row()["cost/gpu_joules"] == 1100.0 + 3 * STEP_MJ / 1000


@pytest.mark.parametrize("before", [{}, {"samples_read": 5, "samples_decoded": 5, "gpu_millijoules": None}])
def test_a_run_that_was_not_metered_from_the_start_shows_the_joules_of_whole_epochs_and_no_sum(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, int | None]
) -> None:
    install(monkeypatch, FakeNvml())
    taken = resources(Ranks(0, ["GPU-1"]))
    taken.load(before)
    epochs = []
    for _ in range(2):
        taken.joules.enter("train")
        taken.tally()
        epochs.append(taken.joules.end_epoch(is_full=False))
    assert "cost/gpu_joules" not in taken.row()
    assert taken.to_dict()["gpu_millijoules"] is None
    assert epochs[0] == {}, "part of it was trained without a meter"
    assert epochs[1].keys() == {"cost/epoch_gpu_joules"}, "no full epoch to compare with"


def test_one_rank_without_a_meter_leaves_all_joules_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())
    taken = resources(Ranks(0, ["GPU-1", None]))
    taken.joules.enter("train")
    taken.tally()
    assert not any("gpu" in key or "joules" in key for key in [*taken.row(), *taken.joules.end_epoch(is_full=True)])
    assert taken.joules.describe().startswith("not measured")


def test_a_meter_that_stops_answering_is_told_once_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(readings=3))
    taken = resources(Ranks(0, ["GPU-1"]))
    taken.tally()
    assert taken.row()["cost/gpu_joules"] == 2 * STEP_MJ / 1000
    taken.joules.enter("train")
    with pytest.warns(RuntimeWarning, match="NVML no longer answers"):
        taken.tally()
    taken.tally()  # a second warning would be an error
    assert "cost/gpu_joules" not in taken.row()
    assert taken.joules.end_epoch(is_full=True) == {}


def test_each_window_holds_what_was_used_in_it_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    install(monkeypatch, nvml)
    taken = resources(Ranks(0, ["GPU-1"]))
    rows = []
    for planning, training, evaluating, is_full in ((1, 1000, 30, True), (5, 400, 40, False), (7, 600, 0, False)):
        for window, used in (("train", planning), (None, training), ("eval", 9), (None, evaluating)):
            nvml.step_mj = used  # what the reading at the window's beginning finds used before it
            taken.joules.enter(window)
        nvml.step_mj = 13  # reports and saves
        taken.tally()
        rows.append(taken.joules.end_epoch(is_full))
        assert taken.to_dict()["train_millijoules"] == taken.to_dict()["eval_millijoules"] == 0
    assert [row["cost/epoch_gpu_joules"] for row in rows] == [1.0, 0.4, 0.6]
    assert [row.get("cost/eval_gpu_joules") for row in rows] == [0.03, 0.04, None], "the last had no evaluation"
    assert [row["cost/joules_saved"] for row in rows] == pytest.approx([0.0, 1 - 1.4 / 2, 1 - 2.0 / 3])
    in_windows = 1000 + 30 + 400 + 40 + 600
    others = STEP_MJ + (1 + 9 + 13) + (5 + 9 + 13) + (7 + 9 + 13)
    assert taken.row()["cost/gpu_joules"] == (in_windows + others) / 1000


def test_a_window_goes_on_in_the_next_session_and_savings_are_held_against_full_epochs_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNvml()
    install(monkeypatch, nvml)
    first = resources(Ranks(0, ["GPU-1"]))
    first.joules.enter("train")
    nvml.step_mj = 800
    first.joules.enter(None)
    first.tally()
    assert first.joules.end_epoch(is_full=True)["cost/epoch_gpu_joules"] == 0.8
    nvml.step_mj = 100
    first.joules.enter("train")
    first.tally()
    second = resources(Ranks(0, ["GPU-1"]))
    second.load(first.to_dict())
    second.joules.enter("train")
    nvml.step_mj = 200
    second.tally()
    row = second.joules.end_epoch(is_full=False)
    assert row["cost/epoch_gpu_joules"] == 0.3
    assert row["cost/joules_saved"] == pytest.approx(1 - (0.8 + 0.3) / (2 * 0.8))


def test_idle_power_is_what_each_gpu_drew_from_its_meters_opening_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())
    now = iter([100.0, 100.5])
    monkeypatch.setattr("ast_dist.track.energy.time.monotonic", lambda: next(now))
    known = {"GPU-8": Power(60.0, 2.0), "GPU-9": Power(26.0, 1.5)}
    joules = Joules(Ranks(0, ["GPU-1", "GPU-8", "GPU-8", "GPU-9"], idle=known), GpuMeter.open("GPU-1"))
    assert joules.idle == Power(STEP_MJ / 1000 / 0.5 + 60.0 + 26.0, 0.5)
    assert joules.row()["cost/gpu_idle_w"] == 100.0
    assert joules.describe() == "3 GPUs, by NVML; idle 100 W (measured for 0.5 s)"


def test_a_counter_that_has_not_moved_has_measured_no_idle_power(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.step_mj = 0
    install(monkeypatch, nvml)
    joules = Joules(Ranks(0, ["GPU-1"]), GpuMeter.open("GPU-1"))
    assert joules.idle is None
    assert "cost/gpu_idle_w" not in joules.row()
    assert joules.describe() == "1 GPU, by NVML; idle power not measured"


def test_a_run_on_a_metered_gpu_writes_joules_of_each_epoch_and_goes_on_with_them_in_mid_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, run_dir = write_shards(tmp_path), tmp_path / "run"
    install(monkeypatch, FakeNvml())
    # The run is on the CPU; only the meter is that of a GPU, a mocked one.
    monkeypatch.setattr("ast_dist.trainer.open_meter", lambda device: GpuMeter.open("GPU-1"))
    assert run_command(main, words(shards, run_dir, "--session.hours", "1e-9")) == 0
    _, session = read(committed(run_dir / "checkpoints")[-1])
    # Read for the idle power, at the epoch's begin and for the save.
    assert session["resources"]["gpu_millijoules"] == 3 * STEP_MJ
    assert session["resources"]["train_millijoules"] == STEP_MJ
    assert run_command(main, words(shards, run_dir)) == 0
    assert "1 GPU, by NVML; idle " in capsys.readouterr().out
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]
    per_reading = STEP_MJ / 1000
    # Read at the begin and the end of training and of evaluation, for the row and for the save.
    assert [row["cost/gpu_joules"] for row in rows] == [(3 + 6 + 6 * number) * per_reading for number in range(3)]
    assert [row["cost/epoch_gpu_joules"] for row in rows] == [2 * per_reading, per_reading, per_reading]
    assert [row["cost/eval_gpu_joules"] for row in rows] == [per_reading] * 3
    assert all(row["cost/gpu_idle_w"] > 0 for row in rows)
    # The first epoch is full, and took two readings; the others took one.
    assert rows[0]["cost/joules_saved"] == 0.0
    assert "GPU joules  0" not in (run_dir / "STATUS.txt").read_text()
    assert progress(run_dir)["gpu_joules"] == pytest.approx(rows[-1]["cost/gpu_joules"] + per_reading)


def test_without_a_gpu_no_key_of_any_row_names_joules_nothing_warns_and_the_views_say_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, None)
    shards, run_dir = write_shards(tmp_path), tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--loop.epochs", "1")) == 0
    keys = set().union(*(row.keys() for row in read_rows(run_dir / "metrics.jsonl")))
    assert not any("joule" in key or "energy" in key or "gpu" in key for key in keys)
    assert "cost/samples_read" in keys
    _, session = read(committed(run_dir / "checkpoints")[-1])
    assert session["resources"]["gpu_millijoules"] is None
    assert progress(run_dir)["gpu_joules"] is None
    assert "GPU joules  not measured" in (run_dir / "STATUS.txt").read_text()
    shown = capsys.readouterr()
    assert shown.err == ""
    assert re.search(r"energy +not measured", shown.out)
