"""data_prep/tar_scan.py: every layout of tars that people have is understood, and what is not is refused by name."""

import gzip
import hashlib
import io
import json
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from ast_dist.errors import UserError
from data_prep.shard import DamagedSourceError
from data_prep.tar_scan import LARGEST_INCOMPLETE_SHARE, scan_tar


def picture(number, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10 + number % 7, 20 + number % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members, form=tarfile.GNU_FORMAT, **options):
    with tarfile.open(path, "w", format=form, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def scan(path):
    return scan_tar(path, path.name, lambda: None)


def scanned(tmp_path, members, **options):
    """Scan a tar of these members; returns key → label, after checking that each row holds an image of the members."""
    path = write_tar(tmp_path / "a.tar", members, **options)
    record = scan(path)
    raw = path.read_bytes()
    assert (record.bytes, record.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    images = {data for _, data in members}
    fields = record.fields
    for row in range(len(record.keys)):
        data = raw[fields["offset"][row] : fields["offset"][row] + fields["size"][row]]
        assert data in images
        assert zlib.crc32(data) == fields["crc32"][row]
        assert Image.open(io.BytesIO(data)).size == (fields["width"][row], fields["height"][row])
    return dict(zip([key.decode() for key in record.keys], fields["label"].tolist(), strict=True))


def refusal(tmp_path, members, **options):
    with pytest.raises(UserError) as caught:
        scan(write_tar(tmp_path / "a.tar", members, **options))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "a.tar"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("label", "content"),
    [
        ("cls", b"3"),
        ("cls", b"3\n"),
        ("CLS", b"3"),
        ("cls.txt", b" 3 "),
        ("txt", b"3"),
        ("json", b'{"label": 3}'),
        ("json", b'{"label": "tench", "class": 3}'),
        ("json", b'{"cls": "3"}'),
        ("json", b'{"class_index": 3, "url": "\\u00e9"}'),
    ],
)
@pytest.mark.parametrize("label_first", [True, False])
def test_a_label_is_found_in_every_place_where_people_put_it(tmp_path, label, content, label_first):
    pair = [("0001.jpg", picture(1)), (f"0001.{label}", content)]
    assert scanned(tmp_path, pair[::-1] if label_first else pair) == {"0001": 3}


def test_cls_counts_before_json_and_json_before_txt(tmp_path):
    members = [("a.json", b'{"label": 2}'), ("a.txt", b"1"), ("a.jpg", picture(1)), ("b.jpg", picture(2))]
    members += [("b.txt", b"1"), ("b.json", b'{"label": 2}'), ("b.cls", b"3"), ("c.jpg", picture(3))]
    members += [("c.txt", b"a photo of 1 cat"), ("c.json", b'{"label": true, "class_index": 2}')]
    assert scanned(tmp_path, members) == {"a": 2, "b": 3, "c": 2}


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "Jpg", "png", "webp", "WEBP"])
def test_every_extension_of_an_image_is_known_in_both_cases(tmp_path, extension):
    kind = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG"}.get(extension, "WEBP")
    assert scanned(tmp_path, [(f"x.{extension}", picture(1, kind)), ("x.cls", b"0")]) == {"x": 0}


