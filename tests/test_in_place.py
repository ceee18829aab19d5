"""data_prep.make_shards where nothing is copied: loose files and ImageNet's lists with --index-only."""

import io
import itertools
import json
import os

import numpy as np
import pytest
from PIL import Image

from ast_dist.data.index import Index
from ast_dist.errors import UserError
from data_prep import check_shards, make_shards

WNIDS = ["n01440764", "n01443537", "n02012849"]
MAPPING = "n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\nn02012849 crane\n"


def picture(number, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10 + number % 7, 20 + number % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def large_webp(**options):
    """A WebP of more than 64 KB; EXIF data stand at its end."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, **options)
    return buffer.getvalue()


def wide_png():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_tree(root):
    """Two classes of three images; returns name → bytes."""
    images = {
        f"{c}/{i}.{['jpg', 'JPEG', 'png'][i]}": picture(i, "PNG" if i == 2 else "JPEG") for c in "ab" for i in range(3)
    }
    for name, data in images.items():
        write(root / name, data)
    return images


def write_imagenet(root, train_list=True, mapping=True):
    """Kaggle's ImageNet with 2 images a class in train and 4 in val. Returns CLS-LOC."""
    cls_loc = root / "ILSVRC" / "Data" / "CLS-LOC"
    stems = [f"{wnid}/{wnid}_{number}" for wnid, number in itertools.product(WNIDS, (10, 9))]
    for number, stem in enumerate(stems):
        write(cls_loc / "train" / f"{stem}.JPEG", picture(number))
    solution = ["ImageId,PredictionString"]
    for number in (3, 1, 2, 4):
        write(cls_loc / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", picture(number))
        solution.append(f"ILSVRC2012_val_{number:08d},{WNIDS[number % 3]} 85 1 499 272 {WNIDS[0]} 1 2 3 4 ")
    write(root / "LOC_val_solution.csv", "\n".join(solution) + "\n")
    if mapping:
        write(root / "LOC_synset_mapping.txt", MAPPING)
    if train_list:
        lines = [f"{stem} {number}\n" for number, stem in enumerate(stems, start=1)]
        write(root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "train_cls.txt", "".join(lines))
    return cls_loc


def index_only(src, dst, *options, split="train"):
    assert make_shards.main([str(src), str(dst), f"--split={split}", "--index-only", "--workers=1", *options]) == 0
    return Index.open(dst / split)


def refusal(src, dst, *options, split="train"):
    with pytest.raises(UserError) as caught:
        make_shards.main([str(src), str(dst), f"--split={split}", "--index-only", "--workers=1", *options])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels_by_name(index):
    return {index.key(row): int(index.label[row]) for row in range(index.num_samples)}


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def test_an_index_of_loose_files_names_every_file_and_nothing_else_is_written(tmp_path, monkeypatch):
    images = write_tree(tmp_path / "src")
    before = snapshot(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    index = index_only("src", tmp_path / "dst")
    assert (index.layout, index.data_root) == ("files", str(tmp_path / "src"))
    assert labels_by_name(index) == {name: "ab".index(name[0]) for name in images}
    for name in ("shard", "offset", "size", "height", "width", "crc32"):
        assert not getattr(index, name).any()
    manifest = index.manifest
    assert (manifest["format_version"], manifest["shards"], manifest["classes"]) == (2, [], ["a", "b"])
    assert (manifest["source"], manifest["seed"], manifest["split"]) == ("imagefolder", 0, "train")
    assert sorted(path.name for path in (tmp_path / "dst" / "train").iterdir()) == ["index", "manifest.json"]
    assert snapshot(tmp_path / "src") == before


def test_no_file_is_opened_or_even_there_for_an_index_without_check(tmp_path):
    write_tree(tmp_path / "src")
    (tmp_path / "src" / "a" / "1.JPEG").write_bytes(b"no image")
    assert index_only(tmp_path / "src", tmp_path / "dst").num_samples == 6


def test_equal_files_give_equal_hashes_and_other_labels_or_names_give_others(tmp_path):
    write_tree(tmp_path / "src")
    first = index_only(tmp_path / "src", tmp_path / "1").hash
    assert index_only(tmp_path / "src", tmp_path / "2").hash == first
    (tmp_path / "src" / "b" / "0.jpg").rename(tmp_path / "src" / "b" / "zero.jpg")
    assert index_only(tmp_path / "src", tmp_path / "3").hash != first


def test_check_files_fills_in_sizes_and_leaves_out_and_lists_what_is_no_image(tmp_path, capsys):
    source = tmp_path / "src"
    images = write_tree(source)
    exif = Image.Exif()
    exif[0x0112] = 3
    extra = {"a/cmyk.jpg": picture(7, mode="CMYK"), "a/turned.webp": large_webp(exif=exif.tobytes())}
    extra["a/large.jpg"] = picture(9, icc_profile=bytes(200_000))  # its size stands beyond the first 64 KB
    for name, data in extra.items():
        write(source / name, data)
    write(source / "a/bad.jpg", b"no image")
    write(source / "a/empty.jpg", b"")
    write(source / "a/wide.png", wide_png())
    index = index_only(source, tmp_path / "dst", "--check-files")
    for row in range(index.num_samples):
        data = (images | extra)[index.key(row)]
        assert index.size[row] == len(data)
        assert (index.width[row], index.height[row]) == Image.open(io.BytesIO(data)).size
    assert index.num_samples == 9
    assert {entry["file"]: entry["reason"] for entry in index.manifest["damaged"]} == {
        "a/bad.jpg": "cannot identify image file",
        "a/empty.jpg": "empty file",
        "a/wide.png": "PNG of 16 bits, which training does not decode; convert the set",
    }
    assert index.manifest["unusual"] == {"CMYK": 1, "turned by EXIF": 1}
    output = capsys.readouterr().out
    assert (
        "warning: these stay as they are: 1 CMYK (decoders disagree on their colours), 1 turned by EXIF (decoders"
        in output
    )
    assert "left out, since they are damaged or incomplete: 3" in output


def test_a_class_without_a_whole_image_is_refused_and_nothing_stays(tmp_path):
    images = write_tree(tmp_path / "src")
    for name in images:
        if name.startswith("b"):
            write(tmp_path / "src" / name, b"")
    text = refusal(tmp_path / "src", tmp_path / "new" / "dst", "--check-files")
    assert "none of the 3 images of class b is whole" in text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("train_list", [True, False])
@pytest.mark.parametrize("named", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_train_is_found_with_its_list_and_without(tmp_path, train_list, named):
    cls_loc = write_imagenet(tmp_path / "kaggle", train_list)
    index = index_only(tmp_path / "kaggle" / named, tmp_path / "dst")
    assert index.manifest["classes"] == WNIDS
    assert index.manifest["source"] == "ilsvrc"
    assert index.data_root == str(cls_loc / "train")
    expected = {f"{wnid}/{wnid}_{number}.JPEG": WNIDS.index(wnid) for wnid in WNIDS for number in (9, 10)}
    assert labels_by_name(index) == expected
    # The list's order is kept: training draws its own.
    assert index.key(0).endswith("_10.JPEG")


def test_imagenet_train_is_listed_from_one_file_without_a_look_at_the_folders(tmp_path):
    cls_loc = write_imagenet(tmp_path)
    for stem in (f"{WNIDS[1]}/{WNIDS[1]}_10", f"{WNIDS[0]}/{WNIDS[0]}_9"):
        (cls_loc / "train" / f"{stem}.JPEG").unlink()
    assert index_only(tmp_path, tmp_path / "dst").num_samples == 6
    (cls_loc / "train" / WNIDS[2] / f"{WNIDS[2]}_9.JPEG").unlink()
    text = refusal(tmp_path, tmp_path / "dst2")
    assert f"{WNIDS[2]}_9.JPEG: missing, though" in text
    assert "train_cls.txt names it" in text


@pytest.mark.parametrize("mapping", [True, False])
def test_imagenet_val_has_the_labels_of_its_solution(tmp_path, mapping):
    write_imagenet(tmp_path, mapping=mapping)
    index = index_only(tmp_path, tmp_path / "dst", split="val")
    assert labels_by_name(index) == {f"ILSVRC2012_val_{n:08d}.JPEG": n % 3 for n in (1, 2, 3, 4)}
    assert index.data_root.endswith("CLS-LOC/val")
    assert index.manifest["classes"] == WNIDS


def test_imagenet_lists_that_contradict_each_other_are_refused(tmp_path):
    write_imagenet(tmp_path)
    write(tmp_path / "LOC_synset_mapping.txt", "\n".join(MAPPING.splitlines()[:2]))
    assert "n02012849 is none of the 2 classes of LOC_synset_mapping.txt" in refusal(tmp_path, tmp_path / "dst")
    (tmp_path / "LOC_val_solution.csv").unlink()
    assert "LOC_val_solution.csv is missing" in refusal(tmp_path, tmp_path / "dst", split="val")
    write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001\n")
    assert "labels ILSVRC2012_val_00000001 as nothing" in refusal(tmp_path, tmp_path / "dst", split="val")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--resize-short=100"], "--resize-short changes images, but --index-only leaves them"),
        (["--format=digits"], "takes no folder"),
        (["--class-names=x"], "--class-names is for WebDataset tars"),
        (["--jpeg-quality=90"], "--jpeg-quality has no effect with --index-only"),
        (["--shard-mb=1"], "--shard-mb has no effect with --index-only"),
        (["--no-decode-check"], "--no-decode-check has no effect with --index-only"),
        (["--image-column=x"], "--image-column has no effect with --index-only"),
        (["--label-column=x"], "--label-column has no effect with --index-only"),
        (["--download-dir=x"], "--download-dir has no effect with --index-only"),
    ],
)
def test_an_option_that_does_not_go_with_it_is_refused(tmp_path, options, expected):
    write_tree(tmp_path / "src")
    assert expected in refusal(tmp_path / "src", tmp_path / "dst", *options)
    assert not (tmp_path / "dst").exists()


def test_check_files_without_index_only_and_an_index_of_digits_are_refused(tmp_path):
    with pytest.raises(UserError, match="--check-files goes with --index-only"):
        make_shards.main([str(tmp_path), str(tmp_path / "dst"), "--split=train", "--check-files"])
    assert "--index-only is for files in folders" in refusal("digits", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_formats_that_training_does_not_decode_are_refused_with_their_number(tmp_path):
    write_tree(tmp_path / "src")
    write(tmp_path / "src/b/x.bmp", picture(1, "BMP"))
    write(tmp_path / "src/b/y.tif", picture(1, "TIFF"))
    text = refusal(tmp_path / "src", tmp_path / "dst")
    assert "b/x.bmp: training decodes no .bmp (2 such files)" in text


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    write_tree(tmp_path / "src")
    with open(os.fsencode(tmp_path / "src" / "b") + b"/\xff.jpg", "wb") as file:  # noqa: PTH123 - pathlib takes no bytes
        file.write(picture(1))
    assert r"b'b/\xff.jpg' is not UTF-8" in refusal(tmp_path / "src", tmp_path / "dst")


def test_a_destination_that_cannot_be_written_or_holds_something_is_refused(tmp_path):
    write_tree(tmp_path / "src")
    write(tmp_path / "file", "")
    assert "cannot be written (Not a directory)" in refusal(tmp_path / "src", tmp_path / "file" / "dst")
    write(tmp_path / "dst" / "train" / "notes.txt", "mine")
    assert "holds 1 files that make_shards did not write (notes.txt" in refusal(tmp_path / "src", tmp_path / "dst")
    index_only(tmp_path / "src", tmp_path / "dst", split="val")
    assert "holds a finished set already (6 samples)" in refusal(tmp_path / "src", tmp_path / "dst", split="val")


def test_an_index_that_was_interrupted_is_made_anew_and_no_conversion_takes_its_place(tmp_path):
    write_tree(tmp_path / "src")
    write(tmp_path / "dst/train/.indexing/lock", "")
    write(tmp_path / "dst/train/index/label.npy", "half")
    with pytest.raises(UserError, match="what another command began and did not finish"):
        make_shards.main([str(tmp_path / "src"), str(tmp_path / "dst"), "--split=train"])
    assert index_only(tmp_path / "src", tmp_path / "dst").num_samples == 6
    assert not (tmp_path / "dst/train/.indexing").exists()


def check(folder, capsys, *options):
    capsys.readouterr()
    code = check_shards.main([str(folder), "--workers=1", *options])
    return code, capsys.readouterr().out.splitlines()


def test_check_shards_finds_nothing_in_whole_files_and_names_missing_damaged_and_changed_ones(tmp_path, capsys):
    source, train = tmp_path / "src", tmp_path / "dst" / "train"
    images = write_tree(source)
    index_only(source, tmp_path / "dst", "--check-files")
    clean = f"{train}: 6 samples in files below {source}, 2 classes: clean"
    assert check(tmp_path / "dst", capsys, "--no-decode") == (0, [clean])
    (source / "a/0.jpg").unlink()
    write(source / "a/1.JPEG", images["a/1.JPEG"] + b"more")
    write(source / "b/0.jpg", b"\0" * len(images["b/0.jpg"]))
    code, lines = check(train, capsys, "--no-decode")
    assert code == 1
    assert lines[0] == f"{train}: sample 0 (a/0.jpg): missing"
    size = len(images["a/1.JPEG"])
    assert lines[1] == f"{train}: sample 1 (a/1.JPEG): has {size + 4:,} bytes, but the index states {size:,}"
    assert lines[2].startswith(f"{train}: sample 3 (b/0.jpg): cannot be decoded (")
    assert lines[3].endswith(": 3 faults")


def test_check_shards_decodes_files_of_which_the_index_knows_nothing(tmp_path, capsys):
    images = write_tree(tmp_path / "src")
    write(tmp_path / "src/b/1.JPEG", images["b/1.JPEG"][:-30])
    index_only(tmp_path / "src", tmp_path / "dst")
    assert check(tmp_path / "dst", capsys, "--no-decode")[0] == 0
    code, lines = check(tmp_path / "dst", capsys)
    assert code == 1
    assert "sample 4 (b/1.JPEG): cannot be decoded (Image is incomplete or truncated)" in lines[0]


def test_check_shards_refuses_data_that_are_elsewhere(tmp_path):
    write_tree(tmp_path / "src")
    index_only(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="but there is no such folder"):
        check_shards.main([str(tmp_path / "dst")])
    manifest = tmp_path / "dst/train/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"data_root": "s3://bucket/set"}))
    with pytest.raises(UserError, match="its data lie at s3://bucket/set"):
        check_shards.main([str(tmp_path / "dst")])


@pytest.mark.parametrize("options", [[], ["--no-decode"]])
def test_check_shards_finds_pngs_of_16_bits_which_training_refuses(tmp_path, capsys, options):
    write_tree(tmp_path / "src")
    write(tmp_path / "src/b/wide.png", wide_png())
    index_only(tmp_path / "src", tmp_path / "dst")
    code, lines = check(tmp_path / "dst", capsys, *options)
    assert (code, len(lines)) == (1, 2)
    assert "(b/wide.png): cannot be decoded (PNG of 16 bits, which training does not decode" in lines[0]


def test_the_files_of_one_split_are_not_taken_for_the_other_split_whichever_way_either_is_made(tmp_path):
    write_tree(tmp_path / "src")
    expected = f"{tmp_path / 'src'}: the samples of the split val are those of train, which"
    index_only(tmp_path / "src", tmp_path / "indexed")
    assert expected in refusal(tmp_path / "src", tmp_path / "indexed", split="val")
    with pytest.raises(UserError, match="are those of train"):
        make_shards.main([str(tmp_path / "src"), str(tmp_path / "indexed"), "--split=val"])
    arguments = [str(tmp_path / "src"), str(tmp_path / "made"), "--split=train", "--workers=1", "--no-decode-check"]
    assert make_shards.main(arguments) == 0
    assert expected in refusal(tmp_path / "src", tmp_path / "made", split="val")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    assert "are those of train" in refusal(tmp_path / "link", tmp_path / "indexed", split="val")
    assert not (tmp_path / "indexed" / "val").exists()


def test_other_files_of_the_same_names_are_another_split(tmp_path):
    for split in ("train", "val"):
        write_tree(tmp_path / "src" / split)
    index_only(tmp_path / "src", tmp_path / "dst")
    assert index_only(tmp_path / "src", tmp_path / "dst", split="val").num_samples == 6
