"""DALI's index of a WebDataset shard (the format of its wds2idx tool, v1.2).

The first line is `v1.2 N`, N the number of samples. Then one line a sample, with four words for each of its files, in
the order of the tar: extension, offset of the file's first byte, size in bytes, name in the tar.
Source: tools/wds2idx.py of NVIDIA DALI 2.4.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Member(NamedTuple):
    """One file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part: files with equal keys are one sample."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows that dot."""
        return self.name[len(self.key) + 1 :]


def dali_index(members: Iterable[Member]) -> str:
    """The text of the .idx file for a shard's members, in the order of the tar."""
    samples: list[tuple[str, list[str]]] = []
    for member in members:
        if not samples or samples[-1][0] != member.key:
            samples.append((member.key, []))
        samples[-1][1].append(f"{member.extension} {member.offset} {member.size} {member.name}")
    return "".join([f"v1.2 {len(samples)}\n", *(f"{' '.join(files)}\n" for _, files in samples)])
