"""ast_dist/track/energy.py and ast_dist/resources.py: joules come from a meter, or not at all.

No GPU runs these tests. `FakeNvml` is a mock of the calls of pynvml that we make, with a counter that the test moves.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ast_dist import resources
from ast_dist.errors import run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.energy import GpuMeter
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.training import words, write_shards

STEP_MJ = 7_000


class FakeNvml:
    """A mock of pynvml for one GPU, named GPU-1. Each reading of its counter is STEP_MJ above the last."""

    class NVMLError(Exception):
        pass

    def __init__(self, readings: int = 1_000_000, has_driver: bool = True) -> None:
        self.readings_left = readings
        self.has_driver = has_driver
        self.opened = 0
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
        self.counter_mj += STEP_MJ
        return self.counter_mj


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    """Let `import pynvml` give the mock, or fail as where nvidia-ml-py is not installed."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


class Ranks:
    """The two collectives that Resources uses, for a rank whose peers report what they are told to.

    uuids: every rank's meter. peers: the sum of the other ranks' counts.
    """

    def __init__(self, rank: int, uuids: list[str | None], peers: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        self.rank, self.uuids, self.peers = rank, uuids, torch.tensor(peers)
        self.is_main = rank == 0
        self.device = torch.device("cpu")

    def gather(self, mine: str | None) -> list[str | None]:
        assert mine == self.uuids[self.rank]
        return self.uuids

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.peers


def loader(samples_read: int = 0, samples_decoded: int = 0) -> SimpleNamespace:
    return SimpleNamespace(reader=SimpleNamespace(samples_read=samples_read), samples_decoded=samples_decoded)


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
        taken = resources.Resources(loader(), Ranks(rank, ["GPU-1", "GPU-1"]), GpuMeter.open("GPU-1"))
        taken.tally()
        joules.append(taken.row()["cost/gpu_joules"])
    # Each rank sums with a peer that counts nothing.
    assert joules == [STEP_MJ / 1000, 0.0]


def test_joules_of_several_gpus_and_of_earlier_sessions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())
    peers = (30, 20, 100_000, 0)
    taken = resources.Resources(loader(4, 2), Ranks(0, ["GPU-1", "GPU-9"], peers), GpuMeter.open("GPU-1"))
    taken.load({"samples_read": 1000, "samples_decoded": 500, "gpu_millijoules": 1_000_000})
    taken.tally()
    assert taken.to_dict() == {
        "samples_read": 1034,
        "samples_decoded": 522,
        "gpu_millijoules": 1_100_000 + STEP_MJ,
    }
    assert taken.row()["cost/gpu_joules"] == 1100.0 + STEP_MJ / 1000


@pytest.mark.parametrize("before", [{}, {"samples_read": 5, "samples_decoded": 5, "gpu_millijoules": None}])
def test_a_run_that_was_not_metered_from_the_start_shows_no_joules(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, int | None]
) -> None:
    install(monkeypatch, FakeNvml())
    taken = resources.Resources(loader(), Ranks(0, ["GPU-1"]), GpuMeter.open("GPU-1"))
    taken.load(before)
    taken.tally()
    assert "cost/gpu_joules" not in taken.row()
    assert taken.to_dict()["gpu_millijoules"] is None


def test_one_rank_without_a_meter_leaves_the_joules_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())
    taken = resources.Resources(loader(), Ranks(0, ["GPU-1", None]), GpuMeter.open("GPU-1"))
    taken.tally()
    assert "cost/gpu_joules" not in taken.row()


def test_a_meter_that_stops_answering_is_told_once_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(readings=2))
    taken = resources.Resources(loader(), Ranks(0, ["GPU-1"]), GpuMeter.open("GPU-1"))
    taken.tally()
    assert taken.row()["cost/gpu_joules"] == STEP_MJ / 1000
    with pytest.warns(RuntimeWarning, match="NVML no longer answers"):
        taken.tally()
    taken.tally()  # a second warning would be an error
    assert "cost/gpu_joules" not in taken.row()


def test_a_run_on_a_metered_gpu_writes_joules_and_a_resume_adds_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run_dir = write_shards(tmp_path), tmp_path / "run"
    install(monkeypatch, FakeNvml())
    # The run is on the CPU; only the meter is that of a GPU, a mocked one.
    monkeypatch.setattr("ast_dist.trainer.open_meter", lambda device: GpuMeter.open("GPU-1"))
    assert run_command(main, words(shards, run_dir, "--session.hours", "1e-9")) == 0
    _, session = read(committed(run_dir / "checkpoints")[-1])
    assert session["resources"]["gpu_millijoules"] == STEP_MJ  # one save, so one reading
    assert run_command(main, words(shards, run_dir)) == 0
    joules = [row["cost/gpu_joules"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]
    # Two readings an epoch from here on, for its row and for its checkpoint.
    assert joules == [2 * STEP_MJ / 1000, 4 * STEP_MJ / 1000, 6 * STEP_MJ / 1000]


def test_without_a_gpu_no_key_of_any_row_names_joules_and_nothing_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, None)
    shards, run_dir = write_shards(tmp_path), tmp_path / "run"
    assert run_command(main, words(shards, run_dir, "--loop.epochs", "1", "--track.quiet")) == 0
    keys = set().union(*(row.keys() for row in read_rows(run_dir / "metrics.jsonl")))
    assert not any("joule" in key or "energy" in key for key in keys)
    assert "cost/samples_read" in keys
    _, session = read(committed(run_dir / "checkpoints")[-1])
    assert session["resources"]["gpu_millijoules"] is None
    assert capsys.readouterr().err == ""
