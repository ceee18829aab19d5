"""What a real training tells W&B (offline) and the user's callbacks, read back row by row."""

import json
from pathlib import Path

import pytest

from ast_dist.fault.commit import best, committed
from ast_dist.track.history import read
from ast_dist.track.wandb_fragments import own_step
from tests.launching import finish, start
from tests.track.wandb_log import history, records, summary
from tests.training import refused, snapshot, words, write_shards

# The keys that every run with a gate and an average of its weights has. perf/mfu, perf/mem_gb and cost/gpu_joules are
# there where they can be measured.
STEP_KEYS = {
    *("kind", "global_step", "train/loss", "train/acc1_selected", "train/lr", "train/steps_nonfinite"),
    *("gate/rate", "gate/rate_target", "cost/samples_skipped", "cost/flops_saved"),
    *("perf/images_per_s", "perf/step_ms", "perf/data_wait"),
    *("progress/epoch", "progress/session", "progress/eta_h", "time/total_s"),
}
GATE_KEYS = {"gate/threshold", "gate/integral", "gate/score_p50"}
EPOCH_KEYS = {"epoch", "val/acc1", "val/acc5", "val/loss", "val/ema_acc1", "val/ema_loss", "perf/epoch_s"}

HOOKS = """
import json

def note(name, told):
    with open({path!r}, "a") as file:
        print(json.dumps([name, told]), file=file)

def on_step(row):
    note("step", row)

def on_epoch(row):
    with open({metrics!r}) as file:
        assert json.loads(file.readlines()[-1])["epoch"] == row["epoch"], "it is on disk"
    note("epoch", row)
    if row["epoch"] == 2:
        raise ValueError("no more")

def on_checkpoint(info):
    note("checkpoint", info)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training of 5 epochs, the third to fifth of which are gated. Returns (folder, its output)."""
    folder = tmp_path_factory.mktemp("wandb")
    shards, run_dir = write_shards(folder / "shards"), folder / "run"
    hooks = folder / "hooks.py"
    hooks.write_text(HOOKS.format(path=str(folder / "told"), metrics=str(run_dir / "metrics.jsonl")))
    options = ["--loop.epochs", "5", "--optim.ema-decay", "0.9", "--track.wandb", "offline", "--track.wandb-images"]
    options += ["--track.wandb-artifacts", "--track.wandb-group", "series", "--track.wandb-tags", "mine"]
    options += ["--track.callbacks", str(hooks), "--checkpoint.keep-last", "1"]
    home = {"HOME": str(folder / "home")}
    return run_dir, finish(start("-m", "ast_dist.train", *words(shards, run_dir, *options), more=home))


@pytest.fixture(scope="module")
def session(run):
    (session,) = records(run[0])
    return session


def test_every_row_is_logged_with_every_key_and_value(run, session):
    rows = read(run[0] / "metrics.jsonl")
    logged = history(session)
    assert [row["_step"] for row in logged] == [own_step(row) for row in rows]
    for mine, theirs in zip(rows, logged, strict=True):
        shown = {key: value for key, value in theirs.items() if not key.startswith(("_", "samples/"))}
        assert shown == pytest.approx(mine)
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert len(epochs) == 5 and len(steps) > 20
    assert all(set(row) >= STEP_KEYS for row in steps)
    assert all(set(row) >= EPOCH_KEYS for row in epochs)
    gated = [row for row in steps if row["gate/rate"] < 1]
    assert len(gated) > 8 and all(set(row) >= GATE_KEYS for row in gated)
    assert any("perf/ckpt_stall_ms" in row for row in steps)


def test_all_metrics_are_drawn_over_the_steps_of_training_and_the_summary_has_the_extremes(run, session):
    metrics = [record["metric"] for record in session if record["type"] == "metric"]
    assert all(metric["step_metric"] == "global_step" for metric in metrics)
    assert metrics[0]["glob_name"] == "*"
    epochs = [row for row in read(run[0] / "metrics.jsonl") if row["kind"] == "epoch"]
    shown = summary(session)
    for key, name, of in (("acc1", "max", max), ("ema_acc1", "max", max), ("loss", "min", min)):
        assert shown[f"val/{key}"] == pytest.approx({name: of(row[f"val/{key}"] for row in epochs)})
    assert shown["progress/epoch"] == 5


def test_the_page_names_the_policy_and_the_group(session):
    run = next(record["run"] for record in session if record["type"] == "run")
    assert (run["run_group"], run["tags"], run["job_type"]) == ("series", ["mine", "sundew"], "train")
    assert run["config"]["update"]["loop"]["epochs"] == 5 and "ast_dist" in run["config"]["update"]["code"]


