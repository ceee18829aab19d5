"""Claims about the gate in a training loop of one's own, in one process. `make test` runs them in a few seconds."""

import copy
import pickle
import subprocess
import sys
from collections import Counter
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision.datasets import CIFAR10, MNIST, FakeData, ImageFolder
from torchvision.transforms.v2 import Compose, ToDtype, ToImage

from ast_dist import Gate
from ast_dist.data.order import Plan, epoch_order
from ast_dist.distributed import World
from ast_dist.errors import UserError
from ast_dist.fault.state import hash_state
from ast_dist.gate.policy import Policy
from ast_dist.gate.significance import significance
from tests.launching import environment

NUM_SAMPLES = 100
NUM_CLASSES = 4
GATED = {"target_rate": 0.4, "warmup_epochs": 1}
to_tensor = Compose([ToImage(), ToDtype(torch.float32, scale=True)])


class Points(Dataset):
    """Sample i is (features that hold i in the first place, i % NUM_CLASSES); counts what is fetched."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self.x = torch.randn((num_samples, 5), generator=torch.Generator().manual_seed(0))
        self.x[:, 0] = torch.arange(num_samples)
        self.fetched: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.fetched[index] += 1
        return self.x[index], index % NUM_CLASSES


class Shaped(Points):
    """The same samples in another shape."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape

    def __getitem__(self, index: int) -> Any:
        return self.shape(*super().__getitem__(index))


class EveryOther(Policy):
    def target_rate(self, epoch: int) -> float:
        return 0.5

    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        return Plan(order[epoch % 2 :: 2])


class Reversing(Policy):
    def plan(self, epoch: int, order: np.ndarray) -> Plan:
        return Plan(order[::-1])


def ids_of(loader: Any) -> list[int]:
    return [sample_id for *_, ids in loader for sample_id in ids.tolist()]


def logits_of(ids: torch.Tensor) -> torch.Tensor:
    """A made-up answer of a model that depends on the sample alone."""
    return torch.sin(ids[:, None].float() * (1.0 + torch.arange(NUM_CLASSES)))


def watch_epoch(gate: Gate, dataset: Any, epoch: int, **options: Any) -> list[int]:
    """Go through an epoch, the gate seeing `logits_of`; return the ids."""
    seen = []
    for _, y, ids in gate.loader(dataset, batch_size=16, epoch=epoch, **options):
        gate.loss(logits_of(ids), y, ids)
        seen += ids.tolist()
    return seen


def one_line(error: Any) -> str:
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_loop_of_the_docstring_trains_and_never_fetches_what_is_skipped() -> None:
    torch.manual_seed(0)
    dataset, epochs = Points(), 3
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
    before = copy.deepcopy(model.state_dict())
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    gate = Gate(num_samples=len(dataset), target_rate=0.4)
    trained = []
    for epoch in range(epochs):
        dataset.fetched.clear()
        seen = []
        for x, y, ids in gate.loader(dataset, batch_size=16, epoch=epoch):
            loss = gate.loss(model(x), y, ids)
            loss.backward()
            opt.step()
            opt.zero_grad()
            assert torch.equal(x[:, 0], ids.float()) and torch.equal(y, ids % NUM_CLASSES)
            seen += ids.tolist()
        assert dataset.fetched == Counter(seen)
        trained.append(len(seen))
    assert trained[0] == NUM_SAMPLES
    assert all(30 <= count <= 50 for count in trained[1:])
    assert gate.samples_skipped == sum(NUM_SAMPLES - count for count in trained) == gate.report()["samples_skipped"]
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hard_samples_are_kept_and_easy_ones_are_skipped() -> None:
    dataset, gate = Points(), Gate(NUM_SAMPLES, 0.3, p_min=0.0)
    for _, y, ids in gate.loader(dataset, 16, 0):
        gate.loss(F.one_hot(torch.where(ids < 30, (y + 1) % 4, y), NUM_CLASSES) * 5.0, y, ids)
    assert sorted(ids_of(gate.loader(dataset, 16, 1))) == list(range(30))


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_fetch_the_same_batches(workers: dict[str, Any]) -> None:
    dataset, gate = Points(), Gate(NUM_SAMPLES, policy="random", seed=5)
    alone = [batch[2].tolist() for batch in gate.loader(dataset, 16, 0)]
    fetched = list(gate.loader(dataset, 16, 0, **workers))
    assert [ids.tolist() for *_, ids in fetched] == alone
    assert all(torch.equal(x[:, 0], ids.float()) for x, _, ids in fetched)


