"""Claims about the gate inside Lightning's Trainer, in one process and in two."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import finish, start
from tests.lightning_program import EPOCHS, GLOBAL_BATCH_SIZE, NUM_SAMPLES, Classifier, make_trainer

pytestmark = [
    # Lightning 2.6 uses what torch 2.15 deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    model = Classifier()
    make_trainer(str(tmp_path_factory.mktemp("whole")), EPOCHS).fit(model)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks of a DDP training saw."""
    out = tmp_path_factory.mktemp("pair")
    finish(start("tests/lightning_program.py", str(out), world_size=2))
    return [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_trainer_trains_what_the_gate_keeps_and_fetches_nothing_else(whole: Classifier) -> None:
    real = [[sample_id for sample_id in ids if sample_id >= 0] for ids in whole.trained]
    assert sorted(real[0]) == list(range(NUM_SAMPLES))
    for ids in real[1:]:
        assert 25 <= len(ids) <= 60 and len(set(ids)) == len(ids)
    assert len({tuple(sorted(ids)) for ids in real}) == EPOCHS
    fetched, trained = Counter(whole.dataset.fetched), Counter(sample_id for ids in real for sample_id in ids)
    padded = sum(ids.count(-1) for ids in whole.trained)
    assert trained <= fetched and (fetched - trained).total() <= padded
    assert whole.gate.samples_skipped == sum(NUM_SAMPLES - len(ids) for ids in real)


def test_every_trained_sample_is_remembered_though_the_trainer_fetches_ahead(whole: Classifier) -> None:
    memory = whole.gate.state_dict()["policy"]["memory"]
    visits = Counter(sample_id for ids in whole.trained for sample_id in ids if sample_id >= 0)
    assert memory["visits"].tolist() == [visits[sample_id] for sample_id in range(NUM_SAMPLES)]
    assert memory["significance"].isfinite().all()


def test_a_checkpoint_of_the_trainers_resumes_the_gate(whole: Classifier, tmp_path: Path) -> None:
    first = Classifier()
    trainer = make_trainer(str(tmp_path), 2)
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Classifier()
    make_trainer(str(tmp_path), EPOCHS).fit(second, ckpt_path=tmp_path / "half.ckpt")
    assert first.trained + second.trained == whole.trained
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_two_processes_train_what_one_does(whole: Classifier, pair: list[dict[str, Any]]) -> None:
    assert [rank["world_size"] for rank in pair] == [2, 2]
    for epoch in range(EPOCHS):
        shares = [rank["trained"][epoch] for rank in pair]
        together = [sample_id for rows in zip(*shares, strict=True) for sample_id in rows if sample_id >= 0]
        assert together == [sample_id for sample_id in whole.trained[epoch] if sample_id >= 0]
    for rank in pair:
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(rank["weights"][name], pair[0]["weights"][name])
        assert rank["report"].keys() == whole.gate.report().keys()
        assert rank["report"]["threshold"] == pytest.approx(whole.gate.report()["threshold"], rel=1e-3)
    assert GLOBAL_BATCH_SIZE % 2 == 0
