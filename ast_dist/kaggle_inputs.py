"""What is attached to a Kaggle session: data sets by their marker folders, and runs by their checkpoints.

Names and depths of the folders below /kaggle/input have changed (`<slug>`, `datasets/<user>/<slug>`,
`competitions/<slug>`, `notebooks/<user>/<slug>`), so nothing here goes by them:

    a shard set   train/ and val/, each with manifest.json and index/
    ImageNet      ILSVRC/Data/CLS-LOC with train/ and val/, and its two lists beside ILSVRC
    a run         config.yaml and checkpoints/step-…

Needs no torch.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ast_dist.data.index import MANIFEST_NAME, read_manifest
from ast_dist.errors import UserError
from ast_dist.fault.commit import committed
from ast_dist.run_dir import is_aside

SPLITS = ("train", "val")
LISTS = ("LOC_synset_mapping.txt", "LOC_val_solution.csv")
_IMAGES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
# Data sets and outputs of notebooks lie two or three folders deep, and what they hold a few more.
_DEEPEST = 8
# A folder with more folders than this holds classes: ImageNet's would take minutes to walk through.
_MOST_FOLDERS = 256
_NAMED = 3


@dataclass(frozen=True)
class DataSet:
    """A data set that can be trained on.

    kind: "index" is one of images in place that the user named. folder: holds train/ and val/, or, of ImageNet, the
    folder ILSVRC/Data/CLS-LOC. manifests: SHA-256 of each split's manifest, by split; empty where there is no index
    yet. num_train: images, 0 where unknown.
    """

    kind: Literal["shards", "imagenet", "index"]
    folder: Path
    num_train: int = 0
    manifests: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind == "imagenet":
            return f"{self.folder} (ImageNet's folders)"
        of = "shards" if self.kind == "shards" else "an index of files"
        return f"{self.folder} ({of}, {self.num_train:,} training images)"


@dataclass
class Found:
    """What lies below some folders.

    indexes: folders with the indexes of files in place, which are no data by themselves. unusable: what looks like
    data and cannot be trained on, with the reason.
    """

    data_sets: list[DataSet] = field(default_factory=list)
    indexes: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def look(root: Path) -> Found:
    """Find data sets, indexes and runs below a folder, in the order of their paths; an absent folder has none."""
    found = Found()
    _walk(root, 0, found)
    return found


def _walk(folder: Path, depth: int, found: Found) -> None:
    """Walk down, but neither into what is known, nor into folders of classes, nor into hidden ones."""
    if _note(folder, found) or depth >= _DEEPEST:
        return
    try:
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return
    if len(below) <= _MOST_FOLDERS:
        for name in below:
            _walk(folder / name, depth + 1, found)


def _note(folder: Path, found: Found) -> bool:
    """Take in what a folder is; whether it is anything."""
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        # One that was moved aside, by --resume never for instance, was meant to be over.
        if committed(folder / "checkpoints") and not is_aside(folder.name):
            found.runs.append(folder)
        return True
    if all((folder / split / MANIFEST_NAME).is_file() and (folder / split / "index").is_dir() for split in SPLITS):
        _note_set(folder, found)
        return True
    if (folder / MANIFEST_NAME).is_file() and (folder / "index").is_dir():
        found.unusable.append(f"{folder} (one split of shards, but train/ and val/ must lie in one folder)")
        return True
    for below in _IMAGES:
        if all((folder / below / split).is_dir() for split in SPLITS):
            beside = [folder, *([folder / "ILSVRC"] if below == _IMAGES[0] else [])]
            whole = [place for place in beside if all((place / name).is_file() for name in LISTS)]
            if whole:
                found.data_sets.append(DataSet("imagenet", whole[0]))
            else:
                found.unusable.append(
                    f"{folder / below} (ImageNet's folders without {' and '.join(LISTS)} beside them)"
                )
            return True
    return False


def _note_set(folder: Path, found: Found) -> None:
    try:
        read = {split: read_manifest(folder / split) for split in SPLITS}
    except (UserError, OSError) as error:
        found.unusable.append(f"{folder} ({error})")
        return
    train = read["train"][0]
    if train.get("layout") == "files":
        found.indexes.append(folder)
        return
    for split, (manifest, _) in read.items():
        shards = manifest["shards"]
        if shards and Path(manifest.get("data_root", folder / split), shards[0]["name"]).is_dir():
            found.unusable.append(
                f"{folder} (its tars were unpacked, as happens to tars that are uploaded; attach the output of the "
                "notebook that made the shards)"
            )
            return
    hashes = {split: digest for split, (_, digest) in read.items()}
    found.data_sets.append(DataSet("shards", folder, train["num_samples"], hashes))


def choose(data_sets: Sequence[DataSet], trained_on: Collection[str]) -> tuple[DataSet | None, list[DataSet]]:
    """The data set to train on, and the others, best first.

    The one that a run found here was trained on comes first, then shards before ImageNet's folders, then the one with
    more training images, then the first by path. trained_on: SHA-256 of the training manifests of those runs.
    """

    def rank(candidate: DataSet) -> tuple[bool, bool, int, Path]:
        is_known = candidate.manifests.get("train") in trained_on
        return not is_known, candidate.kind != "shards", -candidate.num_train, candidate.folder

    ranked = sorted(data_sets, key=rank)
    return (ranked[0], ranked[1:]) if ranked else (None, [])


def index_as_data(folder: Path) -> DataSet:
    """An index of files in place, by itself. Raises UserError where it cannot be read."""
    read = {split: read_manifest(folder / split) for split in SPLITS}
    hashes = {split: digest for split, (_, digest) in read.items()}
    return DataSet("index", folder, read["train"][0]["num_samples"], hashes)


def no_data(root: Path, found: Found, at_work: Sequence[DataSet] = ()) -> UserError:
    """What to tell where there is no data set. at_work: those that lie where nobody looks for one."""
    unusable = f" Not usable: {'; '.join(found.unusable[:_NAMED])}." if found.unusable else ""
    remedy = "Attach one by Add Input, or name its folder by data_dir."
    if at_work:
        remedy = f"There is {at_work[0]}: to train on it, give data_dir='{at_work[0].folder}'."
    return UserError(
        f"{root}: no data set is attached: neither shards (train/ and val/, each with manifest.json and index/) nor "
        f"ImageNet (ILSVRC/Data/CLS-LOC, {' and '.join(LISTS)}).{unusable} {remedy}"
    )


def imagenet_name(folder: Path) -> str:
    """A name for the index of ImageNet's folders, the same for the same lists and classes, wherever they lie."""
    digest = hashlib.sha256()
    for name in LISTS:
        digest.update((folder / name).read_bytes())
    with os.scandir(_images(folder) / "train") as entries:
        digest.update("\n".join(sorted(entry.name for entry in entries)).encode("utf-8", "surrogateescape"))
    return f"imagenet-{digest.hexdigest()[:12]}"


