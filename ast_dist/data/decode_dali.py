"""Decode with NVIDIA DALI: the region of interest alone, on the CPU or on a GPU. The only module that imports DALI.

On a CPU DALI decodes a crop's region and torch resizes it: 1.3 ms an image where DALI's own resize makes it 2.0. On a
GPU all of it is DALI's: JPEG bytes, boxes and flips go in, uint8 NHWC batches come out, already on the device.

What DALI decodes otherwise than torchvision does (CMYK, PNGs and the rest of what stands in image folders) goes to
torchvision. A batch that DALI refuses is decoded again one by one, and what it refuses alone goes to torchvision, whose
word it is whether that is damaged: so the fate of a sample does not depend on its batch. Of JPEGs whose data were cut
or changed before they were indexed, DALI accepts a few that torchvision refuses; each decoder judges for itself.

Settings that matter, and why: `adjust_orientation=False`, for DALI turns EXIF images under the crop's box by default;
`jpeg_fancy_upsampling=True` makes a GPU's pixels agree with libjpeg's; `exec_dynamic=True`, since without it one
damaged image ends the pipeline for good; no `use_fast_idct`, which changes pixels.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import encode_jpeg

from ast_dist.data.decode_torch import TorchDecoder
from ast_dist.data.encoded import Encoded
from ast_dist.data.header import image_header
from ast_dist.data.read import DamagedSampleError
from ast_dist.data.resize import Box, resize_region
from ast_dist.errors import UserError

try:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import feed_ndarray
except ImportError as error:
    raise UserError(
        f"data.decoder dali: DALI cannot be imported ({error}). Install it: pip install 'ast-dist[dali]', or use "
        "--data.decoder torch."
    ) from None

_END_OF_JPEG = b"\xff\xd9"
_COMPONENTS = (1, 3)  # grey and YCbCr; decoders disagree on the colours of CMYK


class DaliRefusal(RuntimeError):
    """DALI could not decode a batch."""


class _Refusals:
    """Counts the samples that DALI refuses and torchvision decodes, and tells of them: they cost time, no samples."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    def note(self, refusal: DaliRefusal) -> None:
        with self._lock:
            self._count += 1
            count = self._count
        if count & (count - 1) == 0:  # 1, 2, 4, …: a lasting fault is told again, and does not fill the screen
            reason = " ".join(str(refusal).split())[:200]
            warnings.warn(
                f"DALI refused {count} images so far that torchvision decodes; the last one: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )


def is_for_dali(sample: Encoded) -> bool:
    """Whether DALI decodes a sample to the pixels that torchvision gives: whole JPEGs of 8 bits, grey or in colour.

    A JPEG without its end is torchvision's to refuse: DALI would fill in what is missing.
    Raises DamagedSampleError when the header states another size than the index.
    """
    try:
        header = image_header(sample.data)
    except ValueError:
        return False  # torchvision says what is wrong with it
    if (header.height, header.width) != (sample.height, sample.width):
        raise sample.wrong_size(header.height, header.width)
    is_plain = header.kind == "jpeg" and header.components in _COMPONENTS and header.bits == 8
    return is_plain and header.adobe_transform != 0 and sample.data.endswith(_END_OF_JPEG)


class DaliCpuDecoder:
    """Decodes regions on the CPU, in the thread that asks; each thread has a pipeline of its own."""

    name = "dali"

    def __init__(self) -> None:
        self._torch = TorchDecoder()
        self._own = threading.local()
        self._refusals = _Refusals()

    def regions(self, samples: Sequence[Encoded], boxes: Sequence[Box]) -> list[Tensor | DamagedSampleError]:
        """The pixels of one box of each sample; see `TorchDecoder.regions`."""
        found: list[Tensor | DamagedSampleError | None] = [None] * len(samples)
        mine: list[int] = []
        for row, sample in enumerate(samples):
            try:
                # A column alone lacks the neighbours that fancy upsampling takes chroma from.
                if is_for_dali(sample) and boxes[row].width > 1:
                    mine.append(row)
            except DamagedSampleError as error:
                found[row] = error
        refused: dict[int, DaliRefusal] = {}
        if mine:
            try:
                self._decode(samples, boxes, mine, found)
            except DaliRefusal as refusal:  # it names no sample
                for row in mine:
                    try:
                        if len(mine) == 1:
                            raise refusal
                        self._decode(samples, boxes, [row], found)
                    except DaliRefusal as error:
                        refused[row] = error
        regions = [
            self._torch.regions([samples[row]], [boxes[row]])[0] if region is None else region
            for row, region in enumerate(found)
        ]
        for row, why in refused.items():
            if not isinstance(regions[row], DamagedSampleError):
                self._refusals.note(why)
        return regions

    def try_out(self) -> None:
        """Decode two tiny JPEGs. Raises RuntimeError when DALI does not work on this machine."""
        self._run([_trial().data] * 2, [Box(0, 0, 8, 8)] * 2)

    def close(self) -> None:
        """The pipelines end with their threads."""

    def _decode(
        self,
        samples: Sequence[Encoded],
        boxes: Sequence[Box],
        rows: list[int],
        found: list[Tensor | DamagedSampleError | None],
    ) -> None:
        pixels = self._run([samples[row].data for row in rows], [boxes[row] for row in rows])
        for place, row in enumerate(rows):
            # The array keeps the memory that DALI wrote.
            found[row] = torch.from_numpy(np.asarray(pixels[place])).permute(2, 0, 1)

    def _run(self, data: list[bytes], boxes: list[Box]) -> Any:
        if len(data) > getattr(self._own, "rows", 0):
            self._own.rows = len(data)
            self._own.pipeline = _region_pipeline(len(data))
        pipeline = self._own.pipeline
        _feed(pipeline, data, boxes)
        try:
            return pipeline.run()[0]
        except RuntimeError as error:
            self._own.rows = 0  # a pipeline that has failed is not trusted with the next batch
            raise DaliRefusal(str(error)) from None


def _region_pipeline(max_rows: int) -> Any:
    pipeline = Pipeline(max_rows, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        jpeg, anchor, shape = _inputs()
        pipeline.set_outputs(_decoded(jpeg, anchor, shape, "cpu"))
    pipeline.build()
    return pipeline


def _inputs() -> tuple[Any, Any, Any]:
    """Bytes, and the box's corner and size, one of each a sample."""
    jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1, batch=True, no_copy=True)
    anchor = fn.external_source(name="anchor", dtype=types.INT64, ndim=1, batch=True)
    shape = fn.external_source(name="shape", dtype=types.INT64, ndim=1, batch=True)
    return jpeg, anchor, shape


def _feed(pipeline: Any, data: list[bytes], boxes: Sequence[Box]) -> None:
    # The decoder reads the bytes where they are: they must live until the run is over.
    pipeline.feed_input("jpeg", [np.frombuffer(encoded, np.uint8) for encoded in data])
    anchors, shapes = np.array(boxes, np.int64).reshape(-1, 2, 2).swapaxes(0, 1).copy()
    pipeline.feed_input("anchor", anchors)
    pipeline.feed_input("shape", shapes)


def _decoded(jpeg: Any, anchor: Any, shape: Any, device: str) -> Any:
    return fn.decoders.image_slice(
        jpeg,
        anchor,
        shape,
        axis_names="HW",
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        # A share of a batch for a GPU's hardware decoder would make a sample's pixels depend on its batch.
        hw_decoder_load=0.0,
    )


class DaliBatchDecoder:
    """Decodes whole batches in a pipeline, from bytes to resized and mirrored images.

    On a GPU the pixels never pass through the host: nvJPEG's hybrid decoder (`mixed`) decodes the region of interest,
    and the batch stays there. They differ from the CPU decoders' by the rounding of another inverse DCT and another
    resize. Each thread that asks has a pipeline and a stream of its own, so that two threads overlap the host's part of
    one batch with the GPU's part of another.

    device: a CUDA device; with the CPU the same pipeline runs there, for tests. threads: of DALI, on the host.
    """

    name = "dali"

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self._threads = threads
        self._torch = TorchDecoder()
        self._own = threading.local()
        self._refusals = _Refusals()

    def decode(
        self,
        samples: Sequence[Encoded | None],
        boxes: Sequence[Box],
        flips: np.ndarray,
        size: int,
        run: Callable[..., Iterable[Any]] = map,
    ) -> tuple[Tensor, list[DamagedSampleError], "torch.cuda.Event | None"]:
        """Decode a batch.

        samples: None where a row has none. boxes: inside the images. flips: (n,) bool. size: pixels a side, of this
        batch. run: as `map`, for what torchvision decodes on the host; a pool's shares it among threads.

        Returns (n, 3, size, size) uint8 in channels_last memory on the device, 0 where there is no image; the samples
        that do not decode; and the event after which the images may be used (None on a CPU).
        """
        stream = self._stream()
        # All of it on a stream of its own, memory included: on the default one it would wait for the training step.
        with torch.cuda.stream(stream):
            images = torch.zeros((len(samples), size, size, 3), dtype=torch.uint8, device=self.device)
            damaged = self._fill(images, samples, boxes, flips, run)
            event = stream.record_event() if stream is not None else None
        return images.permute(0, 3, 1, 2), damaged, event

    def try_out(self) -> None:
        """Decode two tiny JPEGs. Raises RuntimeError when DALI does not work on this machine."""
        images = torch.zeros((2, 8, 8, 3), dtype=torch.uint8, device=self.device)
        self._run(images, [_trial()] * 2, [Box(0, 0, 8, 8)] * 2, np.zeros(2, bool), [0, 1])
        self._own.pipeline = None  # this thread will not ask again

    def close(self) -> None:
        """The pipelines end with their threads."""

    def _stream(self) -> "torch.cuda.Stream | None":
        if self.device.type == "cuda" and not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        return getattr(self._own, "stream", None)

    def _fill(
        self,
        images: Tensor,
        samples: Sequence[Encoded | None],
        boxes: Sequence[Box],
        flips: np.ndarray,
        run: Callable[..., Iterable[Any]],
    ) -> list[DamagedSampleError]:
        """Decode into (n, size, size, 3); returns what is damaged."""
        damaged: list[DamagedSampleError] = []
        mine: list[int] = []
        others: list[int] = []
        for row, sample in enumerate(samples):
            try:
                if sample is not None:
                    (mine if is_for_dali(sample) else others).append(row)
            except DamagedSampleError as error:
                damaged.append(error)
        refused: dict[int, DaliRefusal] = {}
        if mine:
            try:
                self._run(images, samples, boxes, flips, mine)
            except DaliRefusal as refusal:  # see DaliCpuDecoder.regions
                for row in mine:
                    try:
                        if len(mine) == 1:
                            raise refusal
                        self._run(images, samples, boxes, flips, [row])
                    except DaliRefusal as error:
                        refused[row] = error
        size = images.shape[1]

        def on_host(row: int) -> Tensor | DamagedSampleError:
            sample = samples[row]
            assert sample is not None
            [region] = self._torch.regions([sample], [boxes[row]])
            if isinstance(region, DamagedSampleError):
                return region
            pixels = torch.empty((size, size, 3), dtype=torch.uint8)
            resize_region(region, boxes[row], boxes[row], bool(flips[row]), pixels.permute(2, 0, 1))
            return pixels

        rows = sorted([*others, *refused])
        for row, pixels in zip(rows, run(on_host, rows), strict=True):
            if isinstance(pixels, DamagedSampleError):
                damaged.append(pixels)
                continue
            images[row].copy_(pixels)
            if row in refused:
                self._refusals.note(refused[row])
        return damaged

    def _run(
        self,
        images: Tensor,
        samples: Sequence[Encoded | None],
        boxes: Sequence[Box],
        flips: np.ndarray,
        rows: list[int],
    ) -> None:
        own, stream = self._own, self._stream()
        if getattr(own, "pipeline", None) is None or len(rows) > own.max_rows:
            own.max_rows = max(len(samples), getattr(own, "max_rows", 0))
            own.pipeline = _batch_pipeline(own.max_rows, self._threads, self.device)
        pipeline, size = own.pipeline, images.shape[1]
        _feed(pipeline, [sample.data for row in rows if (sample := samples[row])], [boxes[row] for row in rows])
        pipeline.feed_input("size", np.full((len(rows), 2), size, np.float32))
        pipeline.feed_input("mirror", flips[rows].astype(np.int32))
        try:
            decoded = pipeline.run()[0].as_tensor()
        except RuntimeError as error:
            own.pipeline = None
            raise DaliRefusal(str(error)) from None
        is_whole = len(rows) == len(samples)
        target = images if is_whole else torch.empty_like(images[: len(rows)])
        feed_ndarray(decoded, target, cuda_stream=stream)
        if not is_whole:
            images[rows] = target
        if stream is not None:
            stream.synchronize()  # DALI's buffer is its own again when `decoded` is gone


def _batch_pipeline(max_rows: int, threads: int, device: torch.device) -> Any:
    is_gpu = device.type == "cuda"
    pipeline = Pipeline(
        max_rows,
        num_threads=threads,
        device_id=device.index or 0 if is_gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        jpeg, anchor, shape = _inputs()
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1, batch=True)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0, batch=True)
        image = _decoded(jpeg, anchor, shape, "mixed" if is_gpu else "cpu")
        image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(image, horizontal=mirror))
    pipeline.build()
    return pipeline


def _trial() -> Encoded:
    grey = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    return Encoded(bytes(encode_jpeg(grey).numpy()), 0, "trial", 16, 16)
