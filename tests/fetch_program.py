"""Reads every sample of a split behind a URL through the shard cache, and prints the SHA-256 of them all."""

import hashlib
import sys

from ast_dist.data import shard_cache
from ast_dist.data.remote import open_index, open_reader
from ast_dist.data_config import DataConfig


def main(url: str, folder: str, piece_bytes: str) -> None:
    shard_cache.PIECE_BYTES = int(piece_bytes)
    config = DataConfig(shard_cache_dir=folder)
    index = open_index(url, config)
    reader = open_reader(index, config)
    digest = hashlib.sha256()
    for sample_id in range(index.num_samples):
        digest.update(reader.read(sample_id))
    reader.close()
    print(digest.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
