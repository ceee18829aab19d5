"""litdata: samples as bytes in optimized chunks, decoded in the workers of its StreamingDataLoader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks.loaders.source import SEED, Job, Source
from benchmarks.loaders.transforms import decode, transform

_CHUNK_BYTES = 16 << 20


def convert(samples: list[tuple[Path, int]], folder: Path) -> None:
    """Write JPEGs and labels into a new folder of optimized chunks."""
    optimize(_sample, samples, str(folder), chunk_bytes=_CHUNK_BYTES, num_workers=2, verbose=False)


def _sample(named: tuple[Path, int]) -> dict[str, Any]:
    path, label = named
    return {"image": path.read_bytes(), "label": label}


class _Images(StreamingDataset):
    def __init__(self, decoder: str, to_output: Callable[[Any], Any], *options: Any, **more: Any) -> None:
        super().__init__(*options, **more)
        self._decoder, self._to_output = decoder, to_output

    def __getitem__(self, at: Any) -> tuple[Any, int]:
        sample = super().__getitem__(at)
        return self._to_output(decode(self._decoder, sample["image"])), sample["label"]


def open_source(job: Job) -> Source:
    """A shuffled epoch; a resumed one starts from the loader's state_dict."""
    images = _Images(
        job.decoder,
        transform(job.decoder, job.output, job.image_px),
        job.paths["litdata"],
        shuffle=True,
        seed=SEED,
    )
    loader = StreamingDataLoader(images, batch_size=job.batch_size, num_workers=job.workers, persistent_workers=True)
    if job.state:
        loader.load_state_dict(job.state)
    return Source(lambda: iter(loader), "its loader's state_dict", loader.state_dict)
