"""data_prep.check_shards: it finds what is wrong, names it, and finds nothing where nothing is wrong."""

import io
import json
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from ast_dist.data.index import Index, field_path
from ast_dist.errors import UserError
from data_prep import check_shards, make_shards
from data_prep.audit import fault_of_bytes


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """DST with a split of 18 images of 2 classes in several shards."""
    root = tmp_path_factory.mktemp("clean")
    for number in range(18):
        folder = root / "images" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(number).integers(0, 256, (16, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number:02d}.jpg")
    make_shards.main([str(root / "images"), str(root / "dst"), "--split=train", "--shard-mb=0.02"])
    return root / "dst"


@pytest.fixture
def split(clean, tmp_path):
    """A copy to damage: DST/train."""
    shutil.copytree(clean, tmp_path / "dst")
    return tmp_path / "dst" / "train"


def check(folder, capsys, *options):
    """Exit code, and the lines on stdout."""
    capsys.readouterr()
    code = check_shards.main([str(folder), "--workers=1", *options])
    return code, capsys.readouterr().out.splitlines()


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(raw)


def faults(folder, capsys, *options):
    """The faults that are reported; the exit code must fit."""
    code, lines = check(folder, capsys, *options)
    assert code == 1
    assert lines[-1].endswith((" fault", " faults"))
    return lines[:-1]


@pytest.mark.parametrize("options", [[], ["--no-decode"], ["--workers=2"]])
def test_a_clean_split_is_clean(clean, capsys, options):
    code, lines = check(clean / "train", capsys, *options)
    shards = len(Index.open(clean / "train").shard_paths)
    assert shards > 2
    assert code == 0
    assert lines == [f"{clean / 'train'}: 18 samples in {shards} shards, 2 classes: clean"]


def test_every_split_of_a_folder_is_checked(split, capsys):
    shutil.copytree(split, split.parent / "val")
    code, lines = check(split.parent, capsys)
    assert (code, len(lines)) == (0, 2)
    flip(Index.open(split.parent / "val").shard_paths[0], 1600)
    code, lines = check(split.parent, capsys)
    assert code == 1
    assert "train: 18 samples" in lines[0]
    assert lines[0].endswith("clean")


def test_a_split_whose_conversion_did_not_finish_is_told(split, capsys):
    (split.parent / "val" / ".unfinished").mkdir(parents=True)
    code, lines = check(split.parent, capsys)
    assert code == 1
    assert lines[0] == f"{split.parent / 'val'}: its conversion did not finish; run data_prep.make_shards again"


@pytest.mark.parametrize("options", [[], ["--no-decode"]])
def test_a_flipped_bit_in_an_image_names_the_sample(split, capsys, options):
    index = Index.open(split)
    sample = 11
    flip(index.shard_paths[index.shard[sample]], int(index.offset[sample] + index.size[sample] // 2))
    shard, image = faults(split, capsys, *options)
    assert f"train-{index.shard[sample]:06d}.tar: SHA-256 is" in shard
    assert f"sample {sample} ({index.key(sample)}): damaged, CRC-32 is" in image


def test_a_flipped_bit_between_the_images_is_found_by_the_checksum(split, capsys):
    flip(Index.open(split).shard_paths[0], -1)
    (fault,) = faults(split, capsys)
    assert "train-000000.tar: SHA-256 is" in fault


def test_a_broken_header_names_the_samples_that_tar_readers_lose(split, capsys):
    index = Index.open(split)
    last = int(np.flatnonzero(index.shard == 0)[-1])
    flip(index.shard_paths[0], int(index.offset[1]) - 1536)  # the header of sample 1's .cls
    found = "\n".join(faults(split, capsys))
    assert "missing in the tar's listing" in found
    assert f"sample 1 ({index.key(1)}) to sample {last} ({index.key(last)})" in found
    assert f"ends with {index.key(0)}.jpg" in found


def test_a_truncated_shard_is_told_with_both_sizes_and_the_samples_lost(split, capsys):
    index = Index.open(split)
    path = index.shard_paths[1]
    first, last = np.flatnonzero(index.shard == 1)[[0, -1]]
    size = path.stat().st_size
    end = int(index.offset[last]) + 10
    path.write_bytes(path.read_bytes()[:end])
    found = "\n".join(faults(split, capsys))
    assert f"train-000001.tar: has {end:,} bytes, but the manifest states {size:,}" in found
    assert f"1 sample beyond the file's end at {end:,}: sample {last} ({index.key(last)})" in found
    assert f"sample {first} " not in found


def test_a_missing_shard_is_told_and_the_others_are_checked_all_the_same(split, capsys):
    paths = Index.open(split).shard_paths
    paths[0].unlink()
    flip(paths[2], -1)
    missing, flipped = faults(split, capsys)
    assert "train-000000.tar: missing" in missing
    assert "train-000002.tar: SHA-256" in flipped


def test_a_wrong_or_missing_idx_is_told(split, capsys):
    paths = Index.open(split).shard_paths
    idx = paths[0].with_suffix(".idx")
    idx.write_text(idx.read_text().replace(" 1536 ", " 1537 ", 1))
    paths[1].with_suffix(".idx").unlink()
    wrong, missing = faults(split, capsys)
    assert "train-000000.idx differs from the tar in 1 of" in wrong
    assert "the first is line 2" in wrong
    assert "train-000001.idx is missing" in missing


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("label", "the index states label 7, the tar"),
        ("height", "but the index states"),
        ("width", "but the index states"),
        ("crc32", "damaged, CRC-32 is"),
        ("shard", "not all in this shard"),
    ],
)
def test_an_index_that_differs_from_the_tar_is_told(split, capsys, field, expected):
    values = np.load(field_path(split, field))
    values[4] = 7
    np.save(field_path(split, field), values)
    checksum, fault = faults(split, capsys)
    assert f"index/{field}.npy: SHA-256 is" in checksum
    assert expected in fault
    if field != "shard":
        assert "sample 4 " in fault


def test_an_offset_that_misses_the_image_is_told(split, capsys):
    offsets, sizes = np.load(field_path(split, "offset")), np.load(field_path(split, "size"))
    raw = Index.open(split).shard_paths[0].read_bytes()
    # The same bytes with the CRC of what stands there: only the tar's own listing can tell that it is not the image.
    np.save(field_path(split, "offset"), np.where(np.arange(18) == 0, offsets - 512, offsets))
    crc32 = np.load(field_path(split, "crc32"))
    crc32[0] = zlib.crc32(raw[offsets[0] - 512 : offsets[0] - 512 + sizes[0]])
    np.save(field_path(split, "crc32"), crc32)
    offset, crc, fault = faults(split, capsys, "--no-decode")
    assert "offset.npy: SHA-256" in offset
    assert "crc32.npy: SHA-256" in crc
    assert f"bytes at {offsets[0] - 512:,}, the tar {sizes[0]:,} at {offsets[0]:,}" in fault


def test_an_image_that_does_not_decode_is_found_though_all_checksums_fit(tmp_path, capsys):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
    (tmp_path / "images" / "cat" / "a.jpg").write_bytes(buffer.getvalue()[:-20])
    arguments = [str(tmp_path / "images"), str(tmp_path / "dst"), "--split=val", "--no-decode-check"]
    make_shards.main(arguments)
    assert check(tmp_path / "dst", capsys, "--no-decode")[0] == 0
    (fault,) = faults(tmp_path / "dst", capsys)
    assert "sample 0 (00000000-cat-a): cannot be decoded (Image is incomplete or truncated)" in fault


def test_a_field_of_the_wrong_length_is_told(split, capsys):
    np.save(field_path(split, "label"), np.zeros(3, np.int32))
    (fault,) = faults(split, capsys)
    assert "label.npy: 3 rows, but the manifest states 18" in fault


def test_repeated_keys_are_told(split, capsys):
    manifest = json.loads((split / "manifest.json").read_text())
    first = Index.open(split).key(0)
    shutil.copy(split / manifest["shards"][0]["name"], split / manifest["shards"][1]["name"])
    assert any(f"key {first} stands for 2 samples" in fault for fault in faults(split, capsys))


def test_samples_left_out_at_conversion_are_counted_and_are_no_fault(tmp_path, capsys):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "images" / "cat" / "a.jpg")
    (tmp_path / "images" / "cat" / "b.jpg").write_bytes(b"no image")
    make_shards.main([str(tmp_path / "images"), str(tmp_path / "dst"), "--split=val"])
    code, lines = check(tmp_path / "dst", capsys)
    assert (code, len(lines)) == (0, 1)
    assert "1 samples in 1 shard, 1 classes, 1 left out at conversion: clean" in lines[0]


