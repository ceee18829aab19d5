"""Parquet files of the Hugging Face Hub: columns, splits and names are found, and reading stays bounded."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_dist.data.index import Index
from data_prep import plan
from data_prep.plan import plan_shards
from data_prep.sources.options import ClassFile, SourceOptions
from tests.sources import by_name, convert, encoded, jpeg, listed, not_listed, pixels

NAMES = ["cat", "dog", "emu"]
ROWS = 12
SMALL_SHARDS = ["--shard-mb=0.1", "--no-decode-check"]


def write_parquet(path, first=0, rows=ROWS, image="image", label="label", names=NAMES, group=5, **extra):
    """Rows with the images jpeg(first), jpeg(first + 1), … of the classes 0, 1, 2, 0, … in row groups of `group`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(first + row), "path": f"{first + row}.jpg"} for row in range(rows)]
    columns = {image: pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    columns[label] = pa.array([row % 3 for row in range(rows)], pa.int64())
    columns |= {name: pa.array(values) for name, values in extra.items()}
    table = pa.table(columns)
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


def expected(file, first=0, rows=ROWS, names=NAMES):
    return {f"{file}/{row}": (names[row % 3], jpeg(first + row)) for row in range(rows)}


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"),
        ("train-00000-of-00001-a0b1.parquet", "test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ("plain_text/train.parquet", "plain_text/val.parquet"),
    ],
)
def test_each_split_is_found_by_the_names_that_the_hub_uses(tmp_path, train, val):
    write_parquet(tmp_path / train)
    write_parquet(tmp_path / val, first=50)
    for split, file, first in (("train", train, 0), ("val", val, 50)):
        listing = listed(tmp_path, split)
        assert (listing.format, listing.classes) == ("parquet", NAMES)
        assert by_name(listing) == expected(file, first)


def test_a_split_of_many_files_is_taken_whole_and_validation_goes_before_test(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"train-{number:05d}-of-00003.parquet", first=100 * number)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", first=500)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", first=600)
    assert len(listed(tmp_path).names) == 3 * ROWS
    assert by_name(listed(tmp_path, "val")) == expected("validation-00000-of-00001.parquet", 500)
    assert by_name(listed(tmp_path / "train-00001-of-00003.parquet")) == expected("train-00001-of-00003.parquet", 100)
    assert len(listed(f"{tmp_path}/train-0000[01]*.parquet").names) == 2 * ROWS
    for file in tmp_path.glob("train*"):
        file.unlink()
    assert "has parquet files of test and validation, but none of the split train" in not_listed(tmp_path)


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("img", "labels")])
def test_the_usual_names_of_columns_are_known(tmp_path, image, label):
    write_parquet(tmp_path / "train.parquet", image=image, label=label, coarse_label=[9] * ROWS)
    assert by_name(listed(tmp_path)) == expected("train.parquet")


def test_columns_with_other_names_are_found_by_their_kind_or_named(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", image="photo", label="kind", other=[5] * ROWS)
    assert by_name(listed(tmp_path / "a")) == expected("train.parquet")
    write_parquet(tmp_path / "b" / "train.parquet", image="photo", label="kind", names=None, other=[5] * ROWS)
    assert "not clear which column holds the images (there are photo, kind, other)" in not_listed(tmp_path / "b")
    options = SourceOptions(image_column="photo", label_column="kind")
    assert by_name(listed(tmp_path / "b", options=options)) == expected("train.parquet", names=["0", "1", "2"])
    wrong = dataclasses.replace(options, label_column="kinds")
    assert "has no column kinds (--label-column), but photo, kind, other" in not_listed(tmp_path / "b", options=wrong)
    wrong = dataclasses.replace(options, image_column="kind")
    assert "holds int64, not encoded images" in not_listed(tmp_path / "b", options=wrong)


def test_plain_bytes_and_labels_in_words_are_read_too(tmp_path):
    words = ["emu", "cat", "dog"] * 4
    table = pa.table({"image": pa.array([jpeg(row) for row in range(ROWS)]), "label": pa.array(words)})
    pq.write_table(table, tmp_path / "train.parquet")
    listing = listed(tmp_path)
    assert listing.classes == sorted(NAMES)
    assert by_name(listing) == {f"train.parquet/{row}": (words[row], jpeg(row)) for row in range(ROWS)}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (-1, r"row 4 has no label \(-1\)"),
        (None, r"row 4 has no label \(None\)"),
        (3, "has the label 3, but there are 3 class names"),
    ],
)
def test_rows_without_a_label_or_with_one_too_high_are_refused(tmp_path, label, expected):
    labels = [0, 1, 2, 0, label, 1]
    write_parquet(tmp_path / "train.parquet", rows=6)
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int64())), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=expected):
        listed(tmp_path)


