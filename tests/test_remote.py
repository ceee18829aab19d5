"""ast_dist/data/remote.py: shards behind URLs read as local ones do, and what goes wrong there is told with its URL."""

import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ast_dist.data import remote
from ast_dist.data.index import MANIFEST_NAME, Index, field_path, file_sha256, write_manifest
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.remote import RemoteError, RemoteFiles, cache_folder, open_index, open_reader
from ast_dist.data_config import DataConfig
from ast_dist.errors import RankError, UserError
from tests.servers import s3_bucket, serving
from tests.shards import overwrite, squares, write_split
from tests.training import refused, words

IMAGES = squares(12)


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path / "set/train", IMAGES, num_shards=4)


@pytest.fixture
def server(split):
    with serving(split.root.parent) as server:
        yield server


@pytest.fixture
def config(tmp_path):
    return DataConfig(shard_cache_dir=str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)


def read_all(index, config):
    reader = open_reader(index, config)
    try:
        return [reader.read(sample_id) for sample_id in range(index.num_samples)]
    finally:
        reader.close()


def with_url(split, folder, url):
    """An index alone, whose data lie behind a URL."""
    shutil.copytree(split.root / "index", folder / "index")
    write_manifest(folder, {**split.manifest, "format_version": 2, "data_root": url})
    return folder


def test_a_url_reads_as_the_folder_does_and_has_the_same_hash(split, server, config):
    index = open_index(f"{server.url}/train/", config)
    assert read_all(index, config) == IMAGES
    assert index.hash == split.hash
    assert (index.is_remote, index.location) == (True, f"{server.url}/train")
    assert np.array_equal(index.label, split.label)


def test_a_folder_opens_as_before_and_needs_no_cache(split, config, tmp_path):
    index = open_index(str(split.root), config)
    assert read_all(index, config) == IMAGES
    assert not (tmp_path / "cache").exists()


def test_an_index_alone_reads_shards_behind_its_url(split, server, config, tmp_path):
    index = open_index(str(with_url(split, tmp_path / "alone", f"{server.url}/train")), config)
    assert read_all(index, config) == IMAGES


def test_a_server_that_knows_no_ranges_is_read_too(split, config, monkeypatch):
    monkeypatch.setattr("ast_dist.data.shard_cache.PIECE_BYTES", 1000)
    with serving(split.root.parent, has_ranges=False) as server:
        index = open_index(f"{server.url}/train", config)
        assert read_all(index, config) == IMAGES
        assert server.gets_of("train-000001.tar") == 1


def test_a_shard_is_fetched_in_pieces(split, server, config, monkeypatch):
    monkeypatch.setattr("ast_dist.data.shard_cache.PIECE_BYTES", 3000)
    assert read_all(open_index(f"{server.url}/train", config), config) == IMAGES
    size = split.shard_paths[0].stat().st_size
    ranges = [text for path, text in server.gets if path.endswith("train-000000.tar")]
    assert ranges == [f"bytes={start}-{min(start + 3000, size) - 1}" for start in range(0, size, 3000)]


@pytest.mark.parametrize("fault", ["500", "429", "cut", "wrong bytes"])
def test_a_fault_that_passes_is_survived(server, config, fault):
    index = open_index(f"{server.url}/train", config)
    server.faults["train-000001.tar"] += [fault] * (1 if fault == "wrong bytes" else 2)
    assert read_all(index, config) == IMAGES
    assert server.gets_of("train-000001.tar") == (2 if fault == "wrong bytes" else 3)


def test_a_fault_that_stays_names_the_url_the_tries_and_both_errors(server, config):
    index = open_index(f"{server.url}/train", config)
    server.faults["train-000002.tar"] += ["cut", "500", "500", "500", "500"]
    reader = open_reader(index, config)
    with pytest.raises(RemoteError) as caught:
        reader.read(6)
    text = str(caught.value)
    assert text.startswith(f"{server.url}/train/train-000002.tar: 5 tries failed: ClientResponseError: 500")
    assert "; the first said: ClientPayloadError" in text
    assert reader.read(6) == IMAGES[6]  # the server is back
    reader.close()


@pytest.mark.parametrize(("fault", "says"), [("404", "not found"), ("403", "may not be read")])
def test_what_will_not_change_is_not_tried_again(split, server, config, fault, says):
    index = open_index(f"{server.url}/train", config)
    if fault == "404":
        split.shard_paths[3].unlink()
    else:
        server.faults["train-000003.tar"] += [fault]
    reader = open_reader(index, config)
    with pytest.raises(RankError, match=rf"^{server.url}/train/train-000003\.tar: {says}"):
        reader.read(11)
    reader.close()
    assert server.gets_of("train-000003.tar") == 1