def test_a_loader_has_a_length_and_can_be_iterated_again() -> None:
    dataset, gate = Points(), Gate(NUM_SAMPLES, 0.4, policy="random")
    loader = gate.loader(dataset, 16, 0)
    assert len(loader) == len(list(loader)) == 3
    assert ids_of(loader) == ids_of(loader) == ids_of(gate.loader(dataset, 16, 0))
    assert len(gate.loader(dataset, 16, 0, start_batch=2)) == 1
    assert ids_of(gate.loader(dataset, 16, 0, start_batch=2)) == ids_of(loader)[32:]
    assert ids_of(gate.loader(dataset, 16, 0, start_batch=3)) == []


def test_an_epoch_is_planned_once_however_often_its_loader_is_asked_for() -> None:
    dataset, gate = Points(), Gate(NUM_SAMPLES, **GATED)
    watch_epoch(gate, dataset, 0)
    first = ids_of(gate.loader(dataset, 16, 1))
    report = gate.report()
    assert ids_of(gate.loader(dataset, 16, 1)) == first
    assert gate.report() == report


def test_a_loader_leaves_the_global_random_state_alone() -> None:
    gate = Gate(NUM_SAMPLES)
    state = torch.get_rng_state()
    list(gate.loader(Points(), 16, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_draw_alike_for_one_seed_and_epoch_and_apart_for_others() -> None:
    def drawn(seed: int, epoch: int) -> list[float]:
        dataset = Shaped(lambda x, y: (torch.rand(1), y))
        loader = Gate(NUM_SAMPLES, seed=seed).loader(
            dataset, 50, epoch, num_workers=1, multiprocessing_context="fork", collate_fn=default_collate
        )
        return [value for x, *_ in loader for value in x[:, 0].tolist()]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)


def test_dicts_get_ids_under_a_key_and_longer_tuples_at_their_end() -> None:
    (batch, *_) = Gate(NUM_SAMPLES).loader(Shaped(lambda x, y: {"image": x, "label": y}), 16, 0)
    assert list(batch) == ["image", "label", "ids"]
    assert torch.equal(batch["image"][:, 0], batch["ids"].float())
    ((x, y, extra, ids), *_) = Gate(NUM_SAMPLES).loader(Shaped(lambda x, y: (x, y, f"sample {y}")), 16, 0)
    assert torch.equal(x[:, 0], ids.float()) and list(extra) == [f"sample {label}" for label in y.tolist()]


@pytest.mark.parametrize(
    ("shape", "found"),
    [(lambda x, y: x, "a Tensor"), (lambda x, y: {"ids": y}, '"ids" of their own'), (lambda x, y: (x,), "a list")],
)
def test_batches_without_labels_or_with_ids_are_refused(shape: Any, found: str) -> None:
    with pytest.raises(UserError, match=found) as error:
        next(iter(Gate(NUM_SAMPLES).loader(Shaped(shape), 16, 0)))
    one_line(error)


def test_a_collate_function_sees_samples_as_the_dataset_gives_them() -> None:
    def doubled(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return 2 * x, y

    ((x, _, ids), *_) = Gate(NUM_SAMPLES).loader(Points(), 16, 0, collate_fn=doubled)
    assert torch.equal(x[:, 0], 2 * ids.float())


def test_a_dataset_that_reads_whole_batches_is_asked_for_whole_batches() -> None:
    class Whole(Points):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.asked = [*getattr(self, "asked", []), indices]
            return [(self.x[index], 0) for index in indices]

    dataset = Whole()
    batches = [ids.tolist() for *_, ids in Gate(NUM_SAMPLES).loader(dataset, 16, 0)]
    assert dataset.asked == batches and not dataset.fetched


@pytest.mark.parametrize(("batch_size", "rows"), [(33, [33, 33, 33, 2]), (3, [3] * 33 + [2]), (1, [1] * 100)])
def test_a_last_row_is_given_company_that_neither_trains_nor_is_remembered(batch_size: int, rows: list[int]) -> None:
    gate = Gate(NUM_SAMPLES, policy="full")
    batches = list(gate.loader(Points(), batch_size, 0))
    assert [len(ids) for *_, ids in batches] == rows
    ids = torch.cat([ids for *_, ids in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(NUM_SAMPLES))
    if batch_size > 1:
        (*_, last) = batches[-1]
        assert last[1] == -1
        losses = torch.tensor([2.0, torch.nan])
        assert gate.reduce(losses, last) == 2.0


@pytest.mark.parametrize("option", ["shuffle", "sampler", "batch_sampler", "drop_last", "in_order"])
def test_options_that_the_plan_decides_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"takes no {option}") as error:
        Gate(NUM_SAMPLES).loader(Points(), 16, 0, **{option: True})
    one_line(error)


class Stream(IterableDataset):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Any:
        return iter(range(NUM_SAMPLES))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"dataset": Points(90)}, ["90", "num_samples=100"]),
        ({"dataset": Stream()}, ["Stream", "map-style"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"epoch": -1}, ["epoch is -1", "0 … 9"]),
        ({"epoch": 10}, ["epoch is 10", "0 … 9"]),
        ({"start_batch": 8}, ["start_batch is 8", "7 batches"]),
        ({"start_batch": -1}, ["start_batch is -1"]),
    ],
)
def test_a_loader_that_cannot_be_is_refused_in_one_line(request_: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Gate(NUM_SAMPLES, epochs=10).loader(**{"dataset": Points(), "batch_size": 16, "epoch": 0, **request_})
    assert all(word in one_line(error) for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 0}, ["num_samples is 0"]),
        ({"epochs": 0}, ["epochs is 0"]),
        ({"policy": "online"}, ["online", "scores batches"]),
        ({"policy": "selective_backprop"}, ["selective_backprop", "scores batches"]),
        ({"policy": "sundown"}, ["Perhaps you meant sundew"]),
        ({"policy": Points}, ["Points", "no subclass"]),
        ({"policy": "short"}, ["short", "epochs="]),
        ({"rate_fall": 0.2}, ["rate_fall", "epochs="]),
        ({"anneal_share": 0.2}, ["anneal_share", "epochs="]),
        ({"p_mim": 0.2}, ["p_mim", "Perhaps you meant p_min"]),
        ({"target_rate": 1.5}, ["target_rate is 1.5"]),
        ({"class_floor": 0.5}, ["class_floor is 0.5", "labels="]),
        ({"labels": [0, 1]}, ["(2,)", "(100,)"]),
        ({"labels": [0.5] * NUM_SAMPLES}, ["integers"]),
    ],
)
def test_a_gate_that_cannot_be_is_refused_in_one_line(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Gate(**{"num_samples": NUM_SAMPLES, **arguments})
    assert all(word in one_line(error) for word in words)


def test_an_epoch_gone_by_is_refused() -> None:
    gate = Gate(NUM_SAMPLES)
    old = gate.loader(Points(), 16, 0)
    gate.loader(Points(), 16, 1)
    with pytest.raises(UserError, match="epoch 1 is planned already") as error:
        gate.loader(Points(), 16, 0)
    one_line(error)
    with pytest.raises(UserError, match="loader is of epoch 0, but the gate is in epoch 1"):
        next(iter(old))


def test_policies_of_ones_own_work_as_a_class_and_by_name() -> None:
    for policy in (EveryOther, f"{__name__}:EveryOther"):
        gate = Gate(NUM_SAMPLES, policy=policy, seed=7)
        assert ids_of(gate.loader(Points(), 16, 3)) == epoch_order(NUM_SAMPLES, 7, 3)[1::2].tolist()


def test_a_plan_in_another_order_is_refused() -> None:
    with pytest.raises(UserError, match="changes the order"):
        Gate(NUM_SAMPLES, policy=Reversing).loader(Points(), 16, 0)


def test_the_end_of_training_is_annealed_only_where_it_is_known() -> None:
    for epochs, rate in ((None, 0.4), (10, 1.0)):
        gate = Gate(NUM_SAMPLES, 0.4, epochs=epochs)
        watch_epoch(gate, Points(), 0)
        watch_epoch(gate, Points(), 9)
        assert gate.report()["rate_target"] == rate
        assert gate.epochs == epochs


def test_short_ends_where_its_budget_does() -> None:
    gate = Gate(NUM_SAMPLES, 0.25, policy="short", epochs=10)
    assert gate.epochs == 3
    sizes = [len(ids_of(gate.loader(Points(), 16, epoch))) for epoch in range(gate.epochs)]
    assert sizes == [100, 100, 50]
    with pytest.raises(UserError, match="0 … 2"):
        gate.loader(Points(), 16, 3)


def test_every_class_gets_its_floor_when_labels_are_given() -> None:
    labels = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    gate = Gate(NUM_SAMPLES, 0.4, p_min=0.0, class_floor=0.5, labels=labels)
    for _, y, ids in gate.loader(Points(), 16, 0):
        gate.loss(F.one_hot(y, NUM_CLASSES) * torch.where(y == 0, 9.0, 1.0)[:, None], y, ids)
    kept = Counter(sample_id % NUM_CLASSES for sample_id in ids_of(gate.loader(Points(), 16, 1)))
    assert kept[0] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_over_the_batch_in_float32(dtype: torch.dtype, smoothing: float) -> None:
    gate = Gate(NUM_SAMPLES)
    for _, y, ids in gate.loader(Points(), 16, 0):
        logits = logits_of(ids).to(dtype).requires_grad_()
        loss = gate.loss(logits, y, ids, label_smoothing=smoothing)
        expected = F.cross_entropy(logits.detach().float(), y, label_smoothing=smoothing)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), expected)
        loss.backward()
        assert logits.grad is not None and logits.grad.dtype == dtype


