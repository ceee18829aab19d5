"""What each rank of test_candidates does: `torchrun … tests/candidates_program.py SHARDS OUT` leaves OUT/rank-R.pt.

The real trainer, but for the scores: they are made up and depend on the sample alone, where those of a model differ
in their last bits between numbers of ranks.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_dist.command_line import parse
from ast_dist.data.batch import Batch
from ast_dist.data.index import Index
from ast_dist.data.order import Plan, epoch_order
from ast_dist.distributed import World
from ast_dist.gate.policy import RememberingPolicy
from ast_dist.trainer import Trainer
from tests.training import words

NUM_SAMPLES = 220
GLOBAL_BATCH_SIZE = 24
EPOCHS = 2
DAMAGED = (5, 90)
# skewed: the samples at even places of the order score high, and at two ranks rank 0 reads them all.
SCENARIOS = ("online", "selective_backprop", "skewed")


class EvenIds(RememberingPolicy):
    """A user's own policy: trains even ids, and remembers."""

    def scores_epoch(self, epoch: int) -> bool:
        return True

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        return Plan(order)

    def select(self, ids: Tensor, scores: Tensor) -> Tensor:
        return (ids % 2 == 0).float()


class EveryId(EvenIds):
    """Another that scores and selects all the same."""

    def select(self, ids: Tensor, scores: Tensor) -> Tensor:
        return torch.ones(len(ids))


def scores_of(scenario: str, ids: np.ndarray, epoch: int) -> np.ndarray:
    """Made-up scores of samples, (n,) float32; every 29th is NaN."""
    scores = np.sin(ids * (1.7 + epoch)) + 1.001
    if scenario == "skewed":
        place = np.argsort(epoch_order(NUM_SAMPLES, 0, epoch))
        scores = np.where(place[ids] % 2 == 0, 5.0 + scores, 1e-3 * scores)
    return np.where(ids % 29 == 3, np.nan, scores).astype(np.float32)


def arguments(shards: Path, run_dir: Path, scenario: str, *more: str) -> list[str]:
    """Of the training of a scenario."""
    return [
        *words(shards, run_dir, "--loop.epochs", str(EPOCHS), "--loop.global-batch-size", str(GLOBAL_BATCH_SIZE)),
        *("--gate.policy", "online" if scenario == "skewed" else scenario, "--gate.target-rate", "0.4"),
        *("--gate.warmup-epochs", "0", "--gate.anneal-share", "0", "--gate.weight-cap", "3"),
        *("--data.auto-augment", "randaugment", "--data.color-jitter", "0.4", "0.4", "0.4", "0.1"),
        *("--data.erase-share", "0.5"),
        *("--data.damaged-limit", "0.01", "--loop.eval-every-epochs", "9", "--gate.loss-history", "100"),
        *more,
    ]


def run(world: World, shards: Path, run_dir: Path, scenario: str, *more: str) -> dict[str, Any]:
    """Train, going on from a checkpoint where one is, and note what each step trained on this rank."""
    config = parse(arguments(shards, run_dir, scenario, *more))
    train, val = Index.open(config.data.train), Index.open(config.data.val)
    trainer = Trainer(config, world, train, val, train.num_classes)
    run_dir.mkdir(exist_ok=True)
    world.barrier()
    batches: list[dict[str, Any]] = []
    thresholds: list[str] = []
    scored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    step, policy = trainer.step, trainer.policy
    real_train, real_absorb = step.train, policy.absorb

    def score_batch(batch: Batch) -> Tensor:
        assert batch.erased is not None
        for row, sample_id in enumerate(batch.ids.tolist()):
            scored[trainer.state.epoch, sample_id] = (batch.images[row].clone(), batch.erased[row].clone())
        return torch.from_numpy(scores_of(scenario, batch.ids.numpy(), trainer.state.epoch))

    def note_training(batch: Batch, *rest: Any) -> Tensor:
        real = batch.is_active
        assert batch.erased is not None
        batches.append(
            {
                "epoch": trainer.state.epoch,
                "ids": batch.ids[real].tolist(),
                "weights": batch.weights[real].tolist(),
                "labels": batch.labels[real].tolist(),
                "images": batch.images[real].clone(),
                "erased": batch.erased[real].clone(),
                "rows": len(batch.ids),
            }
        )
        return real_train(batch, *rest)

    def note_threshold(counts: Tensor) -> None:
        real_absorb(counts)
        if hasattr(policy, "threshold"):
            thresholds.append(policy.threshold.threshold.hex())

    step.score_batch, step.train, policy.absorb = score_batch, note_training, note_threshold
    checkpoint = trainer.resume()
    waiting = trainer.candidates.ids.tolist()
    ended = trainer.run()
    trainer.saves.wait(trainer.state.epoch)
    trainer.close()
    return {
        "batches": batches,
        "scored": {key: seen for key, seen in scored.items() if key[1] >= 0 and key[1] not in DAMAGED},
        "thresholds": thresholds,
        "ended": ended,
        "checkpoint": checkpoint,
        "waiting_at_start": waiting,
        "waiting_at_end": trainer.candidates.ids.tolist(),
        "counts": trainer.ledger.to_dict(),
    }


def main() -> None:
    """Train every scenario, and go on from the runs that OUT/SCENARIO-paused holds where it does."""
    shards, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = World.start()
    results = {}
    for scenario in SCENARIOS:
        results[scenario] = run(world, shards, out / scenario, scenario)
        paused = out / f"{scenario}-paused"
        if not paused.exists():
            # The deadline ends the session after its second batch, in mid-epoch.
            results[paused.name] = run(world, shards, paused, scenario, "--session.hours", "1e-9")
        else:
            results[f"{scenario}-resumed"] = run(world, shards, paused, scenario)
    torch.save(results, out / f"rank-{world.rank}.pt")
    world.close()
    # Gloo has been seen to abort while the interpreter ends ("terminate called without an active exception"), after
    # everything was done and saved; what is tested here ends above.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