def test_other_bytes_than_the_manifests_are_refused_with_both_checksums(split, server, config):
    index = open_index(f"{server.url}/train", config)
    overwrite(split, 3, b"changed")
    reader = open_reader(index, config)
    with pytest.raises(RankError) as caught:
        reader.read(3)
    reader.close()
    stated = split.manifest["shards"][1]["sha256"]
    for part in (f"{server.url}/train/train-000001.tar", stated, file_sha256(split.shard_paths[1])):
        assert part in str(caught.value)
    assert not list(Path(config.shard_cache_dir, "shards").glob("*.part"))


def test_a_missing_shard_names_itself_at_the_start(split, server, config):
    split.shard_paths[2].unlink()
    with pytest.raises(UserError, match=rf"^{server.url}/train/train-000002\.tar: shard 3 of 4 is missing"):
        open_index(f"{server.url}/train", config)


def test_a_shard_of_another_size_is_refused_at_the_start_with_both_sizes(split, server, config):
    size = split.shard_paths[2].stat().st_size
    with split.shard_paths[2].open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"train-000002\.tar: .* has {size + 4:,} bytes, .* states {size:,}"):
        open_index(f"{server.url}/train", config)


def test_the_index_is_copied_once_for_each_manifest(split, server, config):
    for _ in range(2):
        open_index(f"{server.url}/train", config)
    assert server.gets_of("label.npy") == 1
    shutil.rmtree(split.root)
    changed = write_split(split.root, squares(8), num_shards=2)
    index = open_index(f"{server.url}/train", config)
    assert server.gets_of("label.npy") == 2
    assert (index.hash, index.num_samples) == (changed.hash, 8)
    assert read_all(index, config) == squares(8)


def test_a_copy_that_was_left_half_made_is_made_anew(server, config, tmp_path):
    root = open_index(f"{server.url}/train", config).root
    (root / MANIFEST_NAME).unlink()
    (root / "index/label.npy").write_bytes(b"half")
    root.with_suffix(".tmp").mkdir()
    assert read_all(open_index(f"{server.url}/train", config), config) == IMAGES
    assert not root.with_suffix(".tmp").exists()


def test_an_index_file_that_is_not_the_manifests_is_refused_by_its_url(split, server, config):
    labels = field_path(split.root, "label")
    write_manifest(split.root, {**split.manifest, "index_sha256": {"label": file_sha256(labels)}})
    np.save(labels, np.load(labels)[::-1])
    with pytest.raises(UserError, match=rf"^{server.url}/train/index/label\.npy: SHA-256 "):
        open_index(f"{server.url}/train", config)
    write_manifest(split.root, split.manifest)
    np.save(labels, np.load(labels)[1:])
    with pytest.raises(UserError, match=rf"^{server.url}/train/index/label\.npy: 11 rows, but the manifest states 12"):
        open_index(f"{server.url}/train", config)


def test_faults_while_the_index_is_copied_are_survived_or_told_in_one_line(server, config):
    server.faults["label.npy"] += ["cut", "500"]
    server.faults["keys.npy"] += ["500"] * 5
    with pytest.raises(UserError, match=rf"^{server.url}/train/index/keys\.npy: 5 tries failed: ") as caught:
        open_index(f"{server.url}/train", config)
    assert not isinstance(caught.value, RankError)
    assert read_all(open_index(f"{server.url}/train", config), config) == IMAGES


def test_a_url_without_a_set_is_told(server, config):
    with pytest.raises(UserError, match=rf"^{server.url}/elsewhere/manifest\.json: not found.*must be that of a split"):
        open_index(f"{server.url}/elsewhere", config)
    server.folder.joinpath("manifest.json").write_text("[]")
    with pytest.raises(UserError, match=rf"^{server.url}/manifest\.json: not a manifest"):
        open_index(server.url, config)


def test_a_server_that_is_not_there_is_told_in_one_line(config):
    with socket.socket() as listener:  # bound, and nobody listens
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/train"
        with pytest.raises(UserError, match=rf"^{url}/manifest\.json: 5 tries failed: ClientConnectorError") as caught:
            open_index(url, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["pipe:curl https://host/train-0.tar", "ftp://host/train", "file:///data/train"])
def test_other_schemes_are_refused_with_those_that_are_taken(tmp_path, capsys, url):
    line = refused([*words(tmp_path, tmp_path / "run"), "--data.train", url], capsys)
    assert f"no data is read from {url.partition(':')[0]}: URLs" in line
    assert "s3://, gs://, hf://, https:// or http://" in line
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"https://host/x: .*pip install 'ast-dist\[remote\]'"):
        RemoteFiles("https://host/x")


def test_loose_files_behind_a_url_are_refused(split, server, config, tmp_path):
    folder = with_url(split, tmp_path / "alone", f"{server.url}/train")
    write_manifest(folder, {**json.loads((folder / MANIFEST_NAME).read_text()), "layout": "files"})
    with pytest.raises(UserError, match="only shards can be fetched"):
        open_index(str(folder), config)


