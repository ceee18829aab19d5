"""Options of data_prep.make_shards: which classes, what quality, and that a plan holds all of them."""

import io
import json
import zlib

import pytest
from PIL import Image

from ast_dist.data.index import Index
from ast_dist.errors import UserError
from data_prep.image import store_image
from data_prep.plan import plan_shards
from data_prep.sources import digits, imagefolder
from data_prep.sources.options import ClassFile, SourceOptions
from tests.sources import convert, encoded, jpeg, listed, not_listed, pixels

CLASSES = ["n01", "n02", "n03", "tench, Tinca tinca"]


@pytest.fixture
def tree(tmp_path):
    for place, name in enumerate(CLASSES):
        (tmp_path / "src" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "src" / name / f"{number}.jpg").write_bytes(jpeg(10 * place + number))
    return tmp_path / "src"


def classes_in(path, text):
    path.write_text(text, encoding="utf-8")
    return SourceOptions(classes=ClassFile.read(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n03\nn01\n", ["n01", "n03"]),
        ("# ImageNet-2\r\n\r\n  n03  \r\nn01\r\nn01", ["n01", "n03"]),
        ("\ufeffn02 shark\nn01\ttench, Tinca\n", ["n01", "n02"]),
        ("tench, Tinca tinca\n", ["tench, Tinca tinca"]),
    ],
)
def test_a_class_file_takes_its_classes_in_sorted_order(tree, tmp_path, text, expected):
    listing = listed(tree, options=classes_in(tmp_path / "classes.txt", text))
    assert listing.classes == expected
    assert {name.partition("/")[0]: expected[n] for name, n in zip(listing.names, listing.labels, strict=True)} == {
        name: name for name in expected
    }


def test_a_class_file_works_for_sources_without_folders(tmp_path):
    options = classes_in(tmp_path / "classes.txt", "7\n3 three\n")
    listing, whole = listed("digits", options=options), listed("digits")
    assert listing.classes == ["3", "7"]
    there = {name: listing.classes[n] for name, n in zip(listing.names, listing.labels.tolist(), strict=True)}
    assert there == {n: n[0] for n in whole.names if n[0] in "37"}


def test_a_class_that_the_source_does_not_have_is_named_with_its_line(tree, tmp_path):
    text = not_listed(tree, options=classes_in(tmp_path / "classes.txt", "n01\n\nn2 shark\n"))
    assert "line 3 names the class n2, but SRC has no such class (it has n02); 1 of 2 lines" in text


@pytest.mark.parametrize("text", [None, "", "# nothing\n\n"])
def test_a_class_file_that_is_missing_or_empty_is_refused_and_nothing_is_written(tree, tmp_path, text):
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=r"classes\.txt: (cannot be read|names no class)"):
        convert(tree, tmp_path / "dst", f"--classes={tmp_path / 'classes.txt'}")
    assert not (tmp_path / "dst").exists()


def test_a_class_file_leaves_damaged_folders_of_other_classes_alone(tree, tmp_path):
    for path in (tree / "n02").iterdir():
        path.unlink()
    assert "n02: no image in this class folder" in not_listed(tree)
    assert len(listed(tree, options=classes_in(tmp_path / "classes.txt", "n01")).names) == 2


def test_quality_counts_for_images_that_are_encoded_again_and_for_no_other(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "large.jpg").write_bytes(encoded(pixels(0, 64, 64)))
    (tmp_path / "src" / "a" / "small.jpg").write_bytes(encoded(pixels(1, 16, 16)))
    sizes = {}
    for quality in (30, 90):
        dst = tmp_path / str(quality)
        convert(tmp_path / "src", dst, "--resize-short=32", f"--jpeg-quality={quality}", "--no-decode-check")
        index = Index.open(dst / "train")
        assert index.manifest["jpeg_quality"] == quality
        raw = index.shard_paths[0].read_bytes()
        images = {
            int(index.height[i]): raw[index.offset[i] : index.offset[i] + index.size[i]]
            for i in range(index.num_samples)
        }
        assert images[16] == encoded(pixels(1, 16, 16))
        sizes[quality] = len(images[32])
        assert Image.open(io.BytesIO(images[32])).size == (32, 32)
    assert sizes[90] > 1.5 * sizes[30]


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_a_quality_that_jpeg_does_not_have_is_refused(tree, tmp_path, quality):
    with pytest.raises(UserError, match=f"--jpeg-quality is {quality}, but must be from 1 to 100"):
        convert(tree, tmp_path / "dst", f"--jpeg-quality={quality}")


@pytest.mark.parametrize("option", ["--image-column=x", "--label-column=x"])
def test_columns_are_refused_for_sources_that_have_none(tree, tmp_path, option):
    with pytest.raises(UserError, match="only parquet files have columns"):
        convert(tree, tmp_path / "dst", option)
    assert not (tmp_path / "dst").exists()


def test_every_setting_that_changes_the_bytes_changes_the_fingerprint(tree, tmp_path):
    settings = {
        "split": "train", "shard_mb": 1.0, "resize_short": None, "jpeg_quality": 95, "decode": True, "seed": 0,
    }  # fmt: skip
    changes = {
        "split": "val", "resize_short": 32, "jpeg_quality": 94, "decode": False, "seed": 1, "shard_mb": 0.003,
    }  # fmt: skip
    listing = imagefolder.list_samples(str(tree), "train")
    fewer = listed(tree, options=classes_in(tmp_path / "classes.txt", "n01\nn02\nn03"))

    def fingerprint(listing, **changed):
        return plan_shards(listing, tmp_path, tmp_path, **{**settings, **changed}).fingerprint

    seen = [fingerprint(listing), fingerprint(fewer), fingerprint(digits.list_samples("digits", "train"))]
    seen += [fingerprint(listing, **{name: value}) for name, value in changes.items()]
    assert len(set(seen)) == len(seen)
    assert fingerprint(imagefolder.list_samples(str(tree), "train")) == seen[0]


def test_a_class_file_is_part_of_the_command_that_goes_on(tree, tmp_path):
    (tmp_path / "classes.txt").write_text("n03\nn01\n")
    convert(tree, tmp_path / "dst", f"--classes={tmp_path / 'classes.txt'}", "--no-decode-check")
    manifest = json.loads((tmp_path / "dst" / "train" / "manifest.json").read_text())
    assert manifest["classes"] == ["n01", "n03"]
    index = Index.open(tmp_path / "dst" / "train")
    assert {(int(n), int(crc)) for n, crc in zip(index.label, index.crc32, strict=True)} == {
        (label, zlib.crc32(jpeg(10 * place + number))) for label, place in ((0, 0), (1, 2)) for number in range(2)
    }


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("height", "width"), [(20, 30), (21, 30), (30, 21), (90, 20)])
def test_reducing_gives_the_same_bytes_with_and_without_the_decode_check(height, width, decode):
    data = encoded(pixels(0, height, width))
    stored = store_image(data, resize_short=20, jpeg_quality=80, decode=decode)
    assert min(stored.height, stored.width) == 20
    assert (stored.data == data) is (min(height, width) == 20)
    assert stored == store_image(data, resize_short=20, jpeg_quality=80, decode=not decode)
