"""data_prep.make_shards: what is written, that it is written the same every time, and what is refused."""

import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from ast_dist.data.index import Index
from ast_dist.errors import UserError
from data_prep import make_shards

CLASSES = ["cat", "dog", "emu"]


def pixels(number, height=20, width=28):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def write_tree(root, per_class=12):
    """Images of different sizes, JPEG but for one PNG. Returns name → bytes."""
    images = {}
    for number, (label, i) in enumerate(itertools.product(CLASSES, range(per_class))):
        name = f"{label}/{i:03d}.{['jpg', 'JPEG', 'jpeg'][i % 3]}"
        images[name] = encoded(pixels(number, 16 + i, 24 + number % 5))
    images["emu/a b.é.png"] = encoded(pixels(99), "PNG")
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return images


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "images"
    return root, write_tree(root)


@pytest.fixture(scope="module")
def made(tree, tmp_path_factory):
    """The tree as shards of about 10 kB: (DST/train, name → bytes)."""
    root, images = tree
    dst = tmp_path_factory.mktemp("shards")
    assert convert(root, dst) == 0
    return dst / "train", images


def convert(src, dst, *options, split="train", shard_mb=0.01):
    return make_shards.main([str(src), str(dst), "--split", split, f"--shard-mb={shard_mb}", "--workers=1", *options])