def test_what_is_no_shard_set_is_refused(tmp_path, split):
    (tmp_path / "empty").mkdir()
    for folder, expected in (
        (tmp_path / "missing", "no such folder"),
        (tmp_path / "empty", "no manifest.json"),
        (split / "index", "no manifest.json"),
    ):
        with pytest.raises(UserError, match=expected):
            check_shards.main([str(folder)])
    (split / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest"):
        check_shards.main([str(split.parent)])


def test_sizes_in_the_index_that_changed_are_found_without_decoding(split, capsys):
    values = np.load(field_path(split, "height"))
    values[4] += 1
    np.save(field_path(split, "height"), values)
    (fault,) = faults(split, capsys, "--no-decode")
    assert "index/height.npy: SHA-256 is" in fault


def test_bytes_behind_a_shards_end_are_told(split, capsys):
    paths = Index.open(split).shard_paths
    end = paths[0].stat().st_size
    with paths[0].open("ab") as file:
        file.write(paths[1].read_bytes())
    behind = f"{paths[1].stat().st_size:,} bytes follow the tar's end at offset {end:,}, where readers stop"
    assert any(behind in fault for fault in faults(split, capsys, "--no-decode"))


def test_a_stored_png_of_16_bits_is_a_fault_since_training_refuses_it():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(buffer, "PNG")
    fields = {"crc32": [zlib.crc32(buffer.getvalue())], "height": [5], "width": [6]}
    assert "PNG of 16 bits, which training does not decode" in fault_of_bytes(buffer.getvalue(), fields, 0, True)
