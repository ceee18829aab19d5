"""Claims about training on shards behind a URL."""

from pathlib import Path

import pytest

from ast_dist.errors import run_command
from ast_dist.train import main
from tests.launching import finish, start
from tests.servers import serving
from tests.shards import squares, write_split
from tests.training import NUM_SAMPLES, progress, refused, state_hash, words

# Unless given, remote shards are read in another order than local ones.
BLOCKS = ("--data.shuffle-block-shards", "4")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 shards of 4 samples, and a small split for validation."""
    write_split(tmp_path / "set/train", squares(NUM_SAMPLES, side=8), num_shards=24)
    write_split(tmp_path / "set/val", squares(20, side=8), num_shards=2)
    return tmp_path / "set"


def remote_words(url: str, run_dir: Path, cache: Path, capacity_bytes: float, *more: str) -> list[str]:
    where = ["--data.train", f"{url}/train", "--data.val", f"{url}/val", "--data.shard-cache-dir", str(cache)]
    return [*words(Path(), run_dir, *more), *where, "--data.shard-cache-gb", f"{capacity_bytes / 1e9:.12f}"]


def test_two_ranks_train_the_same_over_http_as_from_files_with_a_cache_smaller_than_the_set(
    shards: Path, tmp_path: Path
) -> None:
    more = ("--loop.epochs", "2", "--data.cache", "none", "--track.quiet", *BLOCKS)
    sizes = [path.stat().st_size for path in shards.glob("train/*.tar")]
    capacity = 12 * max(sizes)
    assert capacity < sum(sizes)
    with serving(shards) as server:
        argv = remote_words(server.url, tmp_path / "remote", tmp_path / "cache", capacity, *more)
        finish(start("-m", "ast_dist.train", *argv, world_size=2))
        assert len({path for path, _ in server.gets if path.endswith(".tar")}) == 24 + 2
    finish(start("-m", "ast_dist.train", *words(shards, tmp_path / "local", *more), world_size=2))
    assert state_hash(tmp_path / "remote") == state_hash(tmp_path / "local")
    assert sum(path.stat().st_size for path in tmp_path.glob("cache/shards/*")) <= capacity


def test_a_run_begun_over_http_goes_on_from_files(shards: Path, tmp_path: Path) -> None:
    more = ("--loop.epochs", "2", *BLOCKS)
    with serving(shards) as server:
        argv = remote_words(server.url, tmp_path / "moved", tmp_path / "cache", 1e9, *more)
        assert run_command(main, [*argv, "--session.hours", "1e-9"]) == 0
    assert progress(tmp_path / "moved")["state"] == "paused"
    assert run_command(main, words(shards, tmp_path / "moved", *more)) == 0
    assert run_command(main, words(shards, tmp_path / "whole", *more)) == 0
    assert state_hash(tmp_path / "moved") == state_hash(tmp_path / "whole")


def test_a_cache_too_small_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(shards) as server:
        line = refused(remote_words(server.url, tmp_path / "run", tmp_path / "cache", 1000), capsys)
    assert "data.shard_cache_gb allows 1,000 bytes, but the largest shard has " in line
    assert not (tmp_path / "run").exists()


def test_a_shard_that_vanishes_ends_the_run_with_its_url(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # another rank than the first: it does not look for the shards at the start
    (shards / "train/train-000007.tar").unlink()
    with serving(shards) as server:
        argv = remote_words(server.url, tmp_path / "run", tmp_path / "cache", 1e9, "--track.quiet")
        assert run_command(main, argv) == 2
        lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"error: {server.url}/train/train-000007.tar: not found. Check the URL, or upload the file."
    assert progress(tmp_path / "run")["state"] == "failed"
