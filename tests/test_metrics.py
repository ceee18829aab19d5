"""The rows of a real run: every metric is there that this machine can measure, and none that it cannot."""

import sys
from pathlib import Path

import pytest
import torch

from ast_dist.errors import run_command
from ast_dist.joules import Joules
from ast_dist.meters import Meters
from ast_dist.resources import Resources, peak_bytes
from ast_dist.track.energy import GpuMeter
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.test_energy import FakeNvml, install, loader
from tests.training import words, write_shards

EVERYWHERE = {
    *("train/loss", "train/acc1_selected", "train/acc1_all", "train/lr"),
    *("val/acc1", "val/acc5", "val/loss", "val/ema_acc1", "val/ema_loss"),
    *("gate/rate", "gate/rate_target", "gate/threshold", "gate/integral", "gate/score_p50"),
    *("cost/samples_skipped", "cost/flops_saved"),
    *("perf/images_per_s", "perf/step_ms", "perf/data_wait", "perf/ckpt_stall_ms", "perf/mem_gb"),
    *("progress/epoch", "progress/session", "progress/eta_h", "global_step"),
}
JOULES = {"cost/gpu_joules", "cost/epoch_gpu_joules", "cost/eval_gpu_joules", "cost/gpu_idle_w", "cost/joules_saved"}
GPU_ONLY = JOULES | {"perf/mfu"}


def keys_of_run(folder: Path) -> set[str]:
    shards = write_shards(folder)
    more = ("--optim.ema-decay", "0.9", "--gate.anneal-share", "0", "--checkpoint.every-steps", "2")
    assert run_command(main, words(shards, folder / "run", *more)) == 0
    return set().union(*(row.keys() for row in read_rows(folder / "run/metrics.jsonl")))


def test_a_run_writes_every_metric_but_those_that_need_a_gpu(tmp_path: Path) -> None:
    keys = keys_of_run(tmp_path)
    assert keys >= EVERYWHERE
    assert not keys & GPU_ONLY or torch.cuda.is_available()


def test_with_a_meter_and_a_known_peak_it_writes_those_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml())  # mocked, as is the peak: the run is on the CPU
    monkeypatch.setattr("ast_dist.trainer.open_meter", lambda device: GpuMeter.open("GPU-1"))
    monkeypatch.setattr("ast_dist.trainer.peak_of_world", lambda *_: 1e12)
    assert keys_of_run(tmp_path) >= EVERYWHERE | GPU_ONLY


class TwoRanks:
    """A world of two, as rank 1, whose peer reports what it is told to."""

    rank, size, is_main, device = 1, 2, False, torch.device("cpu")

    def __init__(self, *peers: int) -> None:
        self.peers = peers

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor(self.peers, dtype=torch.int64) if values.dtype == torch.int64 else values

    def gather(self, mine: object) -> list[object]:
        return [None, mine]


@pytest.mark.parametrize(("others", "busiest"), [(7_000, 7_000), (3_000, 5_000)])
def test_the_busiest_ranks_memory_is_told_beside_the_means(others: int, busiest: int) -> None:
    meters = Meters.zero(torch.device("cpu"))
    meters.loss += 6.0
    meters.correct += 1
    meters.active += 2
    assert meters.read(TwoRanks(1, 2, others, 0), 5_000) == ((1.5, 50.0), busiest)


def test_the_busiest_ranks_memory_is_found_with_the_samples_read() -> None:
    world = TwoRanks(10, 20, 0, 0, 0, 0, 10**15, 0)
    taken = Resources(loader(3, 4), world, Joules(world, None))
    taken.tally()
    assert taken.row()["perf/mem_gb"] == 1e6
    assert (taken.samples_read, taken.samples_decoded) == (13, 24)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figure is read from /proc")
def test_on_a_cpu_the_peak_is_the_most_that_the_process_had_resident() -> None:
    def kernel_says() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    before = kernel_says()
    block = torch.ones(80_000_000, dtype=torch.uint8)
    del block
    assert before <= peak_bytes(torch.device("cpu"))
    assert peak_bytes(torch.device("cpu")) == pytest.approx(kernel_says(), rel=0.02)
