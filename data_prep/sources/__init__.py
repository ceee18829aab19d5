"""Where images come from: one module per source, each with a function that lists its samples.

A source is `list_samples(src, split) -> Listing`. To add one: write the module, and name it in SOURCES.
"""

from collections.abc import Callable
from pathlib import Path

from ast_dist.errors import UserError
from data_prep.sources import digits, imagefolder
from data_prep.sources.listing import Listing
from data_prep.sources.tars import is_tars

SOURCES: dict[str, Callable[[str, str], Listing]] = {
    "digits": digits.list_samples,
    "imagefolder": imagefolder.list_samples,
}


def detect_format(src: str) -> str:
    """Name the source that `src` is: the word `digits`, WebDataset tars (`wds`), or a folder of class folders.

    Raises UserError when `src` is none of them.
    """
    if src == "digits":
        return "digits"
    if is_tars(src):
        return "wds"
    if not Path(src).exists():
        raise UserError(
            f"{src}: no such folder. Name a folder with one folder of images per class, or `digits` for the digits "
            "that come with scikit-learn."
        )
    return "imagefolder"
