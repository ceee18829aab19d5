"""Train as the command does and count, beside the ledger, what this process really did.

`torchrun … -m tests.ledger_program OUT TRAIN_WORDS…` leaves OUT/rank-R.json. Counted are, of the training split:

- read: preads on the shards' files.
- decoded: images of which DALI's decoder gave a region, or torchvision's the whole.
- forwarded: rows that entered the model in training mode. Rows that only fill a batch up (padding, damaged samples)
  are copies of another row, or black where a rank has no sample: only distinct rows with a picture on them count.
- backwarded: rows whose gradient came back to the model's output; what fills up carries no loss, so theirs is zero.
- scored: rows that entered the model in evaluation mode while a batch was scored, counted as those forwarded.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ast_dist.train
import ast_dist.trainer
from ast_dist.data import decode_torch
from ast_dist.data.decode_dali import DaliCpuDecoder
from ast_dist.errors import run_command
from ast_dist.step import TrainStep

SetAttribute = Callable[[Any, str, Any], Any]


class Counts:
    """Counts of one training, put in by replacing what it calls; threads may count at once."""

    def __init__(self, train: Path, set_attribute: SetAttribute) -> None:
        self._train = train
        self._shards = b"".join(path.read_bytes() for path in sorted(train.glob("*.tar")))
        self._seen: list[tuple[str, int]] = []
        self._is_scoring = False
        self._pread = os.pread
        self._decode_image = decode_torch.decode_image
        set_attribute(os, "pread", self._read)
        set_attribute(decode_torch, "decode_image", self._decode)
        self._run_dali = DaliCpuDecoder._run
        set_attribute(DaliCpuDecoder, "_run", lambda decoder, data, boxes: self._decode_regions(decoder, data, boxes))
        set_attribute(ast_dist.trainer, "TrainStep", self._make_step)

    def total(self) -> "Counter[str]":
        """What was counted so far."""
        total: Counter[str] = Counter()
        for what, count in list(self._seen):
            total[what] += count
        return total

    def _read(self, file: int, size: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{file}").readlink().parent == self._train:
            self._seen.append(("read", 1))
        return self._pread(file, size, offset)

    def _decode(self, data: Tensor, **options: Any) -> Tensor:
        image = self._decode_image(data, **options)
        if bytes(data.numpy()) in self._shards:
            self._seen.append(("decoded", 1))
        return image

    def _decode_regions(self, decoder: DaliCpuDecoder, data: list[bytes], boxes: Any) -> Any:
        regions = self._run_dali(decoder, data, boxes)
        self._seen.extend(("decoded", 1) for encoded in data if encoded in self._shards)
        return regions

    def _make_step(self, *arguments: Any) -> TrainStep:
        """The real step, with a hook on the real model once the trial passes of its start are over."""
        step = TrainStep(*arguments)
        step.module.register_forward_hook(self._forward)
        score_batch = step.score_batch

        def scoring(batch: Any) -> Tensor:
            self._is_scoring = True
            try:
                return score_batch(batch)
            finally:
                self._is_scoring = False

        step.score_batch = scoring  # type: ignore[method-assign]
        return step

    def _forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if module.training or self._is_scoring:  # else it is an evaluation
            rows = torch.unique(inputs[0].flatten(2), dim=0)
            pictures = int((rows.amax(dim=2) > rows.amin(dim=2)).any(dim=1).sum())
            self._seen.append(("scored" if self._is_scoring else "forwarded", pictures))
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self._seen.append(("backwarded", int((gradient != 0).any(dim=1).sum())))


def main(out: Path, argv: list[str]) -> int:
    """Train, then write this rank's counts."""
    counts = Counts(Path(argv[argv.index("--data.train") + 1]), setattr)
    code = run_command(ast_dist.train.main, argv)
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(counts.total()))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