def test_loss_weights_samples_as_the_policy_does() -> None:
    gate = Gate(NUM_SAMPLES, policy="infobatch", prune_ratio=0.75)
    watch_epoch(gate, Points(), 0)
    seen: set[float] = set()
    scores = F.cross_entropy(logits_of(torch.arange(NUM_SAMPLES)), torch.arange(NUM_SAMPLES) % 4, reduction="none")
    for _, y, ids in gate.loader(Points(), 16, 1):
        weights = torch.where(scores[ids] < gate.report()["threshold"], 4.0, 1.0) * (ids >= 0)
        losses = F.cross_entropy(logits_of(ids), y, reduction="none")
        torch.testing.assert_close(gate.loss(logits_of(ids), y, ids), (weights * losses).sum() / (ids >= 0).sum())
        seen |= {*weights.tolist()}
    assert {1.0, 4.0} <= seen


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    gate = Gate(NUM_SAMPLES)
    _, y, ids = next(iter(gate.loader(Points(), 16, 0)))
    logits = logits_of(ids)
    parts = [gate.loss(logits[part], y[part], ids[part]) for part in (slice(0, 5), slice(5, 16))]
    torch.testing.assert_close(sum(parts), gate.loss(logits, y, ids))


def test_a_loss_of_ones_own_goes_through_reduce_and_observe() -> None:
    states = []
    for own in (False, True):
        gate = Gate(NUM_SAMPLES)
        for _, y, ids in gate.loader(Points(), 16, 0):
            logits = logits_of(ids)
            loss = gate.loss(logits, y, ids)
            if own:
                losses = F.cross_entropy(logits, y, reduction="none")
                assert torch.equal(gate.reduce(losses, ids), loss)
                gate.observe(logits, y, ids)
        states.append(gate.state_dict()["policy"]["memory"]["significance"])
    assert torch.equal(*states)


