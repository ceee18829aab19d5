"""mosaicml-streaming: samples as bytes in MDS shards, decoded in the workers of its StreamingDataLoader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from benchmarks.loaders.source import SEED, Job, Source
from benchmarks.loaders.transforms import decode, transform

_SHARD_BYTES = 16 << 20


def convert(samples: list[tuple[Path, int]], folder: Path) -> None:
    """Write JPEGs and labels into a new MDS folder."""
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit=_SHARD_BYTES) as writer:
        for path, label in samples:
            writer.write({"image": path.read_bytes(), "label": label})


class _Images(StreamingDataset):
    def __init__(self, decoder: str, to_output: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(**options)
        self._decoder, self._to_output = decoder, to_output

    def __getitem__(self, at: Any) -> tuple[Any, int]:
        sample = super().__getitem__(at)
        return self._to_output(decode(self._decoder, sample["image"])), sample["label"]


def open_source(job: Job) -> Source:
    """A shuffled epoch; a resumed one starts from the loader's state_dict."""
    clean_stale_shared_memory()
    images = _Images(
        job.decoder,
        transform(job.decoder, job.output, job.image_px),
        local=job.paths["mds"],
        shuffle=True,
        shuffle_seed=SEED,
        batch_size=job.batch_size,
    )
    loader = StreamingDataLoader(images, batch_size=job.batch_size, num_workers=job.workers, persistent_workers=True)
    if job.state:
        loader.load_state_dict(job.state)
    return Source(lambda: iter(loader), "its loader's state_dict", loader.state_dict)
