"""WebDataset tars that are there already: which of them are a split."""

import glob
import re
from pathlib import Path

from ast_dist.errors import UserError
from data_prep.sources.imagefolder import SPLIT_FOLDERS
from data_prep.sources.listing import readable

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
    split, but of a pattern that finds tars of several splits only this one's are taken. In a folder these are the tars
    of a folder for the split, else those with the split's name in their own, else, where no tar is called after a
    split, all. Raises UserError when there are none, when some that a pattern names are missing, when links lead
    nowhere, and when a tar is compressed.
    """
    with readable(src):
        return _found(src, split)


def _found(src: str, split: str) -> list[Path]:
    path = Path(src)
    found = _in_folder(path, split) if path.is_dir() else _of_pattern(src, split)
    if dead := [tar for tar in found if not tar.exists()]:
        raise UserError(
            f"{dead[0]}: a link that leads nowhere ({len(dead):,} of {len(found):,} tars are). Restore what it points "
            "to, or remove it."
        )
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
    # Links that lead nowhere are among them, so that they are not passed over in silence.
    return sorted(path for path in named if not path.name.startswith(".") and not path.is_dir())


def _in_folder(src: Path, split: str) -> list[Path]:
    folders = {name: _tars_in(src / name) for names in SPLIT_FOLDERS.values() for name in names}
    by_split = {name: tars for name, tars in folders.items() if tars}
    here = _tars_in(src)
    if not by_split:
        by_split = _by_split(here)
    if not by_split:
        if here:
            return here
        raise UserError(f"{src}: no *.tar in this folder. Name a folder of tars, or a pattern of them.")
    return _of_split(src, by_split, split)


def _by_split(tars: list[Path], with_folders: bool = False) -> dict[str, list[Path]]:
    """Tars by the splits that their names hold, or those of their folders; tars that name none are left out."""
    known = [name for names in SPLIT_FOLDERS.values() for name in names]
    by_split: dict[str, list[Path]] = {}
    for tar in tars:
        named = [name for name in known if re.search(rf"(?<![a-z]){name}(?![a-z])", tar.name.lower())]
        if not named and with_folders and tar.parent.name in known:
            named = [tar.parent.name]
        for name in named:
            by_split.setdefault(name, []).append(tar)
    return by_split


def _of_split(src: Path | str, by_split: dict[str, list[Path]], split: str) -> list[Path]:
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
        f"({', '.join(SPLIT_FOLDERS[split])}). The tars of a split have one of these words in their names, or lie in "
        "a folder of that name."
    )


def _of_pattern(src: str, split: str) -> list[Path]:
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
    found = list(dict.fromkeys(found))
    by_split = _by_split(found, with_folders=True)
    return _of_split(src, by_split, split) if len(by_split) > 1 else found


def _expanded(pattern: str) -> list[str]:
    """Braces as the shell and webdataset expand them: {000..012} keeps its zeros, {a,b} are two."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if ends := _RANGE.fullmatch(inside):
        width = len(ends[1]) if ends[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
        if not choices:
            raise UserError(f"{pattern}: {match[0]} counts down, so it names no tar. Write the smaller number first.")
    else:
        choices = inside.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in _expanded(f"{before}{choice}{after}")]