def test_remembered_is_the_significance_of_hard_unsmoothed_labels() -> None:
    gate, ids = Gate(NUM_SAMPLES), torch.arange(NUM_SAMPLES)
    for _, y, batch_ids in gate.loader(Points(), 16, 0):
        gate.loss(logits_of(batch_ids), y.int(), batch_ids, label_smoothing=0.2)
    memory = gate.state_dict()["policy"]["memory"]
    torch.testing.assert_close(memory["significance"], significance(logits_of(ids), ids % NUM_CLASSES))
    assert memory["visits"].tolist() == [1] * NUM_SAMPLES


def test_mixed_labels_train_are_counted_and_are_not_remembered() -> None:
    gate = Gate(NUM_SAMPLES)
    for step, (_, y, ids) in enumerate(gate.loader(Points(), 33, 0)):
        mixed = 0.7 * F.one_hot(y, NUM_CLASSES).float() + 0.3 * F.one_hot(y.flip(0), NUM_CLASSES).float()
        target = mixed if step % 2 else y
        loss = gate.loss(logits_of(ids), target, ids)
        if step == 1:
            torch.testing.assert_close(loss, F.cross_entropy(logits_of(ids), mixed))
            trained_mixed = set(ids.tolist())
    memory = gate.state_dict()["policy"]["memory"]
    unseen = set(torch.isnan(memory["significance"]).nonzero().flatten().tolist())
    assert trained_mixed < unseen and len(unseen) == 34
    assert gate.report()["samples_unscored"] == 34


