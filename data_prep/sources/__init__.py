"""Where images come from: one module per source, each with a function that lists its samples.

A source is `list_samples(src, split, options) -> Listing`. To add one: write the module, name it in SOURCES, and say
in `detect_format` how it is known.
"""

from collections.abc import Callable
from pathlib import Path

from ast_dist.errors import UserError
from data_prep.sources import digits, idx, ilsvrc, imagefolder, parquet, torchvision_dataset
from data_prep.sources.listing import Listing, readable
from data_prep.sources.options import SourceOptions
from data_prep.sources.tars import is_tars

SOURCES: dict[str, Callable[[str, str, SourceOptions], Listing]] = {
    "digits": digits.list_samples,
    "idx": idx.list_samples,
    "ilsvrc": ilsvrc.list_samples,
    "imagefolder": imagefolder.list_samples,
    "parquet": parquet.list_samples,
    "torchvision": torchvision_dataset.list_samples,
}


def list_samples(source: str, src: str, split: str, options: SourceOptions) -> Listing:
    """List one split of a source, with the classes that are asked for. Raises UserError."""
    for name, value in (("image", options.image_column), ("label", options.label_column)):
        if value is not None and source != "parquet":
            raise UserError(f"--{name}-column {value}: only parquet files have columns, but {src} is {source}.")
    if options.download_dir is not None and source != "torchvision":
        raise UserError(f"--download-dir {options.download_dir}: only torchvision:NAME is downloaded, not {src}.")
    with readable(src):
        return options.restrict(SOURCES[source](src, split, options))


def detect_format(src: str) -> str:
    """Name the source of `src`: the word `digits`, `torchvision:NAME`, tars (`wds`), or what a folder or file holds.

    Raises UserError when `src` is none, or cannot be read.
    """
    with readable(src):
        return _detected(src)


def _detected(src: str) -> str:
    if src == "digits":
        return "digits"
    if src.startswith(torchvision_dataset.PREFIX):
        return "torchvision"
    path = Path(src)
    if path.is_dir() and ilsvrc.locate(path):
        return "ilsvrc"
    # The archive that a folder was unpacked from often lies beside its train/ and val/ still.
    if is_tars(src) and not (path.is_dir() and imagefolder.holds_classes(path)):
        return "wds"
    if src.endswith(".parquet"):
        return "parquet"
    if not path.exists():
        raise UserError(
            f"{src}: no such folder. Name a folder with one folder of images per class, one of the other sources "
            "(--help lists them, and --format says which it is), or `digits` for the digits that come with "
            "scikit-learn."
        )
    if any(idx.find_images(path, split) for split in ("train", "val")):
        return "idx"
    if path.is_dir() and parquet.is_likely(path):
        return "parquet"
    return "imagefolder"
