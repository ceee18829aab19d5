"""ast_dist/candidates.py: what is trained of scored batches, in which batch, on which rank, from which pixels."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ast_dist.augmenter import Augmenter
from ast_dist.command_line import parse
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.registry import make_policy
from ast_dist.gate.threshold import histogram
from tests.candidates_program import (
    DAMAGED,
    EPOCHS,
    GLOBAL_BATCH_SIZE,
    NUM_SAMPLES,
    SCENARIOS,
    arguments,
    scores_of,
)
from tests.launching import finish, start
from tests.shards import overwrite, squares, write_split

WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    index = write_split(folder / "train", squares(NUM_SAMPLES, side=8))
    for sample_id in DAMAGED:
        overwrite(index, sample_id, b"not a JPEG")
    write_split(folder / "val", squares(20, side=8))
    return folder


@pytest.fixture(scope="module")
def worlds(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world trained, by world size. The first pauses runs, and the others take them over."""
    seen: dict[int, list[dict[str, Any]]] = {}
    first: Path | None = None
    for world_size in WORLD_SIZES:
        out = tmp_path_factory.mktemp(f"world-{world_size}")
        if first:
            for scenario in SCENARIOS:
                shutil.copytree(first / f"{scenario}-paused", out / f"{scenario}-paused")
        finish(
            start("tests/candidates_program.py", str(shards), str(out), world_size=world_size if world_size > 1 else 0)
        )
        first = first or out
        seen[world_size] = [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(world_size)]
    return seen


