"""Where our loader's time goes: CPU ms an image of its parts, in one thread: `python -m benchmarks.loader_parts TRAIN`.

TRAIN is a folder of shards. The regions at the images' edges show what a decoder that must read a JPEG from its start
cannot spare: the entropy-coded data of all rows down to the region's last.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tyro.conf import Positional, arg

from ast_dist.allocator import keep_freed_memory
from ast_dist.arguments import parse_arguments
from ast_dist.data.augment import train_crops
from ast_dist.data.decode_dali import DaliCpuDecoder
from ast_dist.data.decode_torch import TorchDecoder
from ast_dist.data.encoded import Encoded
from ast_dist.data.index import Index
from ast_dist.data.read import Reader
from ast_dist.data.resize import Box, resize_region
from ast_dist.data_config import DataConfig
from ast_dist.errors import UserError, run_command
from ast_dist.model import Normalize
from benchmarks import tables
from benchmarks.result import RESULTS, ResultFile

_ROWS, _REPEATS, _EDGE_PX = 64, 5, 16


@dataclass(frozen=True)
class Arguments:
    """Time the parts of the loader."""

    train: Annotated[Positional[Path], arg(metavar="TRAIN")]
    """Folder of shards."""
    images: int = 960
    """Samples that are read, decoded and resized in each part."""
    image_px: int = 224
    """Side of the crops, pixels."""
    out: Path = RESULTS
    """Folder of the result file."""

    def __post_init__(self) -> None:
        if self.images < 1 or self.image_px < 1:
            raise UserError(f"--images is {self.images} and --image-px {self.image_px}, but must be at least 1.")


def main(argv: list[str]) -> int:
    """Measure, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.loader_parts")
    result = ResultFile(arguments.out / "loader_parts.json", "loader_parts", "python -m benchmarks.loader_parts TRAIN")
    keep_freed_memory()
    torch.set_num_threads(1)
    index, config = Index.open(arguments.train), DataConfig(image_size=arguments.image_px)
    ids = np.resize(np.random.default_rng(0).permutation(index.num_samples), arguments.images)
    heights, widths = index.height[ids].astype(np.int64), index.width[ids].astype(np.int64)
    reader, decoder = Reader(index), DaliCpuDecoder()
    samples = [
        Encoded(reader.read(int(number)), int(number), index.key(int(number)), int(height), int(width))
        for number, height, width in zip(ids, heights, widths, strict=True)
    ]
    crops = train_crops(ids, heights, widths, 0, 0, config)
    boxes = {
        "the crop's region": [Box(*box) for box in crops.boxes.tolist()],
        "16 × 16 pixels at the lower edge": [
            Box(one.height - _EDGE_PX, one.width - _EDGE_PX, _EDGE_PX, _EDGE_PX) for one in samples
        ],
        "the whole image": [Box(0, 0, one.height, one.width) for one in samples],
    }
    images = torch.empty((_ROWS, config.image_size, config.image_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    normalize = Normalize(config, torch.device("cpu"), channels_last=True)
    parts = [slice(first, first + _ROWS) for first in range(0, len(samples), _ROWS)]

    def resize(part: slice) -> None:
        for row, (region, box, flip) in enumerate(zip(regions[part], wanted[part], crops.flips[part], strict=True)):
            assert isinstance(region, torch.Tensor)
            resize_region(region, box, box, bool(flip), images[row])

    wanted = boxes["the crop's region"]
    regions = [region for part in parts for region in decoder.regions(samples[part], wanted[part])]
    timed: dict[str, Callable[[slice], object]] = {
        "read, with CRC-32": lambda part: [reader.read(int(number)) for number in ids[part]],
        "draw the crops": lambda part: train_crops(ids[part], heights[part], widths[part], 0, 0, config),
        **{
            f"DALI decodes {name}": lambda part, chosen=chosen: decoder.regions(samples[part], chosen[part])
            for name, chosen in boxes.items()
        },
        "torchvision decodes the whole image": lambda part: TorchDecoder().regions(samples[part], wanted[part]),
        "resize and mirror": resize,
        "normalise to float32": lambda _: normalize(images),
    }
    for name, work in timed.items():
        result.add({"measure": "part", "part": name, "cpu_ms_per_image": _cpu_ms(work, parts, len(samples))})
    reader.close()
    print(tables.render_all(result.content))
    return 0


def _cpu_ms(work: Callable[[slice], object], parts: list[slice], count: int) -> float:
    """CPU time of the process an image, median of some passes after a first one."""
    spent = []
    for _ in range(1 + _REPEATS):
        began = time.process_time()
        for part in parts:
            work(part)
        spent.append(1000.0 * (time.process_time() - began) / count)
    return statistics.median(spent[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
