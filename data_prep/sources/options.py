"""What a person may say of a source, beside its name: which classes, which columns, where to download to."""

import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_dist.errors import UserError
from data_prep.sources.listing import Listing


@dataclass(frozen=True)
class ClassFile:
    """A file that names classes, as the lists of ImageNet-100 do: one a line.

    Blank lines and what follows a `#` at a line's start are passed over. After the class, a line may hold more
    columns, such as what people call it. lines: number and text of each line that names a class.
    """

    path: Path
    lines: list[tuple[int, str]]

    @classmethod
    def read(cls, path: Path) -> "ClassFile":
        """Read the file. Raises UserError when it cannot be read or names no class."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UserError(f"--classes {path}: cannot be read ({reason}). It holds one class a line.") from None
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
        if not lines:
            raise UserError(f"--classes {path}: names no class. It holds one class a line.")
        return cls(path, lines)

    def select(self, names: list[str]) -> list[str]:
        """Those of a source's classes that the file names, in the source's order.

        Raises UserError when the file names a class that the source does not have.
        """
        known = set(names)
        # A class may have blanks in its name, so the whole line goes before its first column.
        found = [(number, line if line in known else line.split()[0]) for number, line in self.lines]
        unknown = [(number, name) for number, name in found if name not in known]
        if unknown:
            number, name = unknown[0]
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"--classes {self.path}: line {number} names the class {name}, but SRC has no such class"
                f"{f' (it has {near[0]})' if near else ''}; {len(unknown):,} of {len(found):,} lines are not among its "
                f"{len(names):,} classes."
            )
        wanted = {name for _, name in found}
        return [name for name in names if name in wanted]


@dataclass(frozen=True)
class SourceOptions:
    """classes: take these only; None takes all. image_column, label_column: of parquet files; None finds them.

    download_dir: where torchvision's data sets lie or are downloaded to; None is the user's cache.
    """

    classes: ClassFile | None = None
    image_column: str | None = None
    label_column: str | None = None
    download_dir: Path | None = None

    def select(self, names: list[str]) -> list[str]:
        """The classes to take, in the source's order. Raises UserError where one is asked for that is not there."""
        return self.classes.select(names) if self.classes else names

    def restrict(self, listing: Listing) -> Listing:
        """The listing with the classes to take alone, numbered anew. Raises UserError as `select` does."""
        classes = self.select(listing.classes)
        if classes == listing.classes:
            return listing
        number_of = {name: number for number, name in enumerate(classes)}
        new_labels = np.asarray([number_of.get(name, -1) for name in listing.classes], np.int32)[listing.labels]
        kept = np.flatnonzero(new_labels >= 0)
        if not len(kept):
            raise UserError(
                f"--classes {self.classes.path if self.classes else ''}: SRC has no image of these classes."
            )
        names_of = dict(zip(listing.classes, listing.class_names or [], strict=False))
        return dataclasses.replace(
            listing,
            classes=classes,
            names=[listing.names[row] for row in kept.tolist()],
            labels=new_labels[kept],
            sizes=listing.sizes[kept],
            stamps=listing.stamps[kept],
            class_names=[names_of[name] for name in classes] if names_of else None,
            blocks=None if listing.blocks is None else listing.blocks[kept],
        )


NO_OPTIONS = SourceOptions()


def cache_folder() -> Path:
    """Where downloads go unless a folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ast_dist" / "torchvision"
