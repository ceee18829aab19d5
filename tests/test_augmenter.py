"""ast_dist/augmenter.py and its place in a run: which pixels the model sees, whoever loads them, scored or resumed."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from ast_dist.augmenter import Augmenter
from ast_dist.command_line import parse
from ast_dist.config import Config, DataConfig, ModelConfig, OptimConfig
from ast_dist.data.batch import Batch
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.data.order import Plan, epoch_order
from ast_dist.data.pixel_draws import PixelDraws
from ast_dist.data.pixel_kernels import transform
from ast_dist.distributed import World
from ast_dist.errors import run_command
from ast_dist.mixing import Mix, pair
from ast_dist.model import build_model
from ast_dist.step import TrainStep
from ast_dist.track.history import read
from ast_dist.train import main
from ast_dist.trainer import Trainer
from tests.shards import overwrite, photos, write_split
from tests.training import NUM_SAMPLES, progress, state_hash, words, write_shards

COUNT = 24
CPU = torch.device("cpu")
EVERYTHING = DataConfig(
    image_size=17, auto_augment="randaugment", color_jitter=(0.4, 0.4, 0.4, 0.1), erase_share=0.5, threads=2
)


@pytest.fixture
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


def augmented(folder: Path, rank: int, world_size: int, global_batch_size: int, epoch: int = 2) -> dict[int, Tensor]:
    """What this rank's rows look like, by sample id (-1: padding), with the erased box in the last four numbers."""
    loader, augment = Loader(Index.open(folder), EVERYTHING, rank, world_size), Augmenter(EVERYTHING, 3, CPU)
    seen = {}
    for host_batch in loader.train_batches(Plan(epoch_order(COUNT, 3, epoch)), global_batch_size, 3, epoch):
        batch = augment(host_batch, epoch)
        assert batch.erased is not None
        for row, sample_id in enumerate(batch.ids.tolist()):
            if batch.is_active[row] or sample_id < 0:
                seen[sample_id] = torch.cat([batch.images[row].flatten().long(), batch.erased[row]])
    loader.close()
    return seen


def test_a_samples_pixels_do_not_depend_on_ranks_batches_or_damage_beside_it(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", photos(COUNT))
    alone = augmented(index.root, 0, 1, COUNT)
    assert len(alone) == COUNT
    overwrite(index, 5, b"not a JPEG")
    for world_size in (1, 2, 3):
        seen: dict[int, Tensor] = {}
        for rank in range(world_size):
            seen |= augmented(index.root, rank, world_size, 7)
        # Batches of 7, 7, 7 and 3: of two ranks or more, some have a single row in the last, and one of padding.
        assert (-1 in seen) == (world_size > 1)
        assert {sample_id for sample_id in seen if sample_id >= 0} == {*range(COUNT)} - {5}
        for sample_id in seen.keys() - {-1}:
            assert torch.equal(seen[sample_id], alone[sample_id])
    assert not torch.equal(augmented(index.root, 0, 1, COUNT, epoch=3)[0], alone[0])


def make_batch(config: DataConfig, rows: int = 12) -> Batch:
    ids = torch.arange(rows) * 5
    generator = torch.Generator().manual_seed(1)
    return Batch(
        step=0,
        ids=ids,
        images=torch.randint(0, 256, (rows, 3, config.image_size, config.image_size), generator=generator).byte(),
        labels=torch.arange(rows) % 10,
        weights=torch.ones(rows),
        is_active=torch.ones(rows, dtype=torch.bool),
        planned=rows,
    )


def test_auto_augmentation_comes_before_colour_jitter_and_the_hosts_batch_stays() -> None:
    batch = make_batch(EVERYTHING)
    before = batch.images.clone()
    both = Augmenter(EVERYTHING, 0, CPU)(batch, 1)
    assert torch.equal(batch.images, before) and batch.erased is None
    jitter_off = dataclasses.replace(EVERYTHING, color_jitter=(0.0, 0.0, 0.0, 0.0))
    first = Augmenter(jitter_off, 0, CPU)(batch, 1)
    second = Augmenter(dataclasses.replace(EVERYTHING, auto_augment="none"), 0, CPU)(first, 1)
    assert torch.equal(second.images, both.images)
    assert not torch.equal(first.images, before) and not torch.equal(first.images, both.images)


def test_a_batch_is_only_moved_where_all_is_off() -> None:
    batch = make_batch(EVERYTHING)
    moved = Augmenter(DataConfig(image_size=17), 0, CPU)(batch, 1)
    assert moved.images is batch.images and moved.erased is None


@pytest.mark.parametrize("mix", [None, Mix(0.7), Mix(0.5, (0, 0, 4, 8))], ids=["plain", "mixup", "cutmix"])
def test_the_model_trains_and_scores_boxes_erased_after_normalisation_and_before_mixing(
    world: World, mix: Mix | None
) -> None:
    data = DataConfig(train="x", val="x", image_size=8, erase_share=0.6, mean=(0.3, 0.4, 0.5))
    config = Config(run_dir="x", data=data, model=ModelConfig(name="small_cnn", width=8), optim=OptimConfig())
    step = TrainStep(build_model(config.model, 10), config, world)
    batch = Augmenter(data, 0, CPU)(make_batch(data), 1)
    boxes = PixelDraws(data, 0).erased(batch.ids.numpy(), 1, 8)
    assert boxes is not None and 0 < (boxes[:, 2] > 0).sum() < len(boxes)
    expected = step.normalize(batch.images).clone()
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        expected[row] = transforms.erase(expected[row], top, left, height, width, torch.zeros(3, 1, 1))
    seen: list[Tensor] = []
    step.module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    step.score_batch(batch)
    step.train(batch, 0.1, torch.tensor(12), mix)
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], mix.images(expected, pair(batch.is_active)) if mix else expected)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


