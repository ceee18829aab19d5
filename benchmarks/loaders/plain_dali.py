"""DALI's own webdataset reader on the CPU, with the operators that its documentation shows for training."""

import base64
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from benchmarks.loaders.source import MEAN, SEED, STD, Batches, Job, Source, shard_names

_CLASS_DIGITS = 8


@pipeline_def
def _pipeline(job: Job) -> Any:
    shards = shard_names(job)
    encoded, labels = fn.readers.webdataset(
        paths=shards,
        index_paths=[shard.removesuffix(".tar") + ".idx" for shard in shards],
        ext=["jpg", "cls"],
        missing_component_behavior="error",
        random_shuffle=True,
        name="reader",
    )
    images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB, num_attempts=10)
    images = fn.resize(images, size=(job.image_px, job.image_px))
    in_255 = {"mean": [255 * value for value in MEAN], "std": [255 * value for value in STD]}
    images = fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT if job.output == "float32" else types.UINT8,
        output_layout="CHW",
        mirror=fn.random.coin_flip(),
        **(in_255 if job.output == "float32" else {}),
    )
    return images, fn.pad(labels, axes=(0,), shape=(_CLASS_DIGITS,), fill_value=ord(" "))


def open_source(job: Job) -> Source:
    """An endless shuffled stream; a resumed one starts from DALI's own checkpoint."""
    saves = job.mode in ("save", "resume")
    pipeline = _pipeline(
        job,
        batch_size=job.batch_size,
        num_threads=job.workers,
        device_id=None,
        seed=SEED,
        enable_checkpointing=saves,
        checkpoint=base64.b64decode(job.state) if job.state else None,
    )
    iterator = DALIGenericIterator(
        [pipeline], ["images", "labels"], reader_name="reader", auto_reset=True, prepare_first_batch=False
    )

    def epoch() -> Batches:
        for (outputs,) in iterator:
            yield outputs["images"], outputs["labels"]

    def state() -> str:
        return base64.b64encode(iterator.checkpoints()[0]).decode()

    return Source(epoch, "DALI's checkpoint", state if saves else None)
