"""Parquet files of images as the Hugging Face Hub has them: `data/train-00000-of-00294.parquet`.

A column holds the images, encoded (`image` or `img`: a struct with `bytes`, or plain bytes), another the labels
(`label`, `labels` or `fine_label`: numbers, whose names stand in the schema's metadata, or names). Files are told
apart by their names: a file of the split starts with its name or lies in a folder of it.

Rows are packed in row groups (100 to 1,000 images), and to have one the whole group must be read. A shard in
global random order would take one row of nearly every group. So the order is random in two steps: groups are drawn,
and samples within as many groups as fill MIXED_SHARDS shards (see `plan_shards`); each shard then reads each of its
groups once and holds its own samples in memory.
"""

import errno
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ast_dist.errors import UserError
from data_prep.sources.imagefolder import subfolders
from data_prep.sources.listing import Listing, Reader, ReadMemory
from data_prep.sources.options import NO_OPTIONS, SourceOptions

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# The first of these that there is; `test` counts when it is alone, since the tests of many sets have no labels.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev", "test")}
_FOLDERS_LOOKED_INTO = 8
_BATCH_ROWS = 32
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadParquet:
    """Gives the images of parquet files below `root`; a name is a file's name and the row in it: `FILE/ROW`.

    column: the image's bytes, `image.bytes`. starts: of each file, the first row of each row group, and the end.
    """

    root: str
    column: str
    starts: dict[str, list[int]]

    def __call__(self, name: str) -> bytes:
        return self.together([name], lambda: None)(name)

    def together(self, names: Sequence[str], between: Callable[[], None]) -> Reader:
        """Read what these names need, each row group once, a few rows at a time."""
        wanted: dict[tuple[str, int], dict[int, str]] = {}
        for name in names:
            file, row = _parsed(name)
            group = int(np.searchsorted(self.starts[file], row, side="right")) - 1
            wanted.setdefault((file, group), {})[row] = name
        images: dict[str, bytes] = {}
        for (file, group), rows in sorted(wanted.items()):
            between()
            self._read_group(file, group, rows, images)
        return ReadMemory(images)

    def _read_group(self, file: str, group: int, rows: dict[int, str], images: dict[str, bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, first, missing = Path(self.root, file), self.starts[file][group], set(rows)
        try:
            with pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False) as parquet:
                for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self.column]):
                    column = batch.column(0)
                    column = column.field(0) if pa.types.is_struct(column.type) else column
                    for row in range(first, first + len(batch)):
                        if row in rows:
                            missing.discard(row)
                            images[rows[row]] = column[row - first].as_py() or b""
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise OSError(errno.EIO, _reason(error), str(path)) from None
        if missing:
            raise OSError(errno.EIO, f"row {min(missing)} is gone", str(path))


def is_likely(folder: Path) -> bool:
    """Whether a folder holds parquet files where the Hub's sets have them, found without listing it whole."""
    near = [folder, *(folder / name for name in subfolders(folder)[:_FOLDERS_LOOKED_INTO])]
    below = [path / name for path in near for names in SPLIT_NAMES.values() for name in names]
    return any(True for path in [*near, *below] for _ in path.glob("*.parquet"))


def find_files(src: str, split: str) -> list[Path]:
    """The parquet files of a split: `src` itself, what a pattern such as `data/train-*.parquet` finds, or a folder's.

    Of a pattern that finds files of several splits only this one's are taken. Raises UserError when a folder has files
    of other splits only, or such a pattern finds none of this split.
    """
    path = Path(src)
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    if not path.is_dir():
        files = sorted(path.parent.glob(path.name)) if path.suffix == ".parquet" and path.parent.is_dir() else []
        several = len({_split_name(Path(file.name)) for file in files} - {""}) > 1
        return _of_split(src, path.parent, files, split) if several else files
    return _of_split(src, path, _files_below(path), split)


