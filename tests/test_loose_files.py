"""Loose files in place: the batches that shards of the same images give, though no size is known before a read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_dist.data.index import FIELDS, Index, write_index, write_manifest
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.data_config import DataConfig
from tests.shards import photos, write_split

COUNT = 24
CONFIG = DataConfig(image_size=20, crop="resized", threads=2, prefetch_batches=2, cache="none")


def write_files(folder: Path, images: list[bytes], known_sizes: bool = False) -> Index:
    """Files of one split beside an index that knows their names and labels, as train_cls.txt does."""
    (folder / "files").mkdir(parents=True)
    names = [f"class-{number % 10}/{number:03d}.JPEG" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        path = folder / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    fields = {name: np.zeros(len(images)) for name in FIELDS}
    fields["label"] = np.arange(len(images)) % 10
    if known_sizes:
        fields["size"] = np.array([len(image) for image in images])
    root = folder / "index-of-files"
    root.mkdir()
    write_index(root, fields, [name.encode() for name in names])
    write_manifest(
        root,
        {
            "format_version": 2,
            "layout": "files",
            "data_root": str(folder / "files"),
            "num_samples": len(images),
            "classes": [f"class-{number}" for number in range(10)],
            "shards": [],
        },
    )
    return Index.open(root)


@pytest.fixture
def images():
    return photos(COUNT)


def batches_of(index, config=CONFIG):
    loader = Loader(index, config, 0, 1)
    try:
        plan = Plan(epoch_order(COUNT, 0, 1))
        return [*loader.train_batches(plan, 7, 0, 1), *loader.val_batches(10)]
    finally:
        loader.close()


@pytest.mark.parametrize("decoder", ["torch", "dali"])
def test_loose_files_give_the_batches_of_shards(tmp_path, images, decoder):
    config = replace(CONFIG, decoder=decoder)
    expected = batches_of(write_split(tmp_path / "train", images), config)
    for ours, theirs in zip(batches_of(write_files(tmp_path / "loose", images), config), expected, strict=True):
        assert torch.equal(ours.images, theirs.images) and not ours.damaged
        assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.ids, theirs.ids)


def test_a_file_that_is_gone_or_no_image_is_a_damaged_sample_that_is_named(tmp_path, images):
    index = write_files(tmp_path, images)
    (tmp_path / "files" / index.key(3)).unlink()
    (tmp_path / "files" / index.key(5)).write_bytes(b"no image")
    batches = batches_of(index)
    named = sorted(text for batch in batches[:4] for text in batch.damaged)
    assert len(named) == 2
    assert any("class-3/003.JPEG" in text and "No such file" in text for text in named)
    assert any("class-5/005.JPEG" in text and "does not decode" in text for text in named)
    trained = [sample_id for batch in batches[:4] for sample_id in batch.ids[batch.is_active].tolist()]
    assert sorted(trained) == [number for number in range(COUNT) if number not in (3, 5)]


def test_a_file_of_another_size_than_the_index_states_is_damaged(tmp_path, images):
    index = write_files(tmp_path, images, known_sizes=True)
    path = tmp_path / "files" / index.key(3)
    path.write_bytes(path.read_bytes() + b"\0")
    [text] = [text for batch in batches_of(index)[:4] for text in batch.damaged]
    assert f"{path.stat().st_size:,} bytes, but the index states {len(images[3]):,}" in text


def test_a_cache_does_not_ask_for_sizes_that_are_not_known(tmp_path, images):
    """Auto keeps none, since it cannot know that they are alike; asked for, it says so."""
    index = write_files(tmp_path, images)
    loader = Loader(index, replace(CONFIG, cache="auto"), 0, 1)
    assert loader.cache is None
    loader.close()
    with pytest.raises(Exception, match=r"data\.cache ram needs images of one known size"):
        Loader(index, replace(CONFIG, cache="ram"), 0, 1)
