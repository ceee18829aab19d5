"""Tiny splits for tests: WebDataset shards with their index, written in a few milliseconds."""

import contextlib
import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image, encode_jpeg

from ast_dist.data.index import FIELDS, FORMAT_VERSION, Index, field_path, write_index, write_manifest


def jpeg(height: int, width: int, seed: int) -> bytes:
    """A smooth, colourful image, as a JPEG."""
    generator = torch.Generator().manual_seed(seed)
    small = 255 * torch.rand((1, 3, 4, 5), generator=generator)
    image = interpolate(small, (height, width), mode="bilinear", align_corners=False)[0].to(torch.uint8)
    return bytes(encode_jpeg(image, quality=90).numpy())


def photos(count: int = 60) -> list[bytes]:
    """Images of varying size, 30 to 90 pixels a side."""
    rng = np.random.default_rng(0)
    return [jpeg(int(h), int(w), number) for number, (h, w) in enumerate(rng.integers(30, 91, (count, 2)))]


def squares(count: int = 60, side: int = 16) -> list[bytes]:
    """Images of one size."""
    return [jpeg(side, side, number) for number in range(count)]


def write_split(folder: Path, images: Sequence[bytes], num_shards: int = 3, num_classes: int = 10) -> Index:
    """Write a finished split and open it. Sample i is images[i], has the label i % num_classes and the key 000000i-x.

    The split has what training reads: tars, index and manifest (no DALI index).
    """
    folder.mkdir(parents=True)
    rows: dict[str, list[int]] = {name: [] for name in FIELDS}
    shards = []
    for number, ids in enumerate(np.array_split(np.arange(len(images)), num_shards)):
        path = folder / f"{folder.name}-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample_id in ids.tolist():
                label = sample_id % num_classes
                _add(tar, f"{sample_id:07d}-x.cls", str(label).encode())
                offset = _add(tar, f"{sample_id:07d}-x.jpg", images[sample_id])
                height, width = _size(images[sample_id])
                row = (number, offset, len(images[sample_id]), label, height, width, zlib.crc32(images[sample_id]))
                for name, value in zip(FIELDS, row, strict=True):
                    rows[name].append(value)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"name": path.name, "bytes": path.stat().st_size, "samples": len(ids), "sha256": digest})
    keys = np.array([f"{sample_id:07d}-x".encode() for sample_id in range(len(images))])
    write_index(folder, {name: np.array(values) for name, values in rows.items()}, keys)
    classes = [f"class-{number}" for number in range(num_classes)]
    manifest = {"format_version": FORMAT_VERSION, "num_samples": len(images), "classes": classes, "shards": shards}
    write_manifest(folder, manifest)
    return Index.open(folder)


def overwrite(index: Index, sample_id: int, data: bytes) -> None:
    """Put other bytes where a sample's begin, in its shard; the index stays as it is."""
    with index.shard_paths[int(index.shard[sample_id])].open("r+b") as shard:
        shard.seek(int(index.offset[sample_id]))
        shard.write(data)


def restate(index: Index, name: str, sample_id: int, value: int) -> Index:
    """Change one value of a field in the index, and open the split anew."""
    array = np.load(field_path(index.root, name))
    array[sample_id] = value
    np.save(field_path(index.root, name), array)
    return Index.open(index.root)


def open_shards(index: Index) -> int:
    """How many of a split's files this process holds open, by Linux's list."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the list itself was open while it was read
            links.append(entry.readlink())
    return sum(link.parent == index.root for link in links)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file to a tar; returns the offset of its first byte."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset


def _size(image: bytes) -> tuple[int, int]:
    pixels = decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return pixels.shape[1], pixels.shape[2]
