"""WebDataset tars that are there already: which of them are a split."""

import glob
import re
from pathlib import Path

from ast_dist.errors import UserError
from data_prep.sources.imagefolder import SPLIT_FOLDERS

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tars(src: str) -> bool:
    """Whether `src` names tars: one, a pattern of some, or a folder that holds any, itself or in a split's folder."""
    path = Path(src)
    if path.is_dir():
        folders = [path, *(path / name for names in SPLIT_FOLDERS.values() for name in names)]
        return any(_tars_in(folder) for folder in folders)
    return src.endswith((".tar", *_COMPRESSED))


def find_tars(src: str, split: str) -> list[Path]:
    """The tars of one split, absolute, in the order of their names (in a pattern's own order, where it has braces).

    One tar, or a pattern as webdataset knows them (`imagenet-train-{000000..001023}.tar`, `*.tar`), is all of the
    split. In a folder these are the tars of a folder for the split, else those with the split's name in their own,
    else, where no tar is called after a split, all. Raises UserError when there are none, when some that a pattern
    names are missing, and when a tar is compressed.
    """
    path = Path(src)
    found = _in_folder(path, split) if path.is_dir() else _of_pattern(src)
    compressed = [tar for tar in found if tar.name.endswith(_COMPRESSED)]
    if compressed:
        raise UserError(
            f"{compressed[0]}: compressed ({len(compressed):,} such files), so a sample cannot be read without all "
            "before it. Unpack it to a plain .tar."
        )
    return [tar.absolute() for tar in found]


def _tars_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if path.name.endswith((".tar", *_COMPRESSED)))
    return sorted(path for path in named if not path.name.startswith(".") and path.is_file())


def _in_folder(src: Path, split: str) -> list[Path]:
    folders = {name: _tars_in(src / name) for names in SPLIT_FOLDERS.values() for name in names}
    by_split = {name: tars for name, tars in folders.items() if tars}
    here = _tars_in(src)
    if not by_split:
        for tar in here:
            for name in folders:
                if re.search(rf"(?<![a-z]){name}(?![a-z])", tar.name.lower()):
                    by_split.setdefault(name, []).append(tar)
    if not by_split:
        if here:
            return here
        raise UserError(f"{src}: no *.tar in this folder. Name a folder of tars, or a pattern of them.")
    matching = [name for name in SPLIT_FOLDERS[split] if name in by_split]
    if split in matching or len(matching) == 1:
        return by_split[split if split in matching else matching[0]]
    if matching:
        raise UserError(
            f"{src}: the tars of {' and of '.join(matching)} could both be the split {split}. Name one by a pattern: "
            f"'{by_split[matching[0]][0]}'"
        )
    raise UserError(
        f"{src}: there are tars of {' and of '.join(by_split)}, but none of the split {split} "
        f"({', '.join(SPLIT_FOLDERS[split])}). Name them by a pattern: '{src}/*.tar'"
    )


def _of_pattern(src: str) -> list[Path]:
    found, missing = [], []
    for name in _expanded(src):
        if Path(name).is_file():
            found.append(Path(name))
        elif tars := sorted(glob.glob(name)):  # noqa: PTH207 - the pattern may be absolute
            found += map(Path, tars)
        else:
            missing.append(name)
    if missing:
        more = f" ({len(missing):,} of the pattern's {len(missing) + len(found):,} are)" if found else ""
        raise UserError(f"{missing[0]}: missing{more}. Restore it, or name the tars that are there.")
    return list(dict.fromkeys(found))


def _expanded(pattern: str) -> list[str]:
    """Braces as the shell and webdataset expand them: {000..012} keeps its zeros, {a,b} are two."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if ends := _RANGE.fullmatch(inside):
        width = len(ends[1]) if ends[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        choices = inside.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in _expanded(f"{before}{choice}{after}")]
