"""The loader benchmark measures what it says, of ours and of the peers that the tests' environment has."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ast_dist.data.index import Index
from ast_dist.errors import UserError
from benchmarks import loader, tables
from benchmarks.gpu_loader import WAYS, decoding
from benchmarks.images import make_images
from benchmarks.loaders import run
from benchmarks.loaders.bench import CONTENDERS, Contender, reason_against
from benchmarks.loaders.data import copy_images, shard_set
from benchmarks.loaders.rows import DECODE_LIMIT, REFERENCE, Task, all_rows
from benchmarks.loaders.source import Job, Source
from benchmarks.loaders.usage import cpu_s, memory_mb

ROOT = Path(__file__).resolve().parents[1]
IMAGES, COPIES, BATCH, PX = 24, 2, 4, 32
HERE = ("imagefolder:pil", "imagefolder:torchvision", "plain_webdataset:pil", "plain_webdataset:torchvision")
HERE += ("ours:torch", "ours_processes:torch", "plain_dali:dali")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """48 small JPEGs as files and as shards."""
    work = tmp_path_factory.mktemp("work")
    make_images(work / "made", IMAGES, 48, 64, num_classes=3)
    copies, count = copy_images(work / "made", work, IMAGES * COPIES)
    assert count == IMAGES * COPIES
    paths = {"images": str(copies), "shards": str(shard_set(copies, work / "shards").root)}
    cpus = sorted(os.sched_getaffinity(0))[:1]
    return Job("throughput", "", "", "float32", paths, BATCH, 1, PX, count, cpus)


def opened(job: Job, loader: str, **changes: object) -> Source:
    module, decoder = loader.split(":")
    if module == "plain_dali":
        pytest.importorskip("nvidia.dali")
    job = Job(**{**job.__dict__, "module": module, "decoder": decoder, **changes})
    return importlib.import_module(f"benchmarks.loaders.{module}").open_source(job)


@pytest.mark.parametrize("loader", HERE)
def test_a_loader_delivers_the_whole_epoch_in_the_form_that_was_asked_for(job, loader):
    for output, dtype in (("float32", torch.float32), ("uint8", torch.uint8)):
        source = opened(job, loader, output=output)
        batches = list(source.epoch())
        source.close()
        assert sum(len(labels) for _, labels in batches) == IMAGES * COPIES
        for images, labels in batches:
            assert images.dtype == dtype and images.shape == (len(labels), 3, PX, PX)
        values = torch.cat([images.flatten() for images, _ in batches]).float()
        low, high = (-2.2, 2.7) if output == "float32" else (0, 255)
        assert low <= values.min() < values.max() <= high and values.std() > (high - low) / 50


@pytest.mark.parametrize("loader", HERE)
def test_a_resumed_loader_goes_through_the_rest_of_the_epoch_alone(job, loader):
    middle = IMAGES * COPIES // BATCH // 2
    before, state = opened(job, loader, mode="save"), None
    if before.state is not None:
        epoch = before.epoch()
        for _ in range(middle):
            next(epoch)
        state = before.state()
    resumed = opened(job, loader, mode="resume", start_batch=middle, state=state)
    rest = [labels for _, labels in resumed.epoch()]
    assert sum(map(len, rest)) == IMAGES * COPIES - middle * BATCH
    if state is not None:
        expected = [labels for _, labels in epoch]
        assert torch.equal(torch.cat(rest), torch.cat(expected))
    for source in (before, resumed):
        source.close()


def test_the_pace_is_that_of_whole_batches_in_the_timed_part(job):
    module = importlib.import_module("benchmarks.loaders.ours")
    timed = Job(**{**job.__dict__, "module": "ours", "decoder": "torch", "seconds": 0.2})
    found = run.MODES["throughput"](timed, module)
    assert found["images_per_s"] * found["cpu_ms_per_image"] / 1000 < 8  # so many CPUs were not there
    assert found["first_batch_s"] > 0 and 0 <= found["others_cpu_share"] <= 1
    kept = run.MODES["keep"](Job(**{**timed.__dict__, "keep_rate": 0.5}), module)
    assert kept["wall_ratio"] == pytest.approx(kept["epoch_s"] / kept["full_epoch_s"])


@pytest.mark.parametrize("limit", ["read", "torchvision", "simplejpeg"])
def test_a_limit_goes_through_every_image(job, limit):
    if limit == "simplejpeg":
        pytest.importorskip("simplejpeg")
    source = opened(job, f"limits:{limit}")
    assert sum(len(labels) for _, labels in source.epoch()) == IMAGES * COPIES
    source.close()


def test_cpu_time_and_memory_count_living_and_ended_children():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before, (_, memory_before) = cpu_s(), memory_mb()
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    living, (_, memory_living) = cpu_s() - before, memory_mb()
    child.communicate(b"\n")
    ended = cpu_s() - before
    assert living >= 0.28 and ended >= living
    assert memory_living > memory_before + 1


def test_every_way_to_decode_on_a_gpu_cuts_the_same_crops(job):
    pytest.importorskip("nvidia.dali")
    index, device = Index.open(job.paths["shards"]), torch.device("cpu")
    batches = {}
    for way in (way for way in WAYS if way.cores == 0):
        images = decoding(device, way, index, BATCH, PX, threads=1)()
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(images.as_array()).permute(0, 3, 1, 2)
        batches[way.decode] = images.float()
    expected = batches.pop("torchvision")
    assert len(batches) == 3
    for images in batches.values():
        assert images.dtype == expected.dtype and (images - expected).abs().mean() < 0.02


def test_ratios_are_taken_within_a_round():
    def task(measure: str, name: str) -> Task:
        return Task(measure, name, "" if measure == "loader_limit" else "uint8", ())

    tasks = [task("loader", REFERENCE), task("loader", "x"), task("loader_limit", DECODE_LIMIT)]
    # The machine slows down round by round; x stays twice as fast as the reference and at half the limit.
    results = [
        [{"images_per_s": factor * pace, "cpu_ms_per_image": 10 / factor} for pace in (100.0, 50.0, 10.0, 1.0)]
        for factor in (1, 2, 4)
    ]
    _, row, _ = all_rows(tasks, results)
    assert row["ratio_to_imagefolder"] == 2 and row["cpu_ratio_to_imagefolder"] == 2
    assert row["share_of_decode_limit"] == 0.5
    assert (row["images_per_s"], row["images_per_s_min"], row["images_per_s_max"]) == (60.0, 2.0, 200.0)
    # One that fails once has no figures, and neither has what is compared with it.
    results[0][1] = {"error": "it broke"}
    failed, row, _ = all_rows(tasks, results)
    assert failed["error"] == "it broke" and "images_per_s" not in failed
    assert row["ratio_to_imagefolder"] is None and row["images_per_s"] == 60.0


def test_a_missing_peer_is_named_with_what_installs_it():
    missing = Contender("x", "x", "pil", "no_such_package.part", "bench")
    assert reason_against(missing) == "no_such_package.part is not installed: pip install 'ast-dist[bench]'"
    assert reason_against(CONTENDERS[0]) is None


def test_a_work_folder_of_other_images_is_refused(job, tmp_path):
    make_images(tmp_path / "made", 8, 48, 64, num_classes=2)
    copies, count = copy_images(tmp_path / "made", tmp_path / "work", 16)
    assert count == len(list(copies.glob("*/*"))) == 16
    assert copy_images(tmp_path / "made", tmp_path / "work", 16) == (copies, count)
    for images, at_least in ((tmp_path / "made", 24), (Path(job.paths["images"]), 16)):
        with pytest.raises(UserError, match=r"2 × 8 files of .*but . × "):
            copy_images(images, tmp_path / "work", at_least)


def benchmark(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.loader", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_leaves_rows_and_prints_their_tables(job, tmp_path):
    small = f"--workers 1 --batch-size {BATCH} --image-px {PX} --epoch-images {IMAGES} --seconds 0.1 --warmup-s 0"
    chosen = ["--repeat", "1", "--only", "webdataset, PIL", "--outputs", "uint8", "--out", str(tmp_path)]
    done = benchmark(job.paths["images"], *small.split(), *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "loader.json").read_text())
    assert [(row["measure"], row["loader"]) for row in content["rows"]] == [
        ("loader", "webdataset, PIL"),
        ("loader_limit", "read the bytes"),
        ("loader_limit", DECODE_LIMIT),
    ]
    row = content["rows"][0]
    figures = {"images_per_s", "cpu_ms_per_image", "first_batch_s", "resume_s", "pss_mb"}
    assert all(row[key] > 0 for key in figures) and row["ratio_to_imagefolder"] is None
    assert content["command"].startswith("python -m benchmarks.loader IMAGES --repeat 1 --seconds 0.1")
    assert tables.render_all(content) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no images there"),
        (["nowhere", "--workers", "1000"], "this process may use"),
        (["nowhere", "--only", "TurboLoader"], "no such loader. There are: ImageFolder, PIL;"),
        (["nowhere", "--epoch-images", "64"], "need at least"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_written(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says) as caught:
        loader.main([*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not list(itertools.chain(tmp_path.glob("out/*"), tmp_path.glob("work/*")))