def test_each_evaluated_epoch_shows_its_hardest_samples(run, session):
    run_dir = run[0]
    tables = {row["epoch"]: row for row in history(session) if "samples/hardest.nrows" in row}
    assert sorted(tables) == [1, 2, 3, 4, 5]
    assert all(row["samples/hardest.nrows"] == 32 and row["samples/hardest.ncols"] == 5 for row in tables.values())
    (files,) = run_dir.glob("wandb/offline-run-*/files")
    table = json.loads((files / tables[5]["samples/hardest.path"]).read_text())
    assert table["columns"] == ["image", "sample", "class", "significance", "visits"]
    state = json.loads((committed(run_dir / "checkpoints")[-1] / "state.json").read_text())
    assert state["session"]["wandb_id"] == (run_dir / "wandb_id").read_text().strip()
    scores = [row[3] for row in table["data"]]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    assert all(row[2] == f"class-{int(row[1].split('-')[0]) % 10}" for row in table["data"])
    assert all(1 <= row[4] <= 5 for row in table["data"])
    # The images wait with the run, not in a home that a later session does not see.
    artifacts = [record["artifact"] for record in session if record["type"] == "artifact"]
    images = [
        entry for artifact in artifacts if artifact["type"] == "run_table" for entry in artifact["manifest"]["contents"]
    ]
    assert len(images) > 32 and all(Path(entry["local_path"]).is_relative_to(run_dir) for entry in images)
    # Looking at samples is not training on them: all were read once, for the cache.
    assert [row["cost/samples_read"] for row in history(session) if row["kind"] == "epoch"] == [96] * 5


def test_the_best_and_the_final_checkpoint_are_logged_and_kept_until_they_are_sent(run, session):
    checkpoints = run[0] / "checkpoints"
    logged = [record["artifact"] for record in session if record["type"] == "artifact"]
    logged = [artifact for artifact in logged if artifact["type"] == "checkpoint"]
    names = {alias: json.loads(artifact["metadata"])["name"] for artifact in logged for alias in artifact["aliases"]}
    assert names == {"best": best(checkpoints), "latest": committed(checkpoints)[-1].name}
    for artifact in logged:
        folder = checkpoints / json.loads(artifact["metadata"])["name"]
        assert {entry["path"] for entry in artifact["manifest"]["contents"]} == {file.name for file in folder.iterdir()}
        for entry in artifact["manifest"]["contents"]:
            assert Path(entry["local_path"]).samefile(folder / entry["path"]), "a link, no copy"


def test_the_end_is_an_alert(session):
    alerts = [record["alert"] for record in session if record["type"] == "alert"]
    assert [(alert["text"], alert["level"]) for alert in alerts] == [("finished", "INFO")]


def test_callbacks_hear_of_every_row_and_checkpoint_and_a_failing_one_is_named_and_left_out(run):
    run_dir, output = run
    told = [json.loads(line) for line in (run_dir.parent / "told").read_text().splitlines()]
    rows = read(run_dir / "metrics.jsonl")
    assert [row for name, row in told if name == "step"] == [row for row in rows if row["kind"] == "step"]
    assert [row["epoch"] for name, row in told if name == "epoch"] == [1, 2]
    infos = [info for name, info in told if name == "checkpoint"]
    assert [info["epoch"] for info in infos] == [1, 2, 3, 4, 5]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [(info["step"], info["val_acc1"]) for info in infos] == [(r["global_step"], r["val/acc1"]) for r in epochs]
    assert all(info["save_s"] > 0 and info["path"] == f"{run_dir}/checkpoints/{info['name']}" for info in infos)
    assert output.count("hooks.py: on_epoch, line ") == 1 and "ValueError: no more. It is not called again" in output


@pytest.mark.parametrize("text", [None, "def on_step(row)\n", "import no_such_module\n", "x = 1\n"])
def test_callbacks_that_cannot_be_called_are_refused_before_anything_is_written(tmp_path, capsys, text):
    shards, hooks = write_shards(tmp_path / "shards"), tmp_path / "hooks.py"
    if text is not None:
        hooks.write_text(text)
    before = snapshot(tmp_path)
    assert str(hooks) in refused(words(shards, tmp_path / "run", "--track.callbacks", str(hooks)), capsys)
    assert {path for path in snapshot(tmp_path) if "__pycache__" not in path} == set(before)


@pytest.mark.parametrize(
    ("option", "value"), [("group", "x" * 129), ("tags", "x" * 65), ("tags", "")], ids=["group", "tag", "empty tag"]
)
def test_names_that_wandb_would_not_take_are_refused(tmp_path, capsys, option, value):
    assert f"track.wandb_{option}" in refused(words(tmp_path, tmp_path, f"--track.wandb-{option}", value), capsys)
