"""data_prep.make_shards on WebDataset tars that are there already: which are taken, and that nothing is rewritten."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ast_dist.data.index import FIELDS, Index, field_path
from ast_dist.data.read import Reader
from ast_dist.errors import UserError
from data_prep import check_shards, make_shards
from data_prep.sources.tars import find_tars


def picture(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10 + number % 7, 20 + number % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, numbers, num_classes=3):
    """Sample i has the key set/i, picture(i) and the label i % num_classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for name, data in (
                (f"set/{number}.JPEG", picture(number)),
                (f"set/{number}.cls", b"%d" % (number % num_classes)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    """A folder with two tars of 5 samples each."""
    for number in range(2):
        write_tar(tmp_path / "tars" / f"x-{number}.tar", range(5 * number, 5 * number + 5))
    return tmp_path / "tars"


def make(src, dst, *options, split="train", workers=1):
    assert make_shards.main([str(src), str(dst), f"--split={split}", f"--workers={workers}", *options]) == 0
    return Index.open(dst / split)


def refusal(src, dst, *options, split="train"):
    with pytest.raises(UserError) as caught:
        make(src, dst, *options, split=split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_index_of_foreign_tars_leads_training_to_their_bytes_and_nothing_is_rewritten(tars, tmp_path):
    before = contents(tars)
    index = make(tars, tmp_path / "dst")
    assert contents(tars) == before
    assert sorted(path.name for path in (tmp_path / "dst" / "train").iterdir()) == ["index", "manifest.json"]
    assert (index.layout, index.data_root, index.num_samples) == ("shards", str(tars), 10)
    assert index.manifest["shards"] == [
        {
            "name": f"x-{n}.tar",
            "bytes": (tars / f"x-{n}.tar").stat().st_size,
            "samples": 5,
            "sha256": before[f"x-{n}.tar"],
        }
        for n in range(2)
    ]
    assert (index.manifest["source"], index.manifest["format_version"]) == ("wds", 2)
    reader = Reader(index)
    for row in range(10):
        assert reader.read(row) == picture(row)
        assert (index.key(row), index.label[row], index.shard[row]) == (f"set/{row}", row % 3, row // 5)
        assert (index.width[row], index.height[row]) == Image.open(io.BytesIO(picture(row))).size
        assert index.crc32[row] == zlib.crc32(picture(row))
    reader.close()


def test_tars_that_lie_in_dst_get_their_index_beside_them(tmp_path):
    write_tar(tmp_path / "set" / "train" / "a.tar", range(4))
    before = contents(tmp_path / "set" / "train")
    index = make(tmp_path / "set", tmp_path / "set")
    assert "data_root" not in index.manifest
    assert index.num_samples == 4
    assert contents(tmp_path / "set" / "train").items() >= before.items()
    (tmp_path / "set").rename(tmp_path / "moved")
    assert Index.open(tmp_path / "moved" / "train").num_samples == 4
    assert "delete its manifest.json to make it anew" in refusal(tmp_path / "moved", tmp_path / "moved")


def test_no_conversion_clears_tars_away_that_were_being_indexed_beside(tmp_path):
    write_tar(tmp_path / "set" / "train" / "train-000000.tar", range(4))
    (tmp_path / "set" / "train" / ".indexing").mkdir()
    before = contents(tmp_path / "set" / "train")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "a.jpg").write_bytes(picture(0))
    assert "what another command began" in refusal(tmp_path / "images", tmp_path / "set")
    (tmp_path / "set" / "train" / ".indexing").rmdir()
    (tmp_path / "set" / "train" / ".unfinished").mkdir()
    assert "holds an index, or an unfinished set, beside the tars" in refusal(tmp_path / "set", tmp_path / "set")
    assert contents(tmp_path / "set" / "train") == before


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train/a.tar", "val/b.tar"], "val", ["val/b.tar"]),
        (["train/a.tar", "validation/b.tar", "c.tar"], "train", ["train/a.tar"]),
        (["im-train-0.tar", "im-train-1.tar", "im-val-0.tar"], "train", ["im-train-0.tar", "im-train-1.tar"]),
        (["im-train-0.tar", "im-validation-0.tar"], "val", ["im-validation-0.tar"]),
        (["TRAIN_0.tar", "test_0.tar", "val_0.tar"], "val", ["val_0.tar"]),
        (["b.tar", "a.tar", "interval.tar", ".hidden.tar", "notes.txt"], "val", ["a.tar", "b.tar", "interval.tar"]),
    ],
)
def test_the_tars_of_a_split_are_found(tmp_path, files, split, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in find_tars(str(tmp_path), split)] == expected


def test_patterns_of_tars_are_expanded_as_webdataset_does(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-9.tar", "b-10.tar", "[c].tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [path.name for path in find_tars(f"{tmp_path}/{pattern}", "train")]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("b-{9..10}.tar") == ["b-9.tar", "b-10.tar"]
    assert names("{b-9,a-09}.tar") == ["b-9.tar", "a-09.tar"]
    assert names("?-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "b-10.tar", "b-9.tar"]
    assert names("[c].tar") == ["[c].tar"]
    with pytest.raises(UserError, match=r"a-07.tar: missing \(1 of the pattern's 4 are\)"):
        names("a-{07..10}.tar")


def test_a_pattern_over_several_folders_is_one_split(tmp_path):
    write_tar(tmp_path / "one" / "a.tar", range(2))
    write_tar(tmp_path / "two" / "a.tar", range(2, 5))
    index = make(f"{tmp_path}/{{two,one}}/a.tar", tmp_path / "dst")
    assert index.data_root == str(tmp_path)
    assert [shard["name"] for shard in index.manifest["shards"]] == ["two/a.tar", "one/a.tar"]
    assert [index.key(row) for row in range(5)] == [f"set/{n}" for n in (2, 3, 4, 0, 1)]


def test_ambiguous_missing_and_compressed_tars_are_refused_and_nothing_is_written(tmp_path):
    for name in ("im-test-0.tar", "im-valid-0.tar", "im-train.tgz"):
        (tmp_path / "src" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "src" / name).touch()
    dst = tmp_path / "dst"
    assert "the tars of valid and of test could both be the split val" in refusal(tmp_path / "src", dst, split="val")
    assert "im-train.tgz: compressed (1 such files)" in refusal(tmp_path / "src", dst)
    (tmp_path / "src" / "im-train.tgz").unlink()
    assert "none of the split train (train, training)" in refusal(tmp_path / "src", dst)
    assert "no.tar: missing" in refusal(tmp_path / "no.tar", dst)
    assert "--resize-short changes images, but the tars" in refusal(tmp_path / "src", dst, "--resize-short=9")
    for option in ("--jpeg-quality=9", "--shard-mb=1", "--no-decode-check", "--image-column=x", "--download-dir=x"):
        assert f"{option.partition('=')[0]} has no effect with the tars" in refusal(tmp_path / "src", dst, option)
    assert "--check-files opens loose files" in refusal(tmp_path / "src", dst, "--index-only", "--check-files")
    assert "no *.tar in this folder" in refusal(tmp_path, dst, "--format=wds")
    assert not dst.exists()


def test_classes_are_numbers_or_names_from_a_file_or_the_other_splits(tmp_path, capsys):
    write_tar(tmp_path / "tars/train/a.tar", [0, 2, 3, 5])  # classes 0 and 2 of 3
    write_tar(tmp_path / "tars/val/b.tar", [0, 1])
    assert make(tmp_path / "tars", tmp_path / "plain").manifest["classes"] == ["0", "1", "2"]
    assert "classes without a sample: 1, the first is 1 (number 1)" in capsys.readouterr().out
    assert make(tmp_path / "tars", tmp_path / "plain", split="val").manifest["classes"] == ["0", "1", "2"]
    (tmp_path / "names.txt").write_text("cat\ndog, hound\nemu\nfox\n\n", encoding="utf-8")
    named = f"--class-names={tmp_path / 'names.txt'}"
    names = ["cat", "dog, hound", "emu", "fox"]
    assert make(tmp_path / "tars", tmp_path / "named", named).manifest["classes"] == names
    assert make(tmp_path / "tars", tmp_path / "named", split="val").manifest["classes"] == names
    make(tmp_path / "tars", tmp_path / "val_first", split="val")
    text = refusal(tmp_path / "tars", tmp_path / "val_first")
    assert "3 classes, but" in text
    assert "has 2, and both splits need the same" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cat\n", "1 names, but the highest label is 2"), ("", "the file is empty"), ("a\n\nb\n", "line 2 is empty")],
)
def test_a_file_of_class_names_that_does_not_fit_is_refused(tars, tmp_path, text, expected):
    (tmp_path / "names.txt").write_text(text)
    assert expected in refusal(tars, tmp_path / "dst", f"--class-names={tmp_path / 'names.txt'}")
    assert not (tmp_path / "dst" / "train" / "manifest.json").exists()


def test_a_bad_tar_is_named_and_the_others_are_not_read_again(tars, tmp_path, capsys):
    whole = (tars / "x-1.tar").read_bytes()
    (tars / "x-1.tar").write_bytes(whole[:900])
    assert "x-1.tar: set/5" in refusal(tars, tmp_path / "dst")
    assert "1 of 2 tars indexed and kept" in capsys.readouterr().err
    (tars / "x-1.tar").write_bytes(whole)
    assert make(tars, tmp_path / "dst").num_samples == 10
    assert "1 of 2 tars are indexed already" in capsys.readouterr().err
    (tars / "x-0.tar").write_bytes(b"no tar")
    assert "x-0.tar: no tar" in refusal(f"{tars}/x-0.tar", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tar_that_changed_after_an_interruption_is_read_again(tars, tmp_path):
    (tmp_path / "dst/train/.indexing").mkdir(parents=True)
    (tmp_path / "dst/train/manifest.json").mkdir()
    with pytest.raises(IsADirectoryError):
        make(tars, tmp_path / "dst")
    (tmp_path / "dst/train/manifest.json").rmdir()
    assert len(list((tmp_path / "dst/train/.indexing").glob("*.npz"))) == 2
    write_tar(tars / "x-1.tar", range(5, 10), num_classes=2)
    assert make(tars, tmp_path / "dst").label.tolist() == [0, 1, 2, 0, 1, 1, 0, 1, 0, 1]


@pytest.mark.faults
@pytest.mark.parametrize("hit", [signal.SIGKILL, signal.SIGINT])
def test_an_index_stopped_at_any_moment_is_finished_by_the_next_and_the_same_on_any_number_of_workers(tmp_path, hit):
    for number in range(40):
        write_tar(tmp_path / "tars" / f"{number:02d}.tar", range(number, number + 30))
    make(tmp_path / "tars", tmp_path / "reference", workers=2)
    command = [sys.executable, "-m", "data_prep.make_shards", str(tmp_path / "tars"), str(tmp_path / "dst")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, "--split=train", "--workers=1"], start_new_session=True, **pipes)
    train = tmp_path / "dst" / "train"
    while not list(train.glob(".indexing/*.npz")):
        assert process.poll() is None, process.communicate()[0]
    if hit is signal.SIGINT:
        os.killpg(process.pid, hit)
    else:
        process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if hit is signal.SIGINT else -signal.SIGKILL), output
    assert "Traceback" not in output
    assert not (train / "manifest.json").exists()
    make(tmp_path / "tars", tmp_path / "dst", workers=1)
    assert contents(train) == contents(tmp_path / "reference" / "train")


@pytest.fixture
def indexed(tars, tmp_path):
    make(tars, tmp_path / "dst")
    return tmp_path / "dst" / "train"


def faults(folder, capsys, *options):
    capsys.readouterr()
    code = check_shards.main([str(folder), "--workers=1", *options])
    lines = [line.removeprefix(f"{folder}: ") for line in capsys.readouterr().out.splitlines()]
    assert code == (0 if lines[-1].endswith("clean") else 1)
    return lines


def test_tars_of_one_split_are_not_taken_for_the_other(tars, tmp_path):
    make(tars, tmp_path / "dst")
    assert f"{tars}: the samples of the split val are those of train" in refusal(tars, tmp_path / "dst", split="val")
    write_tar(tars / "x-2.tar", range(10, 15))
    text = refusal(tars, tmp_path / "dst", split="val")
    assert "x-0.tar: in the split val and in" in text
    assert "as 2 of 3 tars are" in text
    assert make(f"{tars}/x-2.tar", tmp_path / "dst", split="val").num_samples == 5


def test_numbers_in_tars_take_no_names_from_a_split_that_was_not_made_of_tars(tars, tmp_path):
    for number, name in enumerate("abc"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.jpg").write_bytes(picture(number))
    make(tmp_path / "images", tmp_path / "dst", "--no-decode-check")
    text = refusal(tars, tmp_path / "dst", split="val")
    assert "its labels are numbers" in text
    assert "with --class-names" in text
    (tmp_path / "names.txt").write_text("b\na\nc\n")
    named = f"--class-names={tmp_path / 'names.txt'}"
    text = refusal(tars, tmp_path / "dst", named, split="val")
    assert "the order differs: class 0 is b here and a there" in text
    assert not list((tmp_path / "dst" / "val").glob("manifest.json"))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert make(tars, tmp_path / "dst", named, split="val").manifest["classes"] == ["a", "b", "c"]


def test_check_shards_finds_nothing_in_whole_tars_though_they_have_no_idx(indexed, capsys):
    assert faults(indexed, capsys, "--no-decode") == ["10 samples in 2 shards, 3 classes: clean"]
    shutil.copytree(indexed.parent, indexed.parent.parent / "copy")
    assert faults(indexed.parent.parent / "copy" / "train", capsys, "--no-decode")[-1].endswith("clean")


def test_check_shards_names_the_samples_of_damaged_and_missing_tars(indexed, tars, capsys):
    index = Index.open(indexed)
    raw = bytearray((tars / "x-0.tar").read_bytes())
    raw[int(index.offset[2]) + 300] ^= 1
    (tars / "x-0.tar").write_bytes(raw)
    (tars / "x-1.tar").unlink()
    checksum, sample, missing, _ = faults(indexed, capsys, "--no-decode")
    assert checksum.startswith("x-0.tar: SHA-256 is")
    assert sample.startswith("x-0.tar: sample 2 (set/2): damaged, CRC-32 is")
    assert missing.startswith("x-1.tar: missing; the manifest states")


def test_check_shards_tells_a_cut_tar_with_the_samples_lost(indexed, tars, capsys):
    end = int(Index.open(indexed).offset[3]) + 10
    (tars / "x-0.tar").write_bytes((tars / "x-0.tar").read_bytes()[:end])
    found = "\n".join(faults(indexed, capsys, "--no-decode"))
    assert f"x-0.tar: set/3.JPEG needs 1,024 bytes at offset {end - 10:,}, but the file ends at {end:,}" in found
    assert f"2 samples beyond the file's end at {end:,}: sample 3 (set/3) to sample 4 (set/4)" in found


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("label", "sample 4 (set/4): the index states label 7, the tar 1"),
        ("size", "sample 4 (set/4): damaged, CRC-32 is"),
        ("offset", "1 sample of the tar missing in the index, the first is set/4"),
        ("width", "sample 4 (set/4): 24×14 pixels, but the index states 7×14"),
        ("shard", "index/shard.npy: samples 0 to 4 are not all in this shard"),
    ],
)
def test_check_shards_tells_an_index_that_differs_from_the_tars(indexed, capsys, field, expected):
    values = np.load(field_path(indexed, field))
    values[4] = 7
    np.save(field_path(indexed, field), values)
    if field == "width":  # decoding all ten finds this one alone
        assert faults(indexed, capsys)[1:-1] == [f"x-0.tar: {expected}"]
    else:
        assert any(line.startswith(f"x-0.tar: {expected}") for line in faults(indexed, capsys, "--no-decode"))