def global_batches(ranks: list[dict[str, Any]], run: str) -> list[tuple[int, list[tuple[int, float]]]]:
    """Every step's (epoch, [(id, weight) …]) in global order, from what the ranks trained of it."""
    batches = []
    for shares in zip(*(rank[run]["batches"] for rank in ranks), strict=True):
        pairs = [list(zip(share["ids"], share["weights"], strict=True)) for share in shares]
        total = sum(map(len, pairs))
        batches.append((shares[0]["epoch"], [pairs[k % len(pairs)][k // len(pairs)] for k in range(total)]))
    return batches


def one_after_another(scenario: str) -> tuple[list[tuple[int, list[tuple[int, float]]]], list[str]]:
    """The same without ranks, overlap or pixels: select, learn, wait, train; and the thresholds on the way."""
    gate = parse(arguments(Path("x"), Path("y"), scenario)).gate
    policy = make_policy(PolicySetup(gate, NUM_SAMPLES, EPOCHS, seed=0))
    batches, thresholds = [], []
    for epoch in range(EPOCHS):
        order = policy.plan(epoch, epoch_order(NUM_SAMPLES, 0, epoch)).ids
        waiting: list[tuple[int, float]] = []
        for first in range(0, NUM_SAMPLES, GLOBAL_BATCH_SIZE):
            if len(waiting) >= GLOBAL_BATCH_SIZE:
                batches.append((epoch, waiting[:GLOBAL_BATCH_SIZE]))
                waiting = waiting[GLOBAL_BATCH_SIZE:]
            ids = np.array([i for i in order[first : first + GLOBAL_BATCH_SIZE] if i not in DAMAGED])
            scores = torch.from_numpy(scores_of(scenario, ids, epoch))
            weights = policy.select(torch.from_numpy(ids), scores).tolist()
            policy.absorb(histogram(scores))
            if hasattr(policy, "threshold"):
                thresholds.append(policy.threshold.threshold.hex())
            waiting += [(int(i), w) for i, w in zip(ids, weights, strict=True) if w > 0]
        while waiting:
            batches.append((epoch, waiting[:GLOBAL_BATCH_SIZE]))
            waiting = waiting[GLOBAL_BATCH_SIZE:]
    return batches, thresholds


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_world_trains_the_same_samples_with_the_same_weights_in_the_same_batches(
    worlds: Any, world_size: int, scenario: str
) -> None:
    expected, _ = one_after_another(scenario)
    assert global_batches(worlds[world_size], scenario) == expected
    assert len({len(batch) for _, batch in expected}) > 1, "there should be short batches, too"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_of_easy_samples_reach_the_step(worlds: Any, world_size: int) -> None:
    batches = global_batches(worlds[world_size], "online")
    assert {weight for _, batch in batches for _, weight in batch} == {1.0, 3.0}


@pytest.mark.parametrize("scenario", ["online", "skewed"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_threshold_has_the_same_bits_on_every_rank_of_every_world(
    worlds: Any, world_size: int, scenario: str
) -> None:
    _, expected = one_after_another(scenario)
    assert len(set(expected)) > 10
    for rank in worlds[world_size]:
        assert rank[scenario]["thresholds"] == expected


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_full_batch_has_as_many_rows_on_each_rank(worlds: Any, world_size: int, scenario: str) -> None:
    full = 0
    for shares in zip(*(rank[scenario]["batches"] for rank in worlds[world_size]), strict=True):
        counts = [len(share["ids"]) for share in shares]
        assert max(counts) - min(counts) <= 1
        assert all(share["rows"] == max(count, 2) for share, count in zip(shares, counts, strict=True))
        if sum(counts) == GLOBAL_BATCH_SIZE:
            assert set(counts) == {GLOBAL_BATCH_SIZE // world_size}
            full += 1
    assert full >= 4


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_pixels_and_labels_are_those_of_the_sample_whichever_rank_read_it(
    worlds: Any, shards: Path, world_size: int, scenario: str
) -> None:
    config = parse(arguments(shards, Path("y"), scenario))
    index = Index.open(shards / "train")
    loader, augment = Loader(index, config.data, 0, 1), Augmenter(config.data, 0, torch.device("cpu"))
    plan = Plan(np.arange(NUM_SAMPLES))
    whole = [augment(next(loader.train_batches(plan, NUM_SAMPLES, 0, epoch)), epoch) for epoch in range(EPOCHS)]
    loader.close()
    for rank in worlds[world_size]:
        for run in (scenario, f"{scenario}-paused" if world_size == 1 else f"{scenario}-resumed"):
            for batch in rank[run]["batches"]:
                assert torch.equal(batch["images"], whole[batch["epoch"]].images[batch["ids"]])
                assert torch.equal(batch["erased"], whole[batch["epoch"]].erased[batch["ids"]])
                assert batch["labels"] == index.label[batch["ids"]].tolist()
        # What is scored is what is trained.
        assert len(rank[scenario]["scored"]) > NUM_SAMPLES // world_size
        for (epoch, sample_id), (image, erased) in rank[scenario]["scored"].items():
            assert torch.equal(image, whole[epoch].images[sample_id])
            assert torch.equal(erased, whole[epoch].erased[sample_id])


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_damaged_samples_are_counted_and_never_trained(worlds: Any, world_size: int, scenario: str) -> None:
    batches = global_batches(worlds[world_size], scenario)
    trained = [sample_id for _, batch in batches for sample_id, _ in batch]
    assert not {*DAMAGED} & {*trained}
    for rank in worlds[world_size]:
        assert rank[scenario]["counts"] == {
            "forwarded": len(trained),
            "backwarded": len(trained),
            "scored": EPOCHS * (NUM_SAMPLES - len(DAMAGED)),
            "damaged": EPOCHS * len(DAMAGED),
            "full_equivalent": EPOCHS * NUM_SAMPLES,
            "steps_nonfinite": 0,
        }


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_sample_is_trained_once_an_epoch_at_most(worlds: Any, world_size: int, scenario: str) -> None:
    for epoch in range(EPOCHS):
        batches = global_batches(worlds[world_size], scenario)
        trained = [sample_id for at, batch in batches for sample_id, _ in batch if at == epoch]
        assert len({*trained}) == len(trained)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_another_world_goes_on_with_what_waited_at_the_checkpoint(worlds: Any, world_size: int, scenario: str) -> None:
    expected, _ = one_after_another(scenario)
    before = global_batches(worlds[1], f"{scenario}-paused")
    assert worlds[1][0][f"{scenario}-paused"]["ended"] == "paused"
    for rank in worlds[world_size]:
        assert rank[f"{scenario}-resumed"]["checkpoint"] == "step-00000002"
        waiting = worlds[1][0][f"{scenario}-paused"]["waiting_at_end"]
        assert waiting and rank[f"{scenario}-resumed"]["waiting_at_start"] == waiting
    assert before + global_batches(worlds[world_size], f"{scenario}-resumed") == expected


def test_scores_that_are_no_number_are_trained(worlds: Any) -> None:
    batches = global_batches(worlds[1], "online")
    trained = {sample_id for epoch, batch in batches for sample_id, _ in batch if epoch == 1}
    unknown = {i for i in range(NUM_SAMPLES) if i % 29 == 3 and i not in DAMAGED}
    assert unknown <= trained