def test_a_cache_smaller_than_the_largest_shard_is_refused_at_the_start(server, config, tmp_path):
    small = DataConfig(shard_cache_dir=config.shard_cache_dir, shard_cache_gb=1e-6)
    with pytest.raises(UserError, match=r"shard_cache_gb allows 1,000 bytes, but the largest shard has 1\d,\d{3}"):
        open_index(f"{server.url}/train", small)


def test_a_signature_is_sent_with_every_name_and_never_shown(split, server, config):
    index = open_index(f"{server.url}/train?key=secret", config)
    assert read_all(index, config) == IMAGES
    assert {path.partition("?")[2] for path, _ in server.gets} == {"key=secret"}
    server.faults["train-000000.tar"] += ["500"] * 5
    shutil.rmtree(config.shard_cache_dir)
    reader = open_reader(index, config)
    with pytest.raises(RemoteError) as caught:
        reader.read(0)
    reader.close()
    assert "secret" not in str(caught.value)


def test_a_copy_harmed_on_the_disk_is_fetched_again(split, server, config):
    index = open_index(f"{server.url}/train", config)
    read_all(index, config)
    for copy in Path(config.shard_cache_dir, "shards").glob("*.tar"):
        data = bytearray(copy.read_bytes())
        data[int(split.offset[0]) + 20] ^= 1
        copy.write_bytes(data)
    assert read_all(index, config) == IMAGES


def test_a_sample_damaged_before_it_was_uploaded_is_damaged_and_nothing_is_fetched_again(split, server, config):
    overwrite(split, 4, b"not a JPEG")
    shards = split.manifest["shards"]
    shards[1]["sha256"] = file_sha256(split.shard_paths[1])
    write_manifest(split.root, split.manifest)
    index = open_index(f"{server.url}/train", config)
    reader = open_reader(index, config)
    for _ in range(2):
        with pytest.raises(DamagedSampleError, match="CRC-32"):
            reader.read(4)
    reader.close()
    assert server.gets_of("train-000001.tar") == 1


def test_will_need_fetches_what_is_read_next(server, config):
    index = open_index(f"{server.url}/train", config)
    reader = open_reader(index, config)
    reader.will_need(np.arange(0, 6), ahead=np.arange(6, 9))
    assert [reader.read(sample_id) for sample_id in range(9)] == IMAGES[:9]
    reader.close()
    assert sorted(path[-6:] for path, _ in server.gets if path.endswith(".tar")) == ["00.tar", "01.tar", "02.tar"]


@pytest.mark.parametrize(
    ("url", "kind", "address"),
    [
        ("s3://bucket/set/train", "S3FileSystem", "s3://bucket/set/train/manifest.json"),
        ("hf://datasets/who/set/train", "HfFileSystem", "hf://datasets/who/set/train/manifest.json"),
        ("gs://bucket/set/train", "GCSFileSystem", "gs://bucket/set/train/manifest.json"),
    ],
)
def test_each_scheme_has_its_client(url, kind, address, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # or it would look for the machine's own
    files = RemoteFiles(url)
    assert kind in {base.__name__ for base in type(files._files).__mro__}
    assert files._address(MANIFEST_NAME) == address
    assert files.url(MANIFEST_NAME) == address


def test_an_s3_server_is_read_and_its_faults_are_told(split, config, monkeypatch):
    with s3_bucket("bucket", monkeypatch) as upload:
        upload(split.root, "sets/train")
        index = open_index("s3://bucket/sets/train", config)
        assert read_all(index, config) == IMAGES
        assert index.hash == split.hash
        with pytest.raises(UserError, match=r"^s3://bucket/sets/manifest\.json: not found"):
            open_index("s3://bucket/sets", config)
        with pytest.raises(UserError, match=r"^s3://nowhere/train/manifest\.json: not found"):
            open_index("s3://nowhere/train", config)
        shutil.copytree(split.root, split.root.with_name("part"), ignore=shutil.ignore_patterns("train-000002.tar"))
        with split.root.with_name("part").joinpath("train-000003.tar").open("ab") as file:
            file.write(b"more")
        upload(split.root.with_name("part"), "sets/part")
        with pytest.raises(UserError, match=r"^s3://bucket/sets/part/train-000002\.tar: shard 3 of 4 is missing"):
            open_index("s3://bucket/sets/part", config)
        shutil.copy(split.shard_paths[2], split.root.with_name("part"))
        upload(split.root.with_name("part"), "sets/part")
        with pytest.raises(
            UserError, match=r"^s3://bucket/sets/part/train-000003\.tar: shard 4 of 4 has .* bytes, but"
        ):
            open_index("s3://bucket/sets/part", config)


def test_the_cache_lies_where_the_user_keeps_caches_or_in_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "ast_dist"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(DataConfig()) == Path(tempfile.gettempdir(), f"ast_dist-{os.getuid()}")
    assert cache_folder(DataConfig(shard_cache_dir="~/x")) == Path.home() / "x"


def test_another_rank_than_the_first_leaves_the_check_to_it(split, server, config, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    split.shard_paths[2].unlink()
    assert isinstance(open_index(f"{server.url}/train", config), Index)
