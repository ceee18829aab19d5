"""Mixup and CutMix, and that neither they nor smoothing nor overflow poison the remembered significance."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.config import Config, DataConfig, GateConfig, LoopConfig, ModelConfig, OptimConfig, differences, to_dict
from ast_dist.data.batch import Batch
from ast_dist.data.order import epoch_order, step_ids
from ast_dist.distributed import World
from ast_dist.errors import UserError, run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.gate.memory import SignificanceMemory
from ast_dist.mixing import Mix, Mixer, _cut, draw_beta, pair
from ast_dist.model import build_model
from ast_dist.step import TrainStep
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests.training import NUM_SAMPLES, progress, state_hash, words, write_shards

BOTH = OptimConfig(mixup_alpha=0.2, cutmix_alpha=1.0)


@pytest.fixture
def world() -> Iterator[World]:
    world = World.start()
    yield world
    world.close()


def make_step(world: World, precision: str = "fp32", **optim: float) -> TrainStep:
    """A model whose rows do not see each other (group norm), and plain SGD."""
    config = Config(
        run_dir="x",
        data=DataConfig(train="x", val="x", image_size=8),
        model=ModelConfig(name="small_cnn", width=8, norm="group"),
        optim=OptimConfig(**{"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, **optim}),
        loop=LoopConfig(precision=precision),
    )
    torch.manual_seed(0)
    return TrainStep(build_model(config.model, 10), config, world)


def make_batch(active: list[bool]) -> Batch:
    rows = len(active)
    is_active = torch.tensor(active)
    generator = torch.Generator().manual_seed(1)
    return Batch(
        step=0,
        ids=torch.where(is_active, torch.arange(rows), -1),
        images=torch.randint(0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8),
        labels=torch.arange(rows) % 10,
        weights=is_active.float(),
        is_active=is_active,
        planned=int(is_active.sum()),
    )


def weights_after(step: TrainStep, batch: Batch, mix: Mix | None) -> torch.Tensor:
    step(batch, 1.0, mix=mix)
    return torch.cat([parameter.detach().flatten() for parameter in step.module.parameters()])


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 300), step=st.integers(0, 10**6))
def test_a_draw_follows_from_seed_epoch_and_step_alone(seed: int, epoch: int, step: int) -> None:
    mix = Mixer(BOTH, seed).draw(epoch, step, 32)
    assert Mixer(BOTH, seed).draw(epoch, step, 32) == mix
    assert (mix is not None) == Mixer(BOTH, seed).mixed_steps(epoch, np.arange(step, step + 1))[0]


def test_the_stated_share_of_the_steps_is_mixed_and_half_of_those_by_each_way() -> None:
    draws = [Mixer(dataclasses.replace(BOTH, mix_share=0.3), 5).draw(2, step, 32) for step in range(4000)]
    mixed = [mix for mix in draws if mix]
    assert len(mixed) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sum(mix.box is None for mix in mixed) / len(mixed) == pytest.approx(0.5, abs=0.06)
    assert len({mix.own_share for mix in mixed if mix.box is None}) > 0.4 * len(mixed), "each step has its own draw"


@pytest.mark.parametrize(
    ("optim", "is_cut"), [(OptimConfig(mixup_alpha=1.0), False), (OptimConfig(cutmix_alpha=1.0), True)]
)
def test_one_alone_is_the_only_one_used(optim: OptimConfig, is_cut: bool) -> None:
    mixer = Mixer(dataclasses.replace(optim, mix_share=1.0), 0)
    for step in range(50):
        mix = mixer.draw(0, step, 32)
        assert mix is not None
        assert (mix.box is not None) == is_cut


def test_nothing_is_mixed_where_both_are_off_or_the_share_is_zero() -> None:
    for optim in (OptimConfig(mix_share=1.0), dataclasses.replace(BOTH, mix_share=0.0)):
        mixer = Mixer(optim, 0)
        assert not mixer.is_on
        assert not any(mixer.draw(0, step, 32) for step in range(100))


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_shares_are_distributed_as_beta_of_alpha_and_alpha(alpha: float) -> None:
    draws = np.array([draw_beta(alpha, 7, number) for number in range(2000)])
    assert ((draws >= 0) & (draws <= 1)).all()
    others = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        below = (draws < np.quantile(others, quantile)).mean()
        assert below == pytest.approx(quantile, abs=0.05)  # 4.5 standard deviations


def test_a_share_from_a_tiny_alpha_is_still_a_number() -> None:
    draws = np.array([draw_beta(1e-4, 7, number) for number in range(200)])
    assert ((draws >= 0) & (draws <= 1)).all()
    assert 0.35 < (draws > 0.5).mean() < 0.65


@given(share=st.floats(0, 1), row=st.floats(0, 0.999), column=st.floats(0, 0.999), size=st.integers(1, 300))
def test_a_cut_lies_in_the_image_and_its_label_share_is_its_area(
    share: float, row: float, column: float, size: int
) -> None:
    mix = _cut(share, row, column, size)
    assert mix.box is not None
    top, left, bottom, right = mix.box
    assert 0 <= top <= bottom <= size
    assert 0 <= left <= right <= size
    assert mix.own_share == 1 - (bottom - top) * (right - left) / size**2
    assert mix.own_share >= share - 1e-9, "clipping only makes the box smaller"


@given(active=st.lists(st.booleans(), max_size=40))
def test_partners_are_the_next_trained_row_and_never_padding_or_damaged_rows(active: list[bool]) -> None:
    partners = pair(torch.tensor(active, dtype=torch.bool)).tolist()
    rows = [row for row, is_active in enumerate(active) if is_active]
    expected = dict(zip(rows, rows[1:] + rows[:1], strict=True))
    assert partners == [expected.get(row, row) for row in range(len(active))]


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.75, (2, 0, 6, 4))], ids=["mixup", "cutmix"])
def test_mixed_images_are_the_papers(mix: Mix) -> None:
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before, partners = images.clone(), [1, 2, 3, 0]
    mixed = mix.images(images, torch.tensor(partners))
    for row, partner in enumerate(partners):
        if mix.box is None:
            expected = 0.3 * images[row] + 0.7 * images[partner]
        else:
            inside = torch.zeros(8, 8, dtype=torch.bool)
            inside[2:6, 0:4] = True
            expected = torch.where(inside, images[partner], images[row])
        torch.testing.assert_close(mixed[row], expected)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.75, (2, 0, 6, 4))], ids=["mixup", "cutmix"])
def test_a_mixed_step_descends_the_loss_of_the_mixed_labels(world: World, mix: Mix, smoothing: float) -> None:
    batch = make_batch([True] * 6)
    step = make_step(world, label_smoothing=smoothing)
    reference = make_step(world)
    partners = torch.tensor([1, 2, 3, 4, 5, 0])
    labels = F.one_hot(batch.labels, 10).float()
    mixed_labels = mix.own_share * labels + (1 - mix.own_share) * labels[partners]
    logits = reference.module(mix.images(reference.normalize(batch.images), partners))
    F.cross_entropy(logits, mixed_labels, label_smoothing=smoothing).backward()
    with torch.no_grad():
        expected = torch.cat([(p - p.grad).flatten() for p in reference.module.parameters()])
    torch.testing.assert_close(weights_after(step, batch, mix), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mix", [Mix(0.3), Mix(0.75, (2, 0, 6, 4))], ids=["mixup", "cutmix"])
def test_rows_that_do_not_train_enter_no_mix(world: World, mix: Mix) -> None:
    batch, other = (make_batch([True, False, True, True, False]) for _ in range(2))
    other.images[[1, 4]] = 255 - other.images[[1, 4]]
    other.labels[[1, 4]] = 7
    assert torch.equal(weights_after(make_step(world), batch, mix), weights_after(make_step(world), other, mix))


def test_top_1_of_a_mixed_row_goes_by_the_label_of_its_larger_share(world: World) -> None:
    correct = []
    for own_share in (0.9, 0.1):
        step, batch = make_step(world), make_batch([True] * 6)
        # The answer is 3 whatever the image, and row 2's partner is row 3.
        with torch.no_grad():
            step.module[-1].weight.zero_()
            step.module[-1].bias.copy_(5 * F.one_hot(torch.tensor(3), 10))
        batch.labels[4] = 3
        step(batch, 0.1, mix=Mix(own_share))
        correct.append(int(step.meters.correct))
    assert correct == [2, 2]


def remembered(scores: torch.Tensor, batch: Batch) -> SignificanceMemory:
    memory = SignificanceMemory(len(batch.ids))
    memory.observe(torch.where(batch.is_active, batch.ids, -1), scores)
    memory.merge(0)
    return memory


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_significance_with_label_smoothing_is_that_of_the_hard_labels(world: World, precision: str) -> None:
    batch = make_batch([True] * 6)
    smoothed, hard = (make_step(world, precision, label_smoothing=smoothing) for smoothing in (0.2, 0.0))
    first = remembered(smoothed(batch, 1.0)[0], batch)
    second = remembered(hard(batch, 1.0)[0], batch)
    assert first.significance.tolist() == second.significance.tolist()
    assert np.isfinite(first.significance).all()


def test_a_step_that_the_gradient_scaler_skips_leaves_sound_significance(world: World) -> None:
    step, batch = make_step(world, "fp16"), make_batch([True] * 6)
    assert step.scaler.is_enabled()
    step.scaler.load_state_dict(
        {**step.scaler.state_dict(), "scale": 2.0**40}
    )  # beyond fp16's largest number: the gradients overflow, the logits do not
    before = [parameter.detach().clone() for parameter in step.module.parameters()]
    scores, _ = step(batch, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, step.module.parameters(), strict=True)), "not skipped"
    assert step.scaler.get_scale() < 2.0**40
    memory = remembered(scores, batch)
    assert memory.non_finite == 0
    assert np.isfinite(memory.significance).all()
    assert (
        memory.significance.tolist() == remembered(make_step(world, "fp16")(batch, 1.0)[0], batch).significance.tolist()
    )


def test_logits_that_overflow_are_counted_and_not_remembered(world: World) -> None:
    step, batch = make_step(world, "fp16"), make_batch([True] * 5 + [False])
    sound = remembered(make_step(world)(batch, 1.0)[0], batch)
    before = sound.significance.tolist()
    with torch.no_grad():
        step.module[-1].weight.fill_(6e4)
        step.module[-1].bias.fill_(6e4)
    weights = [parameter.detach().clone() for parameter in step.module.parameters()]
    scores, _ = step(batch, 1.0)
    assert not torch.isfinite(scores[:5]).any(), "the logits should overflow"
    assert all(torch.equal(a, b) for a, b in zip(weights, step.module.parameters(), strict=True)), "not skipped"
    sound.observe(torch.where(batch.is_active, batch.ids, -1), scores)
    sound.merge(1)
    assert sound.non_finite == 5
    assert np.array_equal(sound.significance, np.array(before, dtype=np.float32), equal_nan=True)
    assert sound.last_epoch.tolist() == [0] * 5 + [-1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


MIXED = ("--optim.mixup-alpha", "0.2", "--optim.cutmix-alpha", "1.0", "--optim.label-smoothing", "0.1")


def test_mixed_steps_leave_the_memory_as_it_was_and_the_others_do_not(shards: Path, tmp_path: Path) -> None:
    full = ("--gate.policy", "sundew", "--gate.warmup-epochs", "3")
    assert run_command(main, words(shards, tmp_path / "run", *MIXED, *full)) == 0
    state, _ = read(committed(tmp_path / "run/checkpoints")[-1])
    optim = OptimConfig(mixup_alpha=0.2, cutmix_alpha=1.0)
    visits, shares = np.zeros(NUM_SAMPLES, dtype=int), []
    for epoch in range(3):
        order = epoch_order(NUM_SAMPLES, 0, epoch)
        before = visits.sum()
        for step in range(6):
            visits[step_ids(order, step, 16)] += Mixer(optim, 0).draw(epoch, step, 8) is None
        shares.append((visits.sum() - before) / NUM_SAMPLES)
    assert 0 < visits.sum() < 3 * NUM_SAMPLES, "the seed should draw both kinds of steps"
    memory = state["gate"]["memory"]
    assert memory["visits"].tolist() == visits.tolist()
    assert torch.isnan(memory["significance"]).tolist() == (visits == 0).tolist()
    epochs = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if row["kind"] == "epoch"]
    assert [row["gate/observed_share"] for row in epochs] == pytest.approx(shares)


def test_a_stopped_and_resumed_mixed_run_equals_an_uninterrupted_one(shards: Path, tmp_path: Path) -> None:
    whole, stopped, plain = tmp_path / "whole", tmp_path / "stopped", tmp_path / "plain"
    assert run_command(main, words(shards, whole, *MIXED)) == 0
    for _ in range(3):  # each session ends after its second step
        assert run_command(main, words(shards, stopped, *MIXED, "--session.hours", "1e-9")) == 0
        assert progress(stopped)["state"] == "paused"
    assert run_command(main, words(shards, stopped, *MIXED)) == 0
    assert state_hash(stopped) == state_hash(whole)
    assert run_command(main, words(shards, plain, "--optim.label-smoothing", "0.1")) == 0
    assert state_hash(plain) != state_hash(whole), "nothing was mixed"


@pytest.mark.parametrize("policy", ["sundew", "infobatch"])
def test_a_policy_that_remembers_refuses_runs_in_which_every_step_is_mixed(policy: str) -> None:
    data = DataConfig(train="x", val="x")
    always = dataclasses.replace(BOTH, mix_share=1.0)
    with pytest.raises(UserError, match=rf"^optim.mix_share is 1, but gate.policy {policy} .*Lower optim.mix_share"):
        Config(run_dir="x", data=data, optim=always, gate=GateConfig(policy=policy))
    Config(run_dir="x", data=data, optim=always, gate=GateConfig(policy="random"))
    Config(run_dir="x", data=data, optim=OptimConfig(mix_share=1.0), gate=GateConfig(policy=policy))


@pytest.mark.parametrize("field", [{"mixup_alpha": -0.1}, {"cutmix_alpha": 5.0}, {"mix_share": 1.5}])
def test_a_value_out_of_range_is_refused_by_name(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"^optim.{next(iter(field))} is "):
        OptimConfig(**field)


def test_mixing_may_not_change_between_sessions() -> None:
    plain = Config(run_dir="x", data=DataConfig(train="x", val="x"))
    mixed = dataclasses.replace(plain, optim=dataclasses.replace(plain.optim, mixup_alpha=0.2))
    assert differences(to_dict(plain), to_dict(mixed)) == ["optim.mixup_alpha: 0.0 → 0.2"]
