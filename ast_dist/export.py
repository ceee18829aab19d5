"""Write a run's weights to one file that needs neither the run nor its data nor this package.

Usage: `python -m ast_dist.export RUN --to model.safetensors`

The suffix decides: `.safetensors` for the safetensors library, `.pt` or `.pth` for torch.load(weights_only=True). The
same checkpoint gives the same bytes. A training that goes on in RUN is not disturbed: checkpoints are only read.
"""

import io
import json
import struct
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from ast_dist.data.index import replaced_file, sync_folder
from ast_dist.errors import UserError, run_command
from ast_dist.weights import Weights, described, load_weights, weights_parser

PROG = "python -m ast_dist.export"
SUFFIXES = (".safetensors", ".pt", ".pth")


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError, in one line, for what the user can mend."""
    parser = weights_parser(PROG, "Write a run's weights to one file.")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help=f"the file: {', '.join(SUFFIXES)}")
    parser.add_argument("--data.train", dest="train", type=Path, metavar="DIR", help="for runs without classes.json")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    found = parser.parse_args(list(argv))
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    check_target(found.to, found.overwrite)
    source = load_weights(found.run, found.checkpoint, found.weights, found.train)
    size = write(source, found.to)
    about = source.about
    acc1 = "not evaluated" if about["val_acc1"] is None else f"val top-1 {about['val_acc1']:.2f} %"
    print(f"{found.to}: {size:,} bytes, {described(about)}, {acc1}")
    return 0


def check_target(path: Path, overwrite: bool) -> None:
    """Judge whether the file can be written there. Raises UserError; changes nothing."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--to {path}: the suffix says what is written; use one of {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise UserError(f"--to {path}: there is no folder {path.parent}. Make it, or name another file.")
    if path.is_dir():
        raise UserError(f"--to {path}: this is a folder. Name a file.")
    if path.exists() and not overwrite:
        raise UserError(f"--to {path}: exists. Name another file, or add --overwrite.")


def write(source: Weights, path: Path) -> int:
    """Write the file, which appears complete or not at all. Returns its bytes.

    Raises UserError where the disk refuses; a file that stood there before then still does.
    """
    content = _safetensors(source) if path.suffix == ".safetensors" else _pickled(source)
    try:
        with replaced_file(path) as file:
            file.write(content)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"--to {path}: {len(content):,} bytes cannot be written ({error.strerror}). Name another place."
        ) from None
    return len(content)


def _safetensors(source: Weights) -> bytes:
    """The safetensors file. Its metadata are strings: JSON, but for `format`, which other libraries look for."""
    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in source.about.items()}
    raw = safetensors.torch.save(source.tensors, {"format": "pt", **about})
    # The library writes the metadata in another order each time (0.8): sorted, the same weights give the same bytes.
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def _pickled(source: Weights) -> bytes:
    """What torch.save writes: the weights under "model", the rest as it is, under its own keys."""
    buffer = io.BytesIO()  # torch.save puts a file's name into the file
    torch.save({"model": source.tensors, **source.about}, buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