def _files_below(folder: Path) -> list[Path]:
    """Sorted parquet files at any depth, hidden ones left out. Raises OSError where a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for path, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, name) for name in names if name.endswith(".parquet") and not name.startswith(".")]
    return sorted(found)


def _of_split(src: str, root: Path, files: list[Path], split: str) -> list[Path]:
    of_split: dict[str, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split_name(file.relative_to(root)), []).append(file)
    for name in SPLIT_NAMES[split]:
        if name in of_split:
            return of_split[name]
    if set(of_split) - {""}:
        raise UserError(
            f"{src}: has parquet files of {' and '.join(sorted(set(of_split) - {''}))}, but none of the split {split} "
            f"({', '.join(SPLIT_NAMES[split])}). The names of a split's files start with one of these words, or they "
            "lie in a folder of that name."
        )
    return files


def list_samples(src: str, split: str, options: SourceOptions = NO_OPTIONS) -> Listing:
    """List the rows of a split's parquet files.

    Raises UserError when pyarrow is not installed, when there is no file, when a file cannot be read, when it is not
    clear which columns hold images and labels, and when a row has no label.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("parquet: pyarrow is not installed. Install it: pip install 'ast-dist[parquet]'") from None
    files = find_files(src, split)
    if not files:
        raise UserError(
            f"{src}: no parquet file. Name the folder that holds them, a file, or 'FOLDER/train-*.parquet'."
        )
    root = Path(src) if Path(src).is_dir() else files[0].parent
    labels: list[Any] = []
    names: list[str] = []
    starts: dict[str, list[int]] = {}
    counts, sizes, stamps = [], [], []
    columns: tuple[str, str, list[str] | None] | None = None
    for path in files:
        file = str(path.relative_to(root))
        try:
            with pq.ParquetFile(path) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
                found = _columns(path, schema, options)
                values = parquet.read(columns=[found[1]]).column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({_reason(error)}). Download it again.") from None
        if columns is not None and found != columns:
            raise UserError(
                f"{path}: other columns or class names than in {files[0].name}, so they are not of one set. Name the "
                "files of one: 'FOLDER/train-*.parquet'"
            )
        columns = found
        if None in values or -1 in values:
            row = next(row for row, value in enumerate(values) if value in (None, -1))
            raise UserError(f"{path}: row {row} has no label ({values[row]}), as in a test set kept secret.")
        labels += values
        names += [f"{file}/{row}" for row in range(len(values))]
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        starts[file] = [0, *np.cumsum(rows).tolist()]
        counts += rows
        sizes += [_column_bytes(group, found[0]) // max(1, group.num_rows) for group in groups]
        stamps += [path.stat().st_mtime_ns] * len(groups)
    assert columns is not None
    if not names:
        raise UserError(f"{src}: {len(files)} parquet files, but no row in them. Download them again.")
    classes, numbers = _classes(Path(src), columns[1], labels, columns[2])
    return Listing(
        format="parquet",
        classes=classes,
        names=names,
        labels=numbers,
        sizes=np.repeat(np.asarray(sizes, np.int64), counts),
        # Another column of the same file has other bytes.
        stamps=np.repeat(np.asarray(stamps, np.int64), counts) ^ zlib.crc32(columns[0].encode()),
        read=ReadParquet(str(root), columns[0], starts),
        blocks=np.repeat(np.arange(len(counts)), counts),
    )


def _parsed(name: str) -> tuple[str, int]:
    file, _, row = name.rpartition("/")
    return file, int(row)


def _split_name(path: Path) -> str:
    """Which split a file's name, or that of a folder above it, starts with; empty when none."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    words = [part.replace("_", "-").replace(".", "-").partition("-")[0] for part in reversed(path.parts)]
    return next((word for word in words if word in known), "")


def _columns(path: Path, schema: Any, options: SourceOptions) -> tuple[str, str, list[str] | None]:
    """The column of the images' bytes, that of the labels, and the classes' names where the metadata state them."""
    import pyarrow as pa

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        features = {}
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image = _pick(path, schema.names, kinds, "image", options.image_column, IMAGE_COLUMNS, "Image")
    label = _pick(path, schema.names, kinds, "label", options.label_column, LABEL_COLUMNS, "ClassLabel")
    kind = schema.field(image).type
    is_struct = pa.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    if not (is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{path}: the column {image} holds {kind}, not encoded images. Name another: --image-column")
    kind = schema.field(label).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the column {label} holds {kind}, not one class a row. Name another: --label-column")
    names = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    return f"{image}.bytes" if is_struct else image, label, names


def _pick(
    path: Path, there: list[str], kinds: dict[str, Any], what: str, asked: str | None, usual: Sequence[str], kind: str
) -> str:
    """The column that is asked for, the one with a usual name, or the only one of its kind in the metadata."""
    if asked is not None and asked not in there:
        raise UserError(f"{path}: has no column {asked} (--{what}-column), but {', '.join(there)}.")
    candidates = [asked] if asked else [name for name in usual if name in there]
    candidates = candidates or [name for name in there if kinds.get(name) == kind]
    if not candidates or (len(candidates) > 1 and candidates[0] not in usual):
        raise UserError(
            f"{path}: it is not clear which column holds the {what}s (there are {', '.join(there)}). Name it: "
            f"--{what}-column"
        )
    return candidates[0]


def _classes(src: Path, column: str, values: list[Any], names: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Class names, and each row's class number."""
    if isinstance(values[0], str):
        present, numbers = np.unique(np.asarray(values, object), return_inverse=True)
        return [str(name) for name in present], numbers.astype(np.int32)
    numbers = np.asarray(values, np.int64)
    names = names or [str(number) for number in range(int(numbers.max()) + 1)]
    if numbers.min() < 0 or numbers.max() >= len(names):
        wrong = int(numbers.min()) if numbers.min() < 0 else int(numbers.max())
        raise UserError(f"{src}: the column {column} has the label {wrong}, but there are {len(names)} class names.")
    return names, numbers.astype(np.int32)


def _column_bytes(group: Any, column: str) -> int:
    """Bytes that a column's values take in a row group, unpacked."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
