"""Train, and send this process a real signal in the middle of an evaluation: RANK BATCH STEP SIGNAL, then a training's
arguments. The signal comes before batch BATCH of the first evaluation after STEP steps, on one rank alone.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from ast_dist.data.batch import Batch
from ast_dist.data.loader import Loader
from ast_dist.errors import run_command
from ast_dist.train import main
from tests.launching import steps_done

rank, batch_number, after_step, name, *words = sys.argv[1:]
whole_split = Loader.val_batches


def val_batches(self: Loader, global_batch_size: int) -> Iterator[Batch]:
    run_dir = Path(words[words.index("--run-dir") + 1])
    for number, batch in enumerate(whole_split(self, global_batch_size)):
        if self.rank == int(rank) and number == int(batch_number) and steps_done(run_dir) == int(after_step):
            os.kill(os.getpid(), signal.Signals[name])
        yield batch


Loader.val_batches = val_batches  # type: ignore[method-assign]
sys.exit(run_command(main, words))