def test_keys_with_folders_and_dots_are_what_webdataset_takes_them_for(tmp_path):
    names = ["v1.0/train/n01/n01_1", "./b", "train.v2/c-é"]
    members = [(f"{name}{end}", data) for name in names for end, data in ((".jpg", picture(1)), (".cls", b"1"))]
    found = scanned(tmp_path, members, form=tarfile.PAX_FORMAT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the garbage collector
        keys = [sample["__key__"] for sample in webdataset.WebDataset([str(tmp_path / "a.tar")], shardshuffle=False)]
    assert list(found) == keys == names


def test_a_dot_inside_the_names_does_not_make_one_sample_of_several(tmp_path):
    names = ["img.001", "img.002", "img.v3.003"]
    members = [(f"{name}{end}", data) for name in names for end, data in ((".jpg", picture(1)), (".cls.txt", b"4"))]
    assert scanned(tmp_path, members) == dict.fromkeys(names, 4)


def test_names_in_the_style_of_input_and_target_are_one_sample(tmp_path):
    assert scanned(tmp_path, [("7.input.jpg", picture(1)), ("7.target.cls", b"2")]) == {"7": 2}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_format_of_tars(tmp_path, form):
    key = f"{'folder' * 15}/{'name' * 20}" if form == tarfile.USTAR_FORMAT else f"{'folder' * 40}/{'name' * 40}é"
    members = [(f"{key}.jpg", picture(1)), (f"{key}.cls", b"5"), ("next.jpg", picture(2)), ("next.cls", b"6")]
    assert scanned(tmp_path, members, form=form) == {key: 5, "next": 6}


def test_files_that_are_no_samples_are_passed_over(tmp_path):
    extra = [("README.md", b"text"), ("._1.jpg", b"mac"), (".DS_Store", b""), ("LICENSE", b""), ("meta.json", b"{}")]
    extra += [("__meta__/x.jpg", b""), ("npy/1.npy", bytes(2_000_000))]
    path = tmp_path / "a.tar"
    write_tar(path, [*extra, ("1.jpg", picture(1)), ("1.npy", bytes(700)), ("1.cls", b"0")])
    with tarfile.open(path, "a") as tar:
        folder, link = tarfile.TarInfo("2.jpg"), tarfile.TarInfo("3.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "1.jpg"
        tar.addfile(folder)
        tar.addfile(link)
    record = scan(path)
    assert (record.keys.tolist(), record.damaged) == ([b"1"], [])
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def many(count, broken=()):
    """Members of `count` samples; `broken` lists those that come without label."""
    members = []
    for number in range(count):
        members.append((f"{number:05d}.jpg", picture(number % 3)))
        if number not in broken:
            members.append((f"{number:05d}.cls", b"1"))
    return members


def test_few_samples_without_a_label_are_left_out_and_listed_and_more_are_refused(tmp_path):
    allowed = int(LARGEST_INCOMPLETE_SHARE * 200)
    record = scan(write_tar(tmp_path / "a.tar", many(200, broken=range(allowed))))
    assert len(record.keys) == 200 - allowed
    assert record.damaged[0] == ("a.tar: 00000", "no label among jpg")
    text = refusal(tmp_path, many(200, broken=range(5, 6 + allowed)))
    assert f"{allowed + 1} of 200 samples have no image or no label" in text
    assert "the first is 00005 (no label among jpg)" in text


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.cls", b"1"), ("a.bmp", picture(1, "BMP"))], "the first is a (no images among cls, bmp)"),
        ([("a.jpg", picture(1)), ("a.cls", b"cat")], "the first is a (label 'cat' is no class number)"),
        ([("a.jpg", picture(1)), ("a.cls", b"-1")], "label '-1' is no class number"),
        ([("a.jpg", picture(1)), ("a.cls", b"4294967296")], "label '4294967296' is no class number"),
        ([("a.jpg", picture(1)), ("a.png", picture(1, "PNG")), ("a.cls", b"1")], "2 images among jpg, png, cls"),
        ([("a.jpg", picture(1)), ("b.jpg", picture(2)), ("a.cls", b"1")], "of 3 samples"),
        ([], "none of its 0 samples can be used"),
        ([("notes.txt", b"text")], "none of its 0 samples can be used"),
        ([("a.jpg", b"no image"), ("a.cls", b"1")], "the first is a.tar: a.jpg (cannot identify image file)"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(tmp_path, members, expected):
    assert expected in refusal(tmp_path, members)


def test_damaged_images_are_left_out_and_listed(tmp_path):
    members = [("a.jpg", picture(1)[:50]), ("a.cls", b"1"), ("b.jpg", picture(2)), ("b.cls", b"2"), ("c.jpg", b"")]
    record = scan(
        write_tar(tmp_path / "t.tar", [*members, ("c.cls", b"3"), ("d.jpg", picture(1, "GIF")), ("d.cls", b"4")])
    )
    assert record.keys.tolist() == [b"b"]
    assert record.damaged == [
        ("t.tar: a.jpg", "ends inside its header, after 50 bytes"),
        ("t.tar: c.jpg", "empty file"),
        ("t.tar: d.jpg", "neither JPEG nor PNG nor WebP"),
    ]


def test_images_that_decoders_disagree_on_are_counted_and_those_that_training_refuses_are_left_out(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(wide, "PNG")
    images = [picture(1, exif=exif), picture(2, mode="CMYK"), wide.getvalue(), picture(3), picture(4, mode="L")]
    members = [(f"{n}.{end}", data) for n, image in enumerate(images) for end, data in (("jpg", image), ("cls", b"0"))]
    record = scan(write_tar(tmp_path / "a.tar", members))
    assert record.unusual == {"turned by EXIF": 1, "CMYK": 1}
    assert record.keys.tolist() == [b"0", b"1", b"3", b"4"]
    assert record.damaged == [("a.tar: 2.jpg", "PNG of 16 bits, which training does not decode; convert the set")]


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_whatever_it_is_called(tmp_path, compression):
    with tarfile.open(tmp_path / "a.tar", f"w:{compression}") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(UserError, match=r"a\.tar: compressed with (gzip|bzip2|xz), so a sample cannot be read without"):
        scan(tmp_path / "a.tar")


def test_a_tar_cut_short_is_refused_with_both_numbers(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(3))
    raw = path.read_bytes()
    whole = scan(path)
    end = int(whole.fields["offset"][2]) + 100
    path.write_bytes(raw[:end])
    with pytest.raises(UserError, match=rf"00002.jpg needs 1,024 bytes at offset {end - 100:,}, .* ends at {end:,}"):
        scan(path)
    path.write_bytes(raw[: end - 350])  # inside the header
    with pytest.raises(UserError, match=r"the header after 00001.cls, at offset .* is damaged"):
        scan(path)


def test_a_damaged_header_is_not_taken_for_the_end_of_the_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(3))
    raw = bytearray(path.read_bytes())
    raw[int(scan(path).fields["offset"][1]) - 500] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"the header after 00000.cls, at offset .* is damaged"):
        scan(path)


def test_a_tar_without_its_end_of_zeros_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(3))
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end])
    assert len(scan(path).keys) == 3


@pytest.mark.parametrize("content", [b"", b"no tar", gzip.compress(b"x")[:1] * 600, json.dumps({}).encode() * 300])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar: no tar, or damaged after its start"):
        scan(tmp_path / "a.tar")


def test_too_few_usable_samples_are_the_sources_fault(tmp_path):
    with pytest.raises(DamagedSourceError):
        scan(write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("a.cls", b"1")]))


def test_json_nested_too_deeply_is_no_label(tmp_path):
    deep = b"[" * 200_000
    assert "the first is a (no label among jpg, json)" in refusal(tmp_path, [("a.jpg", picture(1)), ("a.json", deep)])


def test_tars_joined_end_to_end_are_refused_with_the_bytes_that_no_reader_sees(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(2))
    first = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(10_240))
    assert len(scan(path).keys) == 2  # more zeros are padding
    second = write_tar(tmp_path / "b.tar", many(3)).read_bytes()
    path.write_bytes(path.read_bytes()[:first] + second)
    with pytest.raises(
        UserError, match=rf"{len(second):,} bytes follow the tar's end at offset {first:,}, and readers"
    ):
        scan(path)
