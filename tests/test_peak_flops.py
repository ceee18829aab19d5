"""ast_dist/peak_flops.py and what is made of it: a rate as a share of what the devices can do, or nothing."""

from pathlib import Path

import pytest
import torch

from ast_dist.config import ModelConfig
from ast_dist.distributed import World
from ast_dist.errors import run_command
from ast_dist.gate.cost import count_flops
from ast_dist.model import build_model
from ast_dist.peak_flops import peak_flops_per_s, peak_of_world
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.training import NUM_SAMPLES, words, write_shards


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756.0),
        ("NVIDIA H200", "fp32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("A100-SXM4-40GB", "fp32", 156.0),  # drivers up to 460 leave the maker out
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "fp32", 8.1),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
    ],
)
def test_a_known_gpu_has_its_data_sheets_dense_rate(name: str, precision: str, tflops: float) -> None:
    assert peak_flops_per_s(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "fp16"),
        ("Tesla T4", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
    ],
)
def test_a_similar_name_or_a_format_without_tensor_cores_has_no_rate(name: str, precision: str) -> None:
    assert peak_flops_per_s(name, precision) is None


class Ranks:
    """A world whose ranks compute on what they are told to."""

    def __init__(self, *peaks: float | None) -> None:
        self.device = torch.device("cpu")
        self.peaks = list(peaks)

    def gather(self, mine: float | None) -> list[float | None]:
        assert mine is None, "a CPU has no rate"
        return self.peaks


def test_the_ranks_add_up_and_one_of_unknown_rate_leaves_the_sum_unknown() -> None:
    assert peak_of_world(Ranks(1e12, 2e12), "bf16") == 3e12
    assert peak_of_world(Ranks(1e12, None), "bf16") is None


def test_mfu_is_the_flops_of_what_was_trained_over_time_and_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(world: World, precision: str) -> float:  # mocked: no GPU runs this
        assert precision == "fp32"
        return 2.5e9

    monkeypatch.setattr("ast_dist.trainer.peak_of_world", peak)
    shards = write_shards(tmp_path)
    assert run_command(main, words(shards, tmp_path / "run", "--gate.anneal-share", "0", "--loop.epochs", "2")) == 0
    model = build_model(ModelConfig(name="small_cnn", width=8), 10)
    flops = count_flops(model, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert {row["kind"] for row in rows} == {"step", "epoch"}
    assert rows[-1]["cost/samples_skipped"] > 0
    for row in rows:
        assert row["perf/mfu"] == pytest.approx(row["perf/images_per_s"] * flops.step / 2.5e9, rel=1e-6)


def test_passes_that_score_count_among_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ast_dist.trainer.peak_of_world", lambda *_: 1e9)  # mocked
    shards = write_shards(tmp_path)
    more = ("--gate.policy", "online", "--gate.anneal-share", "0", "--gate.warmup-epochs", "0", "--loop.epochs", "1")
    assert run_command(main, words(shards, tmp_path / "run", *more)) == 0
    *_, row = read_rows(tmp_path / "run/metrics.jsonl")
    flops = count_flops(
        build_model(ModelConfig(name="small_cnn", width=8), 10),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 3, 8, 8),
    )
    computed = row["cost/samples_backwarded"] * flops.step + row["cost/samples_scored"] * flops.scoring
    assert 0 < row["cost/samples_backwarded"] < row["cost/samples_scored"]
    seconds = NUM_SAMPLES / row["perf/images_per_s"]
    assert row["perf/mfu"] == pytest.approx(computed / seconds / 1e9, rel=1e-6)