def test_logits_that_are_nan_are_counted_and_not_remembered() -> None:
    gate = Gate(NUM_SAMPLES)
    for _, y, ids in gate.loader(Points(), 16, 0):
        gate.loss(torch.where((ids == 7)[:, None], torch.nan, logits_of(ids)), y, ids)
    memory = gate.state_dict()["policy"]["memory"]
    assert torch.isnan(memory["significance"]).nonzero().flatten().tolist() == [7]
    assert gate.report()["scores_non_finite"] == 1


def test_an_overflow_under_autocast_and_a_scaler_is_survived() -> None:
    torch.manual_seed(0)
    gate, model = Gate(NUM_SAMPLES), nn.Linear(5, NUM_CLASSES)
    opt = torch.optim.SGD(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, (x, y, ids) in enumerate(gate.loader(Points(), 16, 0)):
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(x * (1e6 if step == 2 else 0.01))
            loss = gate.loss(logits, y, ids)
        assert loss.dtype == torch.float32 and logits.dtype == torch.float16
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    gate.merge()
    assert gate.report()["scores_non_finite"] == 16


def test_ids_that_the_epoch_does_not_train_are_refused() -> None:
    gate = Gate(NUM_SAMPLES, policy="random")
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="iterate over one first"):
        gate.loss(torch.zeros(2, 4), y, y)
    planned = ids_of(gate.loader(Points(), 16, 0))
    skipped = next(sample_id for sample_id in range(NUM_SAMPLES) if sample_id not in planned)
    for stranger in (skipped, NUM_SAMPLES, -2):
        with pytest.raises(UserError, match=f"1 of 2 ids .* epoch 0, the first is {stranger}:") as error:
            gate.loss(torch.zeros(2, 4), y, torch.tensor([planned[0], stranger]))
        one_line(error)


@pytest.mark.parametrize(
    ("logits", "labels", "ids"),
    [((8, 4), (7,), (8,)), ((8,), (8,), (8,)), ((8, 4), (8,), (7,)), ((8, 4), (8, 3), (8,))],
)
def test_shapes_that_do_not_belong_together_are_refused(logits: Any, labels: Any, ids: Any) -> None:
    gate = Gate(NUM_SAMPLES)
    next(iter(gate.loader(Points(), 8, 0)))
    y = torch.zeros(labels, dtype=torch.int64 if len(labels) == 1 else torch.float32)
    with pytest.raises(UserError, match="do not belong together") as error:
        gate.loss(torch.zeros(logits), y, torch.zeros(ids, dtype=torch.int64))
    assert str(tuple(logits)) in one_line(error) and str(tuple(ids)) in str(error.value)
    with pytest.raises(UserError, match=r"must be \(n,\)"):
        gate.reduce(torch.zeros(()), torch.zeros(8, dtype=torch.int64))


def test_a_report_says_what_the_gate_does() -> None:
    gate = Gate(NUM_SAMPLES, **GATED)
    assert gate.report()["rate"] == 1.0
    watch_epoch(gate, Points(), 0)
    kept = len(watch_epoch(gate, Points(), 1))
    report = gate.report()
    assert report["rate"] == kept / NUM_SAMPLES and report["rate_target"] == 0.4
    assert {"threshold", "integral", "score_p50", "scores_non_finite", "samples_unscored", "samples_skipped"} <= {
        *report
    }
    assert all(isinstance(value, float) for value in report.values())