def _images(folder: Path) -> Path:
    return next(path for below in _IMAGES if (path := folder / below).is_dir())


class ImagenetIndex:
    """The index of ImageNet's folders: some 100 MB, from which the images are read where they are mounted.

    folder: holds ILSVRC. working, temp: folders that last and that end with the session. The index names the images
    through a link in temp, which every session makes anew: so a mount that moves does not change the index, by which a
    run knows its data.
    """

    def __init__(self, folder: Path, working: Path, temp: Path) -> None:
        self._source = folder
        self.name = imagenet_name(folder)
        self.folder = working / "index" / self.name
        self._link = temp / self.name

    def find(self, indexes: Sequence[Path]) -> Path | None:
        """The folder that has this index already: working's, or that of a former output. indexes: what was found."""
        return next((path for path in [self.folder, *indexes] if self._fits(path)), None)

    def make(self, indexes: Sequence[Path], tell: Callable[[str], None]) -> Path:
        """Have the index in /kaggle/working, and return its folder. Copies no image. Raises UserError."""
        self._link.parent.mkdir(parents=True, exist_ok=True)
        self._link.unlink(missing_ok=True)
        self._link.symlink_to(self._source.absolute())
        there = self.find(indexes)
        if there is None:
            for split in SPLITS:
                if not (self.folder / split / MANIFEST_NAME).is_file():
                    _make_split(self._link, self.folder, split, tell)
        elif there != self.folder:
            # As a whole or not at all: half an index would be taken for one that somebody else left there.
            draft = self.folder.with_name(f".copying-{self.name}")
            shutil.rmtree(draft, ignore_errors=True)
            copy_folder(there, draft)
            shutil.rmtree(self.folder, ignore_errors=True)
            draft.rename(self.folder)
        return self.folder

    def _fits(self, index: Path) -> bool:
        if index.name != self.name:
            return False
        try:
            roots = [Path(read_manifest(index / split)[0].get("data_root", "")) for split in SPLITS]
        except (UserError, OSError):
            return False
        return all(root.is_relative_to(self._link.absolute()) for root in roots)


def _make_split(source: Path, folder: Path, split: str, tell: Callable[[str], None]) -> None:
    tell(f"index      {split}: listing the images of {source.resolve()}; this takes minutes, once")
    command = [sys.executable, "-m", "data_prep.make_shards", str(source), str(folder), "--split", split]
    ended = subprocess.run([*command, "--index-only"], capture_output=True, text=True, check=False)
    for line in ended.stdout.splitlines():
        tell(f"           {line}")
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        raise UserError(lines[-1].removeprefix("error: ").replace(str(source), str(source.resolve())))


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder and of those below it, without their modes: what is attached is read-only."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