def test_what_is_no_parquet_file_is_refused(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"<html>sign in first</html>")
    assert "train.parquet: cannot be read as parquet" in not_listed(tmp_path)
    assert "no parquet file" in not_listed(tmp_path / "train-*-of-9.parquet")


def test_files_of_two_sets_are_not_mixed(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet")
    write_parquet(tmp_path / "b" / "train.parquet", names=["x", "y", "z"])
    assert "other columns or class names than in train.parquet" in not_listed(tmp_path)


def planned(listing, tmp_path, shard_mb, seed=0):
    settings = {"split": "train", "resize_short": None, "jpeg_quality": 95, "decode": False, "seed": seed}
    return plan_shards(listing, tmp_path, tmp_path, shard_mb=shard_mb, **settings)


def test_a_shard_reads_few_times_its_bytes_however_large_the_set_and_mixes_many_groups(tmp_path):
    rows, group = 3000, 50
    write_parquet(tmp_path / "train.parquet", rows=rows, group=group)
    listing = listed(tmp_path)
    plan_ = planned(listing, tmp_path, shard_mb=0.05)
    assert len(plan_.tasks) > 40
    assert sorted(name for task in plan_.tasks for name in task.names) == sorted(listing.names)
    spread = []
    for task in plan_.tasks:
        groups = Counter(int(name.rpartition("/")[2]) // group for name in task.names)
        # The groups of one window, or of two where the shard lies across their border.
        assert len(groups) * group < 2.2 * plan.MIXED_SHARDS * len(task.names)
        spread.append(len(groups))
    assert np.mean(spread) > 3  # a shard's 20 samples would lie in one group or two if they lay as in the file


def test_a_small_set_is_mixed_whole_and_by_the_seed(tmp_path):
    write_parquet(tmp_path / "train.parquet", rows=200, group=10)
    one, other = (planned(listed(tmp_path), tmp_path, 1, seed).tasks[0].names for seed in (0, 1))
    assert one != other and sorted(one) == sorted(other)
    rows = np.asarray([int(name.rpartition("/")[2]) for name in one])
    assert np.abs(np.diff(rows)).mean() > 200 / 3 * 0.8  # the mean distance of two random rows is a third


def test_each_row_group_is_read_once_for_all_its_samples(tmp_path):
    write_parquet(tmp_path / "train.parquet", rows=40, group=10)
    listing = listed(tmp_path)
    groups = []
    read = listing.read.together([listing.names[row] for row in (31, 2, 7, 38, 9)], lambda: groups.append(1))
    assert len(groups) == 2
    assert [read(listing.names[row]) for row in (2, 38)] == [jpeg(2), jpeg(38)]
    with pytest.raises(KeyError):
        read(listing.names[3])


def test_a_class_file_takes_part_of_the_rows(tmp_path):
    write_parquet(tmp_path / "train.parquet")
    (tmp_path / "classes.txt").write_text("emu\ncat\n")
    listing = listed(tmp_path, options=SourceOptions(classes=ClassFile.read(tmp_path / "classes.txt")))
    assert listing.classes == ["cat", "emu"]
    assert by_name(listing) == {n: v for n, v in expected("train.parquet").items() if v[0] != "dog"}


def test_an_image_that_is_damaged_or_not_in_the_file_is_left_out_and_listed(tmp_path):
    write_parquet(tmp_path / "src" / "train.parquet", rows=6)
    table = pq.read_table(tmp_path / "src" / "train.parquet")
    images = table.column("image").to_pylist()
    images[1]["bytes"], images[3]["bytes"] = None, b"no image"
    pq.write_table(table.set_column(0, "image", pa.array(images)), tmp_path / "src" / "train.parquet")
    convert(tmp_path / "src", tmp_path / "dst")
    manifest = Index.open(tmp_path / "dst" / "train").manifest
    assert {entry["file"]: entry["reason"] for entry in manifest["damaged"]} == {
        "train.parquet/1": "empty file",
        "train.parquet/3": "cannot identify image file",
    }


def test_missing_pyarrow_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['pyarrow'] = None; from ast_dist.errors import run_command;"
        "from data_prep.make_shards import main; sys.exit(run_command(main, sys.argv[1:]))"
    )
    write_parquet(tmp_path / "src" / "train.parquet")
    command = [sys.executable, "-c", code, str(tmp_path / "src"), str(tmp_path / "dst"), "--split=train"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "pip install 'ast-dist[parquet]'" in done.stderr
    assert not (tmp_path / "dst").exists()


@pytest.fixture(scope="module")
def long_set(tmp_path_factory):
    """Enough shards that a run can be hit while it writes, and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("long")
    for number in range(4):
        path = root / "src" / "data" / f"train-{number:05d}-of-00004.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [encoded(pixels(1000 * number + row, 40, 40)) for row in range(300)]
        table = pa.table({"image": pa.array(images), "label": pa.array([row % 3 for row in range(300)])})
        pq.write_table(table, path, row_group_size=30)
    convert(root / "src", root / "reference", *SMALL_SHARDS)
    return root / "src", contents(root / "reference" / "train")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def workers_of(parent):
    """Process ids of a command's workers: forked by the fork server, which is a child of the command."""

    def children(pid):
        try:
            return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
        except OSError:
            return []

    return [worker for child in children(parent) for worker in children(child)]


@pytest.mark.faults
@pytest.mark.parametrize("hit", ["the command", "a worker", "Ctrl-C"])
def test_a_run_hit_at_any_moment_shows_whole_shards_only_and_is_finished_to_the_same_bytes(long_set, tmp_path, hit):
    source, reference = long_set
    train = tmp_path / "train"
    command = [sys.executable, "-m", "data_prep.make_shards", str(source), str(tmp_path), "--split=train"]
    process = subprocess.Popen(
        [*command, *SMALL_SHARDS, "--workers=2"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    # Some shards are there, and another is being written.
    while len(list(train.glob("*.tar"))) < 2 or not list(train.glob(".unfinished/*.tar.tmp")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    if hit == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and to its workers
    elif hit == "a worker":
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    else:
        process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {"the command": -signal.SIGKILL, "a worker": 2, "Ctrl-C": 130}[hit], output
    assert "Traceback" not in output
    assert not (train / "manifest.json").exists()
    visible = {name: data for name, data in contents(train).items() if name.endswith(".tar")}
    assert 0 < len(visible) < sum(name.endswith(".tar") for name in reference)
    assert visible.items() <= reference.items()
    convert(source, tmp_path, *SMALL_SHARDS)
    assert contents(train) == reference


def test_a_pattern_that_finds_files_of_several_splits_gives_the_asked_ones_alone(tmp_path):
    for first, name in enumerate(["train-0.parquet", "train-1.parquet", "validation-0.parquet", "other.parquet"]):
        write_parquet(tmp_path / name, first=100 * first)
    assert by_name(listed(f"{tmp_path}/*.parquet")) == expected("train-0.parquet") | expected("train-1.parquet", 100)
    assert by_name(listed(f"{tmp_path}/*.parquet", "val")) == expected("validation-0.parquet", 200)
    (tmp_path / "validation-0.parquet").rename(tmp_path / "test-0.parquet")
    (tmp_path / "train-0.parquet").rename(tmp_path / "dev-0.parquet")
    (tmp_path / "train-1.parquet").unlink()
    for src in (tmp_path, tmp_path / "*.parquet"):
        text = not_listed(src)
        assert "none of the split train (train, training). The names of a split's files start with" in text
        assert "*.parquet'" not in text.replace(f"{src}:", "")


def test_files_without_a_split_in_their_names_can_be_named_for_any(tmp_path):
    write_parquet(tmp_path / "part-0.parquet")
    for src in (tmp_path, tmp_path / "*.parquet", tmp_path / "part-0.parquet"):
        assert by_name(listed(src, "val")) == expected("part-0.parquet")


def test_a_folder_of_parquet_files_that_may_not_be_read_is_refused_and_not_left_out(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a" / "train.parquet")
    write_parquet(tmp_path / "b" / "train.parquet")
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert f"{tmp_path / 'b'}: cannot be read (Permission denied)" in not_listed(tmp_path)