AUGMENTED = ("--data.auto-augment", "trivialaugment", "--data.color-jitter", "0.4", "0.4", "0.4", "0.1")
ERASED = ("--data.erase-share", "0.5")


@pytest.mark.parametrize("policy", ["sundew", "online", "selective_backprop"])
def test_a_stopped_and_resumed_augmented_run_equals_an_uninterrupted_one(
    shards: Path, tmp_path: Path, policy: str
) -> None:
    whole, stopped, plain = tmp_path / "whole", tmp_path / "stopped", tmp_path / "plain"
    argv = ["--gate.policy", policy, "--gate.warmup-epochs", "0", "--loop.epochs", "2", "--gate.anneal-share", "0"]
    assert run_command(main, words(shards, whole, *argv, *AUGMENTED, *ERASED)) == 0
    for _ in range(2):  # each session ends after its second step, with candidates waiting
        assert run_command(main, words(shards, stopped, *argv, *AUGMENTED, *ERASED, "--session.hours", "1e-9")) == 0
        assert progress(stopped)["state"] == "paused"
    assert run_command(main, words(shards, stopped, *argv, *AUGMENTED, *ERASED)) == 0
    assert state_hash(stopped) == state_hash(whole)
    if policy == "sundew":
        for number, more in enumerate((AUGMENTED, ERASED)):
            run_dir = plain.with_name(f"other-{number}")
            assert run_command(main, words(shards, run_dir, *argv, *more)) == 0
            assert state_hash(run_dir) != state_hash(whole), "one of the two does nothing"


def test_each_epoch_of_a_run_trains_its_own_augmentation(world: World, shards: Path, tmp_path: Path) -> None:
    config = parse(words(shards, tmp_path, "--gate.policy", "full", "--loop.epochs", "2", *AUGMENTED, *ERASED))
    train, val = Index.open(config.data.train), Index.open(config.data.val)
    trainer = Trainer(config, world, train, val, train.num_classes)
    augment, plan, steps = Augmenter(config.data, 0, CPU), Plan(np.arange(NUM_SAMPLES)), 0
    batches = [next(trainer.loader.train_batches(plan, NUM_SAMPLES, 0, epoch)) for epoch in range(2)]
    whole = [augment(batch, epoch) for epoch, batch in enumerate(batches)]
    real_train = trainer.step.train

    def train_checked(batch: Batch, *rest: Any) -> Tensor:
        nonlocal steps
        expected = whole[trainer.state.epoch]
        assert torch.equal(batch.images, expected.images[batch.ids])
        assert torch.equal(batch.erased, expected.erased[batch.ids])
        steps += 1
        return real_train(batch, *rest)

    trainer.step.train = train_checked
    assert trainer.run() == "finished"
    trainer.close()
    assert steps == 2 * NUM_SAMPLES // 16


def test_a_run_may_not_change_its_augmentation(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(shards, tmp_path / "run", "--loop.epochs", "1")
    assert run_command(main, argv) == 0
    assert run_command(main, [*argv, *ERASED]) == 2
    assert "data.erase_share: 0.0 → 0.5" in capsys.readouterr().err


def test_validation_images_are_not_augmented(shards: Path, tmp_path: Path) -> None:
    """The model that stays as it is: a learning rate too small to change a weight's last bit."""
    scores = []
    for number, more in enumerate(((), (*AUGMENTED, *ERASED))):
        run_dir = tmp_path / str(number)
        still = ("--optim.lr", "1e-30", "--loop.epochs", "1", "--model.norm", "group")
        assert run_command(main, words(shards, run_dir, *still, *more)) == 0
        [row] = [row for row in read(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]
        scores.append(row["val/loss"])
    assert scores[0] == scores[1]
    assert np.isfinite(scores).all()


def test_strengths_and_boxes_follow_the_side_of_a_batchs_images() -> None:
    """Of one configuration: batches may have images of another side than data.image_size."""
    batch, draws = make_batch(dataclasses.replace(EVERYTHING, image_size=40), 60), PixelDraws(EVERYTHING, 0)
    ids, augmented = batch.ids.numpy(), Augmenter(EVERYTHING, 0, CPU)(batch, 0)
    boxes = draws.erased(ids, 0, 40)
    assert boxes is not None and boxes[:, 2:].max() > EVERYTHING.image_size
    assert augmented.erased is not None and augmented.erased.tolist() == boxes.tolist()
    by_side = {}
    for side in (17, 40):
        images = batch.images.clone()
        for each in draws.rounds(ids, 0, side):
            order = np.argsort(each.kernels, kind="stable")
            transform(images, each.kernels, torch.from_numpy(order), torch.from_numpy(each.parameters[order]))
        by_side[side] = images
    assert torch.equal(augmented.images, by_side[40])
    assert not torch.equal(by_side[17], by_side[40])