class Run:
    """A training with dropout, SGD with momentum and a gate, that can stop after any batch."""

    def __init__(self, policy: str = "sundew") -> None:
        torch.manual_seed(3)
        self.dataset = Points()
        self.model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, NUM_CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.gate = Gate(NUM_SAMPLES, 0.5, policy=policy, weight_cap=3.0, seed=1)
        self.done = (0, 0)

    def train(self, until: tuple[int, int]) -> None:
        epoch, batch = self.done
        while (epoch, batch) < until:
            for x, y, ids in self.gate.loader(self.dataset, 8, epoch, start_batch=batch):
                self.gate.loss(self.model(x), y, ids).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                batch += 1
                self.done = (epoch, batch)
                if self.done == until:
                    return
            epoch, batch = epoch + 1, 0

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "gate")}
        torch.save({**parts, "rng": torch.get_rng_state(), "done": self.done}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "gate"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        self.done = tuple(state["done"])


@pytest.mark.parametrize("policy", ["sundew", "infobatch", "random"])
@pytest.mark.parametrize("stop", [(0, 5), (1, 3), (2, 1)])
def test_a_resume_in_mid_epoch_gives_the_same_weights_bit_for_bit(policy: str, stop: Any, tmp_path: Path) -> None:
    whole = Run(policy)
    whole.train(until=(3, 2))
    first = Run(policy)
    first.train(until=stop)
    first.save(tmp_path / "state.pt")
    torch.manual_seed(99)
    second = Run(policy)
    second.load(tmp_path / "state.pt")
    second.train(until=(3, 2))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert second.gate.report() == whole.gate.report()
    assert second.dataset.fetched + first.dataset.fetched == whole.dataset.fetched


def test_a_state_holds_nothing_that_weights_only_refuses(tmp_path: Path) -> None:
    class Counting(EveryOther):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "counts": {"kept": np.int64(3), "share": np.float32(0.5)}}

    gate = Gate(NUM_SAMPLES, policy=Counting)
    gate.loader(Points(), 16, 0)
    torch.save(gate.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["policy"]["counts"] == {"kept": 3, "share": 0.5}


def test_a_state_holds_one_bit_a_sample_of_its_plan() -> None:
    gate = Gate(10_000, policy="random")
    gate.loader(Points(10_000), 16, 0)
    assert gate.state_dict()["plan"].numel() == 1250
    assert gate.state_dict()["plan_weights"] is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_samples": 90}, ["num_samples=100", "num_samples=90"]),
        ({"seed": 4}, ["seed=0", "seed=4"]),
        ({"policy": "random"}, ["policy=sundew", "policy=random"]),
    ],
)
def test_the_state_of_another_gate_is_refused_and_changes_nothing(other: dict[str, Any], words: list[str]) -> None:
    state = Gate(NUM_SAMPLES).state_dict()
    gate = Gate(**{"num_samples": NUM_SAMPLES, **other})
    before = hash_state(gate.state_dict())
    with pytest.raises(UserError) as error:
        gate.load_state_dict(state)
    assert all(word in one_line(error) for word in words)
    with pytest.raises(UserError, match="no state of a Gate: it has no num_samples"):
        gate.load_state_dict({})
    assert hash_state(gate.state_dict()) == before


def test_a_resume_in_mid_epoch_with_other_batches_is_refused() -> None:
    gate = Gate(NUM_SAMPLES)
    list(gate.loader(Points(), 16, 0))
    other = Gate(NUM_SAMPLES)
    other.load_state_dict(gate.state_dict())
    with pytest.raises(UserError, match="16 samples over all processes, but batch_size 8 × 1 processes is 8") as error:
        other.loader(Points(), 8, 0, start_batch=1)
    one_line(error)
    assert len(other.loader(Points(), 16, 0, start_batch=1)) == 6
    assert len(other.loader(Points(), 8, 0)) == 13


def test_without_a_process_group_the_world_is_one_and_stays_closed() -> None:
    world = World.current()
    assert (world.rank, world.size) == (0, 1)
    assert not dist.is_initialized()


