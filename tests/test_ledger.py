"""The ledger of a real training, against counts taken elsewhere: hooks on the model, reads at the file, decodes."""

import json
import zlib
from collections import Counter
from pathlib import Path

import pytest

from ast_dist.data.index import Index
from ast_dist.errors import run_command
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.track.history import read as read_rows
from ast_dist.train import main
from tests import training
from tests.launching import finish, start
from tests.ledger_program import Counts
from tests.shards import overwrite, restate, squares, write_split

NUM_SAMPLES = 97  # the last batch of a full epoch has one sample: one rank pads it, another has none
EPOCHS = 3
COUNTED = ("read", "decoded", "scored", "forwarded", "backwarded")
UNREADABLE, UNDECODABLE = 5, 9
GATED = ("--gate.policy", "sundew", "--gate.anneal-share", "0")


def write_shards(folder: Path) -> Path:
    """Two splits that share no image."""
    images = squares(NUM_SAMPLES + 20, side=8)
    write_split(folder / "train", images[:NUM_SAMPLES])
    write_split(folder / "val", images[NUM_SAMPLES:])
    return folder


def write_damaged_shards(folder: Path) -> Path:
    """The same with two damaged samples: one's bytes are not those stated, another's are stated and no image."""
    index = Index.open(write_shards(folder) / "train")
    overwrite(index, UNREADABLE, b"spoilt")
    blank = bytes(int(index.size[UNDECODABLE]))
    overwrite(index, UNDECODABLE, blank)
    restate(index, "crc32", UNDECODABLE, zlib.crc32(blank))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def words(shards: Path, folder: Path, *more: str) -> list[str]:
    return training.words(shards, folder / "run", "--loop.epochs", str(EPOCHS), "--data.damaged-limit", "0.05", *more)


def train(shards: Path, folder: Path, *more: str) -> "Counter[str]":
    """Train in this process; return what was counted beside the ledger."""
    with pytest.MonkeyPatch.context() as patch:
        counts = Counts(shards / "train", patch.setattr)
        assert run_command(main, words(shards, folder, *more)) == 0
    return counts.total()


def train_on_two_ranks(shards: Path, folder: Path, *more: str) -> "Counter[str]":
    """Train under torchrun; return what was counted beside the ledger, summed over the ranks."""
    argv = ("-m", "tests.ledger_program", str(folder), *words(shards, folder, *more))
    finish(start(*argv, world_size=2))
    first, second = (Counter(json.loads((folder / f"rank-{rank}.json").read_text())) for rank in range(2))
    return first + second


def epoch_rows(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "run/metrics.jsonl") if row["kind"] == "epoch"]


def ledger(folder: Path) -> "Counter[str]":
    row = epoch_rows(folder)[-1]
    assert row["cost/samples_skipped"] == EPOCHS * NUM_SAMPLES - row["cost/samples_backwarded"]
    return Counter({name: row[f"cost/samples_{name}"] for name in COUNTED})


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("more", [("--gate.policy", "full"), GATED], ids=["full", "sundew"])
def test_the_ledger_equals_what_was_read_decoded_and_put_through_the_model(
    shards: Path, tmp_path: Path, more: tuple[str, ...], cache: str
) -> None:
    counted = train(shards, tmp_path, *more, "--data.cache", cache)
    assert ledger(tmp_path) == counted
    trained = counted["backwarded"]
    assert counted["forwarded"] == trained
    assert counted["read"] == counted["decoded"] == (NUM_SAMPLES if cache == "ram" else trained)
    full = EPOCHS * NUM_SAMPLES
    assert trained == full if more != GATED else NUM_SAMPLES < trained < 0.8 * full


def test_damaged_samples_are_read_and_go_no_further(tmp_path: Path) -> None:
    write_damaged_shards(tmp_path)
    counted = train(tmp_path, tmp_path, "--gate.policy", "full", "--data.cache", "none")
    sound = EPOCHS * (NUM_SAMPLES - 2)
    assert counted == {"read": EPOCHS * NUM_SAMPLES, "decoded": sound, "forwarded": sound, "backwarded": sound}
    assert ledger(tmp_path) == counted


@pytest.mark.parametrize("policy", ["online", "selective_backprop"])
def test_scored_samples_are_counted_apart_from_trained_ones(tmp_path: Path, policy: str) -> None:
    write_damaged_shards(tmp_path)
    counted = train(tmp_path, tmp_path, "--gate.policy", policy, "--gate.anneal-share", "0", "--data.cache", "none")
    assert ledger(tmp_path) == counted
    assert counted["read"] == EPOCHS * NUM_SAMPLES, "what is scored has to be read"
    assert 0 < counted["scored"] <= counted["decoded"] == EPOCHS * (NUM_SAMPLES - 2)
    assert 0 < counted["forwarded"] == counted["backwarded"] < counted["decoded"]


def test_two_ranks_count_together_what_both_did(tmp_path: Path) -> None:
    write_damaged_shards(tmp_path)
    # One row for the whole first epoch, which trains everything: its accuracy is that of all samples.
    every_epoch = ("--track.every-steps", str(-(-NUM_SAMPLES // 16)))
    counted = train_on_two_ranks(tmp_path, tmp_path, *GATED, "--data.cache", "none", *every_epoch)
    assert ledger(tmp_path) == counted
    assert counted["read"] > counted["decoded"] == counted["forwarded"] == counted["backwarded"]
    # The first epoch trains every sound sample, the others some of them.
    assert NUM_SAMPLES - 2 < counted["backwarded"] < 0.8 * EPOCHS * NUM_SAMPLES
    step_row, epoch_row = read_rows(tmp_path / "run/metrics.jsonl")[:2]
    assert step_row["train/acc1_selected"] == epoch_row["train/acc1_all"]
    assert 0.05 < step_row["perf/mem_gb"] <= epoch_row["perf/mem_gb"]


def test_counts_go_on_over_sessions_with_what_was_prefetched_in_vain(shards: Path, tmp_path: Path) -> None:
    more = ("--gate.policy", "full", "--data.cache", "none")
    first = train(shards, tmp_path, *more, "--session.hours", "1e-9")
    state, session = read(committed(tmp_path / "run/checkpoints")[-1])
    in_checkpoint = session["resources"]["samples_read"]
    assert first["backwarded"] == state["counts"]["backwarded"] < in_checkpoint <= first["read"]
    second = train(shards, tmp_path, *more)
    costs = ledger(tmp_path)
    assert costs["backwarded"] == first["backwarded"] + second["backwarded"] == EPOCHS * NUM_SAMPLES
    assert costs["read"] == in_checkpoint + second["read"] > EPOCHS * NUM_SAMPLES
    assert epoch_rows(tmp_path)[-1]["cost/session_samples_read"] == second["read"]