def refusal(src, dst, *options, **named):
    with pytest.raises(UserError) as caught:
        convert(src, dst, *options, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    """Relative path → SHA-256 of every file below a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def source_name(key, names):
    """The source of a key: the number in front does not matter here, and every other sign but letters became a dash."""
    slug = key.partition("-")[2]
    (name,) = (n for n in names if re.sub(r"[^A-Za-z0-9_]+", "-", n.rpartition(".")[0]).strip("-") == slug)
    return name


def test_plain_webdataset_reads_the_same_keys_labels_and_untouched_bytes(made):
    root, images = made
    index = Index.open(root)
    urls = [str(path) for path in index.shard_paths]
    assert len(urls) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    seen = {}
    for row, sample in enumerate(samples):
        assert sample["__key__"] == index.key(row)
        name = source_name(sample["__key__"], images)
        extension = "png" if name.endswith("png") else "jpg"
        assert {k for k in sample if not k.startswith("_")} == {"cls", extension}
        assert int(sample["cls"]) == index.label[row] == CLASSES.index(name.partition("/")[0])
        seen[name] = sample[extension]
    assert seen == images


def test_index_and_idx_point_at_the_image_bytes(made):
    root, images = made
    index = Index.open(root)
    assert index.manifest["classes"] == CLASSES
    rows = iter(range(index.num_samples))
    for number, path in enumerate(index.shard_paths):
        raw = path.read_bytes()
        header, *lines = path.with_suffix(".idx").read_text().splitlines()
        assert header == f"v1.2 {len(lines)}"
        for line in lines:
            row = next(rows)
            cls, cls_offset, cls_size, cls_name, extension, offset, size, name = line.split(" ")
            data = raw[int(offset) : int(offset) + int(size)]
            assert (cls, cls_name, name) == ("cls", f"{index.key(row)}.cls", f"{index.key(row)}.{extension}")
            assert raw[int(cls_offset) : int(cls_offset) + int(cls_size)] == str(index.label[row]).encode()
            assert data == images[source_name(index.key(row), images)]
            assert (index.shard[row], index.offset[row], index.size[row]) == (number, int(offset), int(size))
            assert index.crc32[row] == zlib.crc32(data)
            assert (3, index.height[row], index.width[row]) == decoded(data).shape
        assert raw[-1024:] == bytes(1024)  # the end of a tar, so nothing was cut
    assert next(rows, None) is None


def test_manifest_states_size_and_checksum_of_every_shard_and_the_checksums_of_the_index(made):
    root, images = made
    manifest = json.loads((root / "manifest.json").read_text())
    for shard in manifest["shards"]:
        raw = (root / shard["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert sum(shard["samples"] for shard in manifest["shards"]) == manifest["num_samples"] == len(images)
    assert [shard["name"] for shard in manifest["shards"]] == [
        f"train-{n:06d}.tar" for n in range(len(manifest["shards"]))
    ]
    assert (manifest["damaged"], manifest["rewritten"], manifest["seed"]) == ([], {}, 0)
    files = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (root / "index").iterdir()}
    assert manifest["index_sha256"] == files
    assert not (root / ".unfinished").exists()


def test_shards_are_about_as_large_as_asked(made):
    root, _ = made
    sizes = [path.stat().st_size for path in Index.open(root).shard_paths]
    assert max(sizes) <= 10_000 + 2 * 10_240  # tars end on whole records of 10,240 bytes


def test_samples_are_shuffled_across_classes(made):
    index = Index.open(made[0])
    changes = np.count_nonzero(np.diff(index.label))
    # 37 samples of 3 classes in random order change class 24 ± 3 times; sorted by class they would change twice.
    assert changes > 14


@pytest.mark.parametrize("workers", [1, 2])
def test_two_runs_are_byte_identical_whatever_the_workers(made, tree, tmp_path, workers):
    convert(tree[0], tmp_path, f"--workers={workers}")
    assert contents(tmp_path / "train") == contents(made[0])


def test_another_seed_gives_another_order_of_the_same_samples(made, tree, tmp_path):
    convert(tree[0], tmp_path, "--seed=1")
    one, other = Index.open(made[0]), Index.open(tmp_path / "train")
    assert other.crc32.tolist() != one.crc32.tolist()
    assert sorted(other.crc32) == sorted(one.crc32)


def test_headers_alone_give_the_same_shards_as_decoding(made, tree, tmp_path):
    convert(tree[0], tmp_path, "--no-decode-check")
    there, expected = contents(tmp_path / "train"), contents(made[0])
    assert there.pop("manifest.json") != expected["manifest.json"]
    assert there.items() <= expected.items()


def start(*arguments):
    command = [sys.executable, "-m", "data_prep.make_shards", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def wait_for_shards(process, folder, count):
    while len(list(folder.glob("*.tar"))) < count:
        assert process.poll() is None, process.communicate()[0]


@pytest.fixture(scope="module")
def long_tree(tmp_path_factory):
    """Enough shards that a run can be hit while it writes, and what an undisturbed run makes of it."""
    root = tmp_path_factory.mktemp("long")
    write_tree(root / "images", per_class=40)
    convert(root / "images", root / "reference", shard_mb=0.003)
    return root / "images", contents(root / "reference" / "train")


@pytest.mark.faults
@pytest.mark.parametrize(("hit", "shards"), [(signal.SIGKILL, 1), (signal.SIGINT, 10)])
def test_a_run_stopped_at_any_moment_leaves_whole_shards_and_is_finished_by_the_next(long_tree, tmp_path, hit, shards):
    source, expected = long_tree
    train = tmp_path / "train"
    process = start(source, tmp_path, "--split", "train", "--shard-mb", "0.003", "--workers", "2")
    wait_for_shards(process, train, shards)
    if hit is signal.SIGINT:
        os.killpg(process.pid, hit)  # as a terminal does: to the command and to its workers
    else:
        process.kill()
    # The output ends only when every process that holds it has ended: no worker is left behind.
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if hit is signal.SIGINT else -signal.SIGKILL), output
    assert "Traceback" not in output
    assert not (train / "manifest.json").exists()
    visible = {name: digest for name, digest in contents(train).items() if name.endswith(".tar")}
    assert 0 < len(visible) < sum(name.endswith(".tar") for name in expected)
    assert visible.items() <= expected.items()

    written = {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    convert(source, tmp_path, shard_mb=0.003)
    assert contents(train) == expected
    reused = [name for name, time_ns in written.items() if (train / name).stat().st_mtime_ns == time_ns]
    assert len(reused) >= len(written) - 2  # of each worker, the shard whose record was not yet written


def test_an_interrupted_run_of_other_settings_is_replaced(made, tree, tmp_path):
    train = tmp_path / "train"
    stop_before_the_end(tree[0], tmp_path, "--seed=5")
    assert list(train.glob("*.tar"))
    convert(tree[0], tmp_path)
    assert contents(train) == contents(made[0])


def stop_before_the_end(source, dst, *options):
    """Run until all shards are written but not the manifest: a folder stands in its way."""
    (dst / "train" / ".unfinished").mkdir(parents=True)
    (dst / "train" / "manifest.json").mkdir()
    with pytest.raises(IsADirectoryError):
        convert(source, dst, *options)
    (dst / "train" / "manifest.json").rmdir()


def test_a_source_that_changed_after_an_interruption_is_read_again(tmp_path):
    source = tmp_path / "images"
    images = write_tree(source, per_class=4)
    stop_before_the_end(source, tmp_path / "dst")
    name = "cat/000.jpg"
    changed = bytearray(images[name])
    changed[-3] ^= 1
    (source / name).write_bytes(changed)
    os.utime(source / name, ns=(1, 1))
    convert(source, tmp_path / "dst")
    assert zlib.crc32(changed) in Index.open(tmp_path / "dst" / "train").crc32


def test_damaged_images_are_left_out_and_listed(tmp_path, capsys):
    source = tmp_path / "images"
    images = write_tree(source, per_class=5)
    (source / "cat/001.JPEG").write_bytes(images["cat/001.JPEG"][:-40])
    (source / "dog/000.jpg").write_bytes(b"")
    (source / "emu/text.jpg").write_bytes(b"no image at all")
    convert(source, tmp_path / "dst")
    index = Index.open(tmp_path / "dst" / "train")
    damaged = {entry["file"]: entry["reason"] for entry in index.manifest["damaged"]}
    assert damaged.keys() == {"cat/001.JPEG", "dog/000.jpg", "emu/text.jpg"}
    assert damaged["dog/000.jpg"] == "empty file"
    assert damaged["cat/001.JPEG"] == "Image is incomplete or truncated"
    assert index.num_samples == len(images) - 2
    output = capsys.readouterr().out
    assert all(f"{name}: {reason}" in output for name, reason in damaged.items())


def test_a_class_or_a_set_without_a_decodable_image_is_refused_and_nothing_stays(tmp_path):
    source, dst = tmp_path / "images", tmp_path / "new" / "dst"
    images = write_tree(source, per_class=3)
    for name in images:
        if name.startswith("dog"):
            (source / name).write_bytes(b"damaged")
    text = refusal(source, dst, shard_mb=1)
    assert "no image of class dog can be decoded (3 tried)" in text
    assert "dog/00" in text
    assert not (tmp_path / "new").exists()
    for name in images:
        (source / name).write_bytes(b"damaged")
    assert f"none of its {len(images)} images can be decoded" in refusal(source, dst, shard_mb=1)
    assert not (tmp_path / "new").exists()


def test_resize_reduces_the_short_side_and_leaves_small_images_alone(tmp_path):
    source = tmp_path / "images"
    for number, (height, width) in enumerate([(60, 90), (90, 60), (40, 300), (20, 30)]):
        (source / "a").mkdir(parents=True, exist_ok=True)
        (source / "a" / f"{number}.jpg").write_bytes(encoded(pixels(number, height, width)))
    convert(source, tmp_path / "dst", "--resize-short=30")
    index = Index.open(tmp_path / "dst" / "train")
    assert sorted(zip(index.height.tolist(), index.width.tolist(), strict=True)) == [
        (20, 30),
        (30, 45),
        (30, 225),
        (45, 30),
    ]
    assert index.manifest["rewritten"] == {"short side 30 px": 3}
    assert zlib.crc32((source / "a" / "3.jpg").read_bytes()) in index.crc32


def test_digits_splits_are_disjoint_complete_and_stratified(tmp_path):
    for split in ("train", "val"):
        # Different seeds: they order the samples, and must not move one from a split to the other.
        convert("digits", tmp_path, f"--seed={len(split)}", split=split, shard_mb=1)
    train, val = (Index.open(tmp_path / split) for split in ("train", "val"))
    rows = [int(index.key(i).rpartition("-")[2]) for index in (train, val) for i in range(index.num_samples)]
    assert sorted(rows) == list(range(1797))
    assert train.manifest["classes"] == val.manifest["classes"] == [str(digit) for digit in range(10)]
    counts = np.bincount(train.label) + np.bincount(val.label)
    assert np.abs(np.bincount(val.label) - counts / 5).max() <= 0.5
    sizes = {(h, w) for index in (train, val) for h, w in zip(index.height, index.width, strict=True)}
    assert sizes == {(8, 8)}


def test_digits_are_scikit_learns_with_a_pixel_error_of_at_most_1(tmp_path):
    from sklearn.datasets import load_digits

    data = load_digits()
    convert("digits", tmp_path, split="val", shard_mb=1)
    index = Index.open(tmp_path / "val")
    raw = index.shard_paths[0].read_bytes()
    for i in range(index.num_samples):
        row = int(index.key(i).rpartition("-")[2])
        picture = decoded(raw[index.offset[i] : index.offset[i] + index.size[i]])
        assert index.label[i] == data.target[row]
        assert np.abs(picture.numpy() - data.images[row] * 255 / 16).max() < 1.51  # half a level of rounding besides


def test_missing_scikit_learn_names_the_extra(tmp_path):
    # A real interpreter without the package: -I ignores what is installed, so only the blocked name can decide.
    code = (
        "import sys; sys.modules['sklearn'] = None; from ast_dist.errors import run_command;"
        "from data_prep.make_shards import main; sys.exit(run_command(main, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "digits", str(tmp_path / "dst"), "--split=train"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "pip install 'ast-dist[demo]'" in done.stderr
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("split", "folders", "expected"),
    [
        ("train", ["train", "val"], "train"),
        ("val", ["train", "val", "test"], "val"),
        ("val", ["train", "test"], "test"),
        ("val", ["train", "validation"], "validation"),
    ],
)
def test_the_folder_of_the_split_is_found(tmp_path, split, folders, expected):
    for number, folder in enumerate(folders):
        (tmp_path / "src" / folder / "cat").mkdir(parents=True)
        (tmp_path / "src" / folder / "cat" / "a.jpg").write_bytes(encoded(pixels(number)))
    convert(tmp_path / "src", tmp_path / "dst", split=split)
    (crc32,) = Index.open(tmp_path / "dst" / split).crc32
    assert crc32 == zlib.crc32((tmp_path / "src" / expected / "cat" / "a.jpg").read_bytes())


def test_an_ambiguous_or_missing_split_folder_is_refused(tmp_path):
    for folder in ("validation", "test"):
        (tmp_path / "src" / folder / "cat").mkdir(parents=True)
        (tmp_path / "src" / folder / "cat" / "a.jpg").write_bytes(encoded(pixels(0)))
    assert "validation/ and test/ could both be the split val" in refusal(
        tmp_path / "src", tmp_path / "dst", split="val"
    )
    assert "no folder for the split train" in refusal(tmp_path / "src", tmp_path / "dst", split="train")


def test_hidden_files_and_other_files_are_passed_over_and_nested_and_linked_images_are_found(tmp_path, capsys):
    source = tmp_path / "src"
    (source / "cat" / "deep").mkdir(parents=True)
    (source / ".ipynb_checkpoints").mkdir()
    for name in ("cat/a.jpg", "cat/deep/b.jpg", "cat/._a.jpg", ".ipynb_checkpoints/c.jpg"):
        (source / name).write_bytes(encoded(pixels(len(name))))
    (source / "cat" / "notes.txt").write_text("not an image")
    (source / "dog").symlink_to(source / "cat")
    (source / "cat" / "deep" / "back").symlink_to(source / "cat")
    convert(source, tmp_path / "dst")
    index = Index.open(tmp_path / "dst" / "train")
    slugs = sorted(index.key(row).partition("-")[2] for row in range(index.num_samples))
    assert slugs == ["cat-a", "cat-deep-b", "dog-a", "dog-deep-b"]
    assert "2 × .txt" in capsys.readouterr().err


def test_splits_with_different_classes_are_refused(made, tmp_path):
    write_tree(tmp_path / "src", per_class=1)
    (tmp_path / "src" / "fox").mkdir()
    (tmp_path / "src" / "fox" / "a.jpg").write_bytes(encoded(pixels(0)))
    text = refusal(tmp_path / "src", made[0].parent, split="val")
    assert "has 4 classes" in text
    assert "has 3" in text
    assert "fox" in text
    assert not (made[0].parent / "val").exists()


def make_source(kind, root):
    root.mkdir()
    if kind == "no images":
        (root / "cat").mkdir()
        (root / "cat" / "notes.txt").write_text("")
    elif kind == "no classes":
        (root / "a.jpg").write_bytes(encoded(pixels(0)))
    elif kind == "empty class":
        write_tree(root, per_class=1)
        (root / "fox").mkdir()
    elif kind == "file":
        root.rmdir()
        root.write_bytes(encoded(pixels(0)))
    elif kind == "missing":
        root.rmdir()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "no such folder"),
        ("empty", "empty"),
        ("no images", "no image in them (found 1 × .txt)"),
        ("no classes", "1 images, but no class folders"),
        ("empty class", "fox: no image in this class folder (1 of 4 classes are empty)"),
        ("file", "a file, but SRC must be a folder"),
    ],
)
def test_a_source_without_images_by_class_is_refused_and_nothing_is_written(tmp_path, kind, expected):
    make_source(kind, tmp_path / "src")
    text = refusal(tmp_path / "src", tmp_path / "dst")
    assert expected in text
    assert str(tmp_path / "src") in text
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shard-mb=0"], "--shard-mb is 0, but must be above 0"),
        (["--shard-mb=1e13"], "--shard-mb is 1e+13, but must be above 0 and at most 1,000,000"),
        (["--shard-mb=nan"], "--shard-mb is nan, but must be above 0"),
        (["--resize-short=0"], "--resize-short is 0, but must be at least 1"),
        (["--workers=-1"], "--workers is -1, but must be at least 0"),
        (["--format=lmdb"], "lmdb"),
        (["--spit=val"], "--spit"),
        (["--format=digits"], "takes no folder"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_and_nothing_is_written(tree, tmp_path, options, expected):
    with pytest.raises(UserError) as caught:
        make_shards.main([str(tree[0]), str(tmp_path / "dst"), "--split=train", *options])
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "dst").exists()


def test_a_finished_set_is_refused_with_its_number_of_samples_and_stays_as_it_is(made, tree):
    before = contents(made[0])
    assert "37 samples" in refusal(tree[0], made[0].parent)
    assert contents(made[0]) == before


def test_a_folder_with_foreign_files_is_refused_and_stays_as_it_is(tree, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train-000000.tar").write_bytes(b"somebody's only copy")
    assert "1 files that make_shards did not write (train-000000.tar" in refusal(tree[0], tmp_path)
    assert contents(tmp_path) == {"train/train-000000.tar": hashlib.sha256(b"somebody's only copy").hexdigest()}


def test_an_unwritable_destination_is_refused(tree, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written (Not a directory)" in refusal(tree[0], tmp_path / "file" / "dst")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "train").write_bytes(b"")
    assert "a file, but the shards need a folder" in refusal(tree[0], tmp_path / "dst")


def test_a_disk_too_small_is_told_with_free_and_needed_bytes_and_nothing_is_written(tmp_path):
    (tmp_path / "src" / "cat").mkdir(parents=True)
    petabyte = 10**15
    free = os.statvfs(tmp_path).f_frsize * os.statvfs(tmp_path).f_bavail
    with (tmp_path / "src" / "cat" / "a.jpg").open("wb") as file:
        for size in (petabyte, 8 * 10**12, 10**12):  # not every file system has files of a petabyte, empty as they are
            try:
                file.truncate(size)
                break
            except OSError:
                continue
    assert size > free, "this disk is too large for this test"
    text = refusal(tmp_path / "src", tmp_path / "dst")
    needed, told = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{6,}", text.partition("need about")[2]))
    assert size <= needed <= size + 20_000
    assert told < size
    assert not (tmp_path / "dst").exists()


def test_two_runs_at_once_on_one_destination_are_refused(tree, tmp_path):
    import fcntl

    (tmp_path / "train" / ".unfinished").mkdir(parents=True)
    with (tmp_path / "train" / ".unfinished" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another make_shards is writing there" in refusal(tree[0], tmp_path)
    convert(tree[0], tmp_path)


def test_an_unreadable_source_file_stops_the_run_instead_of_being_left_out(tmp_path):
    from data_prep.pool import run_tasks
    from data_prep.shard import ShardTask, write_shard
    from data_prep.sources.imagefolder import ReadFile

    task = ShardTask(
        tmp_path / "train-000000.tar", tmp_path, ReadFile(str(tmp_path)), ["gone.jpg"], [0], ["0-gone"], None, 95, True
    )
    with pytest.raises(UserError, match=r"gone.jpg: cannot be read \(No such file or directory\)"):
        run_tasks(write_shard, [task], lambda *_: None, workers=1, total=1, label="train")
    assert list(tmp_path.iterdir()) == []


def test_shards_are_plain_tars_with_fixed_times_and_owners(made):
    with tarfile.open(next(made[0].glob("*.tar"))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o444)}


def test_the_same_images_are_not_taken_for_both_splits_wherever_they_lie(made, tree, tmp_path):
    assert "the samples of the split val are those of train" in refusal(tree[0], made[0].parent, split="val")
    write_tree(tmp_path / "copy")
    assert "the samples of the split val are those of train" in refusal(tmp_path / "copy", made[0].parent, split="val")
    assert not (made[0].parent / "val").exists()


def test_images_of_the_same_names_are_another_split(tmp_path):
    for number, split in enumerate(("train", "val")):
        (tmp_path / "src" / split / "cat").mkdir(parents=True)
        (tmp_path / "src" / split / "cat" / "a.ppm").write_bytes(encoded(pixels(number), "PPM"))
        convert(tmp_path / "src", tmp_path / "dst", split=split)


def test_the_same_classes_in_another_order_are_refused_with_the_first_that_differs(made, tree, tmp_path):
    (tmp_path / "train").mkdir()
    manifest = json.loads((made[0] / "manifest.json").read_text())
    (tmp_path / "train" / "manifest.json").write_text(json.dumps({**manifest, "classes": ["cat", "emu", "dog"]}))
    assert "the order differs: class 1 is dog here and emu there" in refusal(tree[0], tmp_path, split="val")