def test_importing_the_package_loads_torch_only_when_gate_is_asked_for() -> None:
    program = (
        "import sys, ast_dist, ast_dist.status\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(ast_dist, 'Gates')\n"
        "assert 'torch' not in sys.modules\n"
        "from ast_dist import Gate\n"
        "assert 'torch' in sys.modules and ast_dist.Gate is Gate\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment())


def image_folder(root: Path) -> tuple[Any, Counter[str]]:
    decoded: Counter[str] = Counter()
    for index in range(60):
        path = root / f"class-{index % 3}" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (4 * index, 0, 0)).save(path)

    def read(path: str) -> Image.Image:
        decoded[path] += 1
        return Image.open(path).convert("RGB")

    return ImageFolder(str(root), transform=to_tensor, loader=read), decoded


def mnist(root: Path) -> Any:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(60, dtype=np.uint8).repeat(28 * 28)
    for name, magic, shape, values in (
        ("images-idx3", 2051, (60, 28, 28), images),
        ("labels-idx1", 2049, (60,), np.arange(60, dtype=np.uint8) % 10),
    ):
        for split in ("train", "t10k"):
            header = np.array([magic, *shape], dtype=">i4").tobytes()
            (raw / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
    return MNIST(str(root), train=True, transform=to_tensor)


def cifar10(root: Path) -> Any:
    folder = root / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return md5(raw).hexdigest()

    pixels = np.arange(60, dtype=np.uint8)[:, None].repeat(3 * 32 * 32, axis=1)
    batch = write("data_batch_1", {"data": pixels, "labels": [index % 10 for index in range(60)]})
    meta_md5 = write("batches.meta", {"label_names": [f"class {index}" for index in range(10)]})

    class Small(CIFAR10):
        train_list = [["data_batch_1", batch]]  # noqa: RUF012
        test_list = []  # noqa: RUF012
        meta = {"filename": "batches.meta", "key": "label_names", "md5": meta_md5}  # noqa: RUF012

    return Small(str(root), train=True, transform=to_tensor)


def train_on(dataset: Any, **options: Any) -> None:
    """Three epochs with a small CNN, the last two gated."""
    torch.manual_seed(0)
    channels, size, _ = dataset[0][0].shape
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * size**2, 10)
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    gate = Gate(num_samples=len(dataset), target_rate=0.4)
    seen: list[int] = []
    for epoch in range(3):
        seen.clear()
        for x, y, ids in gate.loader(dataset, batch_size=16, epoch=epoch, **options):
            gate.loss(model(x), y, ids).backward()
            opt.step()
            opt.zero_grad()
            seen += ids.tolist()
    assert 0 < sum(sample_id >= 0 for sample_id in seen) < len(dataset)


def test_torchvisions_image_folder_decodes_only_what_is_trained(tmp_path: Path) -> None:
    dataset, decoded = image_folder(tmp_path)
    gate = Gate(len(dataset), target_rate=0.4, policy="random", labels=dataset.targets)
    loader = gate.loader(dataset, 16, 0)
    trained = {dataset.samples[sample_id][0] for sample_id in ids_of(loader) if sample_id >= 0}
    assert len(trained) == 24
    assert set(decoded) == trained
    train_on(dataset)


def test_torchvisions_fake_data_mnist_and_cifar10_train(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "cifar10").mkdir()
    train_on(FakeData(size=60, image_size=(3, 8, 8), num_classes=10, transform=to_tensor))
    train_on(mnist(tmp_path / "mnist"), num_workers=1)
    train_on(cifar10(tmp_path / "cifar10"))


def test_a_low_target_needs_no_second_argument() -> None:
    gate = Gate(NUM_SAMPLES, 0.1)
    watch_epoch(gate, Points(), 0)
    gate.loader(Points(), 16, 1)
    assert gate.report()["rate_target"] == 0.1


def test_the_state_of_a_gate_with_other_options_is_refused_and_changes_nothing() -> None:
    gate = Gate(NUM_SAMPLES, 0.4)
    watch_epoch(gate, Points(), 0)
    other = Gate(NUM_SAMPLES, 0.4, hard_tail_share=0.1)
    before = other.state_dict()
    with pytest.raises(UserError, match=r"hard_tail_share=0\.0"):
        other.load_state_dict(gate.state_dict())
    assert str(other.state_dict()) == str(before)
    short = {key: value for key, value in gate.state_dict().items() if key != "plan"}
    with pytest.raises(UserError, match="it has no plan"):
        other.load_state_dict(short)