def test_check_shards_tells_an_unfinished_index(indexed, capsys):
    (indexed.parent / "val" / ".indexing").mkdir(parents=True)
    capsys.readouterr()
    assert check_shards.main([str(indexed.parent), "--no-decode"]) == 1
    assert f"{indexed.parent / 'val'}: its conversion did not finish" in capsys.readouterr().out


def test_manifest_and_index_have_what_every_other_set_has(indexed, tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "a.jpg").write_bytes(picture(0))
    make(tmp_path / "images", tmp_path / "other", "--no-decode-check")
    other = json.loads((tmp_path / "other/train/manifest.json").read_text())
    mine = json.loads((indexed / "manifest.json").read_text())
    assert other.keys() - {"jpeg_quality", "listing_sha256"} <= mine.keys()
    assert {path.stem for path in (indexed / "index").iterdir()} == {*FIELDS, "keys"}


def test_a_pattern_that_finds_tars_of_several_splits_gives_the_asked_ones_alone(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "more.tar", "train/a.tar", "val/a.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern, split):
        return [str(path.relative_to(tmp_path)) for path in find_tars(f"{tmp_path}/{pattern}", split)]

    assert names("*.tar", "train") == ["train-0.tar", "train-1.tar"]
    assert names("*.tar", "val") == ["val-0.tar"]
    assert names("{val,train}/a.tar", "train") == ["train/a.tar"]
    assert names("train-*.tar", "val") == ["train-0.tar", "train-1.tar"]  # of one split: named on purpose
    (tmp_path / "val-0.tar").rename(tmp_path / "test-0.tar")
    (tmp_path / "train-0.tar").rename(tmp_path / "validation-0.tar")
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(UserError, match=r"none of the split train .*in their names, or lie in a folder"):
        names("*.tar", "train")


def test_a_folder_with_tars_of_other_splits_says_how_a_splits_tars_are_called(tmp_path):
    (tmp_path / "train-0.tar").touch()
    with pytest.raises(UserError, match=r"none of the split val .*one of these words in their names") as caught:
        find_tars(str(tmp_path), "val")
    assert "*.tar" not in str(caught.value)


def test_a_range_that_counts_down_and_a_link_that_leads_nowhere_are_refused_in_one_line(tmp_path):
    assert "{005..001} counts down, so it names no tar" in refusal(tmp_path / "t-{005..001}.tar", tmp_path / "dst")
    write_tar(tmp_path / "src" / "a.tar", range(2))
    (tmp_path / "src" / "b.tar").symlink_to("gone")
    for src in (tmp_path / "src", tmp_path / "src" / "*.tar"):
        assert "b.tar: a link that leads nowhere (1 of 2 tars are)" in refusal(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
