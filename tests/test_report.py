"""Claims about the report of real runs: what it says, and what is said where something is missing or damaged."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from ast_dist.data.index import Index
from ast_dist.errors import run_command
from ast_dist.fault import contents
from ast_dist.fault.commit import committed
from ast_dist.report import main
from ast_dist.track.history import read as read_rows
from tests.launching import environment
from tests.reporting import HOSTILE, train_two, write_hostile_shards, written
from tests.shards import overwrite, squares, write_split
from tests.track.conftest import write_run
from tests.training import NUM_SAMPLES, snapshot

SECTIONS = ["status", "curves", "faults", "samples", "configuration"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_hostile_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    return train_two(shards, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def gated(runs, tmp_path):
    """A copy of the gated run, to be changed."""
    return shutil.copytree(runs / "gated", tmp_path / "gated")


def refused(capsys, *argv):
    """The one line with which the command refuses."""
    assert run_command(main, [str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def said(page):
    """The page's text, without markup."""
    return html.unescape(re.sub(r"<[^>]*>", "\n", page.split("</style>")[1]))


def facts_of(page):
    """The status in names and values."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html.unescape(page)))


def table(page, caption):
    """A table's cells in the page's text, row by row."""
    found = re.search(rf"<caption>{re.escape(html.escape(caption))}</caption>(.*?)</table>", page, re.S).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.S)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def memory_of(run_dir):
    """The gate's state in the newest checkpoint."""
    return contents.read(committed(run_dir / "checkpoints")[-1])[0]["gate"]


def captions(page, title):
    """Significance and visits in the captions below a heading, in their order."""
    part = page.split(f">{title}</h3>")[1].split("<h3")[0].split("<section")[0]
    lines = re.findall(r"<figcaption>(.*?)</figcaption>", part, re.S)
    found = [re.search(r"<span>(\S+) nats</span><span>(\d+) visits?</span>", line).groups() for line in lines]
    return [(float(significance), int(visits)) for significance, visits in found]


# Contents ----------------------------------------------------------------------------------------------------------


def test_every_part_is_there_and_its_numbers_are_the_rows(gated):
    page = written(gated)
    assert re.findall(r'<section id="([\w-]+)"', page) == ["top", *SECTIONS]
    epochs = [row for row in read_rows(gated / "metrics.jsonl") if row["kind"] == "epoch"]
    headings, *rows = table(page, "Epochs")
    assert [row[0] for row in rows] == [str(row["epoch"]) for row in epochs]
    for heading, key, form in (
        ("val top-1, %", "val/acc1", "{:,.2f}"),
        ("EMA top-1, %", "val/ema_acc1", "{:,.2f}"),
        ("val loss", "val/loss", "{:,.4f}"),
        ("rate", "gate/rate", "{:,.3f}"),
        ("skipped so far", "cost/samples_skipped", "{:,.0f}"),
        ("images/s", "perf/images_per_s", "{:,.0f}"),
    ):
        column = headings.index(heading)
        assert [row[column] for row in rows] == [form.format(row[key]) for row in epochs], heading
    facts = facts_of(page)
    assert facts["best val top-1"] == f"{max(row['val/acc1'] for row in epochs):.2f} %"
    assert facts["last val top-1"] == f"{epochs[-1]['val/acc1']:.2f} %"
    skipped = epochs[-1]["cost/samples_skipped"]
    assert facts["samples skipped"] == f"{skipped:,} ({100 * skipped / (5 * NUM_SAMPLES):.1f} %)"
    assert facts["FLOPs saved"] == f"{100 * epochs[-1]['cost/flops_saved']:.1f} %"
    assert facts["state"] == "finished" and facts["epochs done"] == "5 of 5"
    assert "sessions left" not in facts
    told = {"eta_s": 3600, "eta_low_s": 3000, "eta_high_s": 4200, "sessions_left_low": 1, "sessions_left_high": 2}
    (gated / "progress.json").write_text(json.dumps(json.loads((gated / "progress.json").read_text()) | told))
    facts = facts_of(written(gated))
    assert (facts["time left"], facts["sessions left"]) == ("1:00:00 (50:00 to 1:10:00)", "1 to 2")


def test_what_was_not_measured_is_said_and_what_was_is_shown(tmp_path):
    run_dir = write_run(tmp_path / "run", epochs=10, epochs_done=10)
    page = written(run_dir)
    facts = facts_of(page)
    assert {facts[name] for name in ("joules saved", "GPU energy used", "GPUs' idle power")} == {"not measured"}
    assert "joules saved: not measured" in page and "train top-1, all samples (estimate): not measured" in page
    assert "Model FLOPs utilisation" not in page
    rows = read_rows(run_dir / "metrics.jsonl")
    for row in rows:
        if row["kind"] == "epoch":
            row |= {"cost/gpu_joules": 4200.0 * row["epoch"], "cost/joules_saved": 0.25, "cost/gpu_idle_w": 61.5}
            row |= {"cost/epoch_gpu_joules": 4000.0, "train/acc1_all": 77.0, "perf/mfu": 0.4}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = written(run_dir)
    facts = facts_of(page)
    assert [facts[name] for name in ("joules saved", "GPU energy used", "GPUs' idle power")] == [
        "25.0 %",
        "42 kJ",
        "61.5 W",
    ]
    for text in (
        "joules saved: 25 % (epochs 10)",
        "all samples (estimate): 77 % (epochs 10)",
        "MFU: 40 %",
        "GPU energy per",
    ):
        assert text in page


def test_faults_survived_are_counted_and_listed(tmp_path):
    run_dir = write_run(tmp_path / "run", restarts=[(1, 1, 22), (2, 0, 58), (2, 1, 70)])
    with (run_dir / "sessions.jsonl").open("a") as file:
        for row in (
            {"event": "rollback", "epoch": 7, "step": 75},
            {"event": "warning", "text": "damaged sample left out: train-000001.tar: sample 17 <b>"},
            {"event": "warning", "text": f"W&B is off from here on {HOSTILE}"},
        ):
            file.write(json.dumps({"session": 2, "restart": 1, **row}) + "\n")
    (run_dir / "checkpoints" / ".corrupt-step-00000050-0").mkdir(parents=True)
    page = written(run_dir)
    assert (
        "2 sessions, 2 restarts and 1 roll-back survived; 33 steps repeated; the longest recovery took 6.2 s."
        in said(page)
    )
    _, *starts = table(page, "Every start of the training's processes")
    assert [row[3] for row in starts] == ["the beginning", "step-00000022", "step-00000058", "step-00000070"]
    assert [row[7] for row in starts] == ["-", "6.2", "6.2", "6.2"]
    for text in (
        "session 2: in epoch 7, step 75, back to the last checkpoint",
        "train-000001.tar: sample 17 <b>",
        f"W&B is off from here on {HOSTILE}",
        ".corrupt-step-00000050-0",
    ):
        assert f"<li>{html.escape(text)}</li>" in page
    assert "session 2, restart 1, from step-00000070" in page, "the vertical line's tooltip"


def test_settings_that_differ_from_their_defaults_come_first_and_all_of_them_follow(gated):
    page = written(gated)
    changed = {row[0]: row[1:] for row in table(page, "Settings that differ from their defaults")[1:]}
    assert changed["optim.ema_decay"] == ["0.9", "0.0"]
    assert changed["loop.epochs"] == ["5", "30"]
    assert "optim.momentum" not in changed
    whole = html.unescape(re.search(r"<pre>(.*?)</pre>", page, re.S).group(1))
    assert yaml.safe_load(whole) == yaml.safe_load((gated / "config.yaml").read_text())


def test_damaged_files_are_told_and_the_rest_is_reported(tmp_path):
    run_dir = write_run(tmp_path / "run", epochs_done=3)
    metrics = run_dir / "metrics.jsonl"
    rows = ["nonsense", json.dumps({"kind": "epoch", "epoch": "x", "val/acc1": HOSTILE, "progress/epoch": [1]})]
    metrics.write_text("\n".join(rows) + "\n" + metrics.read_text())
    (run_dir / "config.yaml").write_text("{")
    (run_dir / "env.json").write_text("[1]")
    (run_dir / "progress.json").write_text("{")
    text = said(written(run_dir))
    count = len(metrics.read_text().splitlines())
    assert f"{metrics}: 1 of {count} rows cannot be read (line 1); left out." in text
    assert f"{run_dir}/progress.json: not valid JSON" in text
    assert f"{run_dir}/config.yaml: cannot be read" in text
    assert f"{run_dir}/env.json: holds a list, no dict." in text
    assert "80.33 %" in text, "the last accuracy, from the rows"


# Samples -----------------------------------------------------------------------------------------------------------


def test_pictures_are_the_most_and_least_significant_samples_of_the_newest_checkpoint(gated):
    page = written(gated)
    memory = memory_of(gated)["memory"]
    scores, visits = memory["significance"].numpy(), memory["visits"].numpy()
    order = np.argsort(scores, kind="stable")
    for title, ids in (("Most significant", order[::-1][:24]), ("Least significant", order[:24])):
        assert captions(page, title) == [(float(f"{scores[i]:.3g}"), visits[i]) for i in ids.tolist()]
    assert page.count("data:image/jpeg;base64,") >= 48


def test_suspected_wrong_labels_are_those_that_the_gate_set_aside(gated):
    page = written(gated)
    state = memory_of(gated)
    suspects = np.flatnonzero(state["hard_tail"]["streak"].numpy() >= 2)
    assert len(suspects), "the run's own gate found some"
    scores = state["memory"]["significance"].numpy()
    told = captions(page, "Suspected wrong labels (hard tail)")
    assert sorted(told) == sorted((float(f"{scores[i]:.3g}"), int(state["memory"]["visits"][i])) for i in suspects)
    assert f"{len(suspects)} samples were in the top 20 % at 2 visits in a row or more" in said(page)


def test_shards_that_moved_are_one_sentence_and_found_again_where_one_says(gated, shards, tmp_path):
    config = (gated / "config.yaml").read_text()
    (gated / "config.yaml").write_text(config.replace(str(shards), str(tmp_path / "gone")))
    page = written(gated)
    told = re.findall(r"<p>(No pictures: .*?)</p>", page)
    assert told == [
        f"No pictures: {tmp_path}/gone/train is not there. Name the folder of the training shards: --data.train DIR."
    ]
    assert "data:image" not in page and len(table(page, "Most significant")) == 25
    assert "data:image/jpeg" in written(gated, "--data.train", shards / "train")
    write_split(tmp_path / "fewer", squares(95, side=8))
    write_split(tmp_path / "other", squares(96, side=9))
    for name, reason in (("fewer", "95 samples, the checkpoint knows 96"), ("other", "another data set than the run")):
        page = written(gated, "--data.train", tmp_path / name)
        assert f"{tmp_path / name} holds {reason}" in page and "data:image" not in page


def test_a_sample_that_cannot_be_read_says_so_in_its_place(gated, shards, tmp_path):
    moved = shutil.copytree(shards, tmp_path / "shards")
    index = Index.open(moved / "train")
    worst = int(np.nanargmax(memory_of(gated)["memory"]["significance"].numpy()))
    overwrite(index, worst, b"damaged!")
    (gated / "config.yaml").write_text((gated / "config.yaml").read_text().replace(str(shards), str(moved)))
    page = written(gated)
    assert re.search(r'<div class="lost">train-0000\d\d.tar: sample .* has CRC-32', page)
    assert page.count("data:image/jpeg;base64,") >= 47


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(gated):
    newest, before = committed(gated / "checkpoints")[-1], committed(gated / "checkpoints")[-2]
    damaged = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    text = said(written(gated))
    assert f"Checkpoint {newest.name} cannot be read: {damaged}: " in text
    assert f"as checkpoint {before.name} remembers it" in text
    assert newest.is_dir(), "a report moves nothing"


def test_a_policy_without_a_memory_says_so(runs, tmp_path):
    text = said(written(runs / "full", "--out", tmp_path / "full.html"))
    assert "The policy full remembers nothing of single samples." in text
    assert "Damaged samples: 0 left out in training; 0 in an evaluation at most." in text


def test_a_run_that_watched_for_no_wrong_labels_says_so(gated):
    config = yaml.safe_load((gated / "config.yaml").read_text())
    config["gate"]["hard_tail_share"] = 0.0
    (gated / "config.yaml").write_text(yaml.safe_dump(config))
    assert "This run's gate watched for none: gate.hard_tail_share is 0." in said(written(gated))


# Comparison --------------------------------------------------------------------------------------------------------


def test_runs_are_compared_and_what_sets_them_apart_is_said(runs, tmp_path):
    page = written(runs / "gated", runs / "full", "--out", tmp_path / "both.html")
    headings, *rows = table(page, "The runs")
    both = [dict(zip(headings, row, strict=True)) for row in rows]
    assert [row["run"] for row in both] == ["gated", "full"]
    for name, row in zip(("gated", "full"), both, strict=True):
        last = [row for row in read_rows(runs / name / "metrics.jsonl") if row["kind"] == "epoch"][-1]
        assert row["last top-1"] == f"{last['val/acc1']:.2f} %"
        assert row["cost"] == f"{(1 - last['cost/flops_saved']) * last['epoch']:.2f}"
        assert row["GPU energy"] == "not measured"
    assert both[1]["cost"] == "3.00" and both[1]["samples skipped"] == "0 (0.0 %)"
    text = said(page)
    assert "These runs have different seeds (0: gated; 1: full)." in text
    assert "These runs have different planned epochs (5: gated; 3: full)." in text
    assert "different training data" not in text
    assert ["seed", "0", "1"] in table(page, "Settings in which the runs differ")
    for title in ("over epochs", "over measured cost", "over the time spent"):
        assert f"<figcaption>Val top-1, %, {title}</figcaption>" in page


def test_runs_on_different_data_are_said_not_to_compare(gated, runs, tmp_path):
    config = yaml.safe_load((gated / "config.yaml").read_text())
    config["manifest"]["train"] = "0" * 64
    (gated / "config.yaml").write_text(yaml.safe_dump(config))
    text = said(written(gated, runs / "gated", runs / "full", "--out", tmp_path / "x.html"))
    assert "These runs have different training data: their accuracies do not compare." in text
    assert f"Alike are: {gated}; {runs}/gated, {runs}/full." in text


# The command -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_changes_nothing(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run", epochs_done=1)
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    assert "absent: no such folder" in refused(capsys, tmp_path / "absent")
    assert "empty: no progress.json in this folder, so it is no run" in refused(capsys, run_dir, tmp_path / "empty")
    assert "this run is named twice" in refused(capsys, run_dir, f"{run_dir}/.")
    assert "Name a file that ends in .html" in refused(capsys, run_dir, "--out", run_dir / "metrics.jsonl")
    assert "there is no folder" in refused(capsys, run_dir, "--out", tmp_path / "no" / "report.html")
    (tmp_path / "folder.html").mkdir()
    assert "this is a folder" in refused(capsys, run_dir, "--out", tmp_path / "folder.html")
    (tmp_path / "folder.html").rmdir()
    assert snapshot(tmp_path) == before


def test_only_the_report_is_written_and_a_second_replaces_the_first(gated):
    before = snapshot(gated)
    written(gated)
    (gated / "report.html").write_text("old")
    assert written(gated).startswith("<!DOCTYPE html>")
    after = snapshot(gated)
    assert {name: content for name, content in after.items() if name != "report.html"} == before


def test_a_run_without_checkpoints_is_reported_without_torch(tmp_path):
    run_dir = write_run(tmp_path / "run", epochs_done=2)
    program = f"""
import sys
from ast_dist.cli import main
assert main(["report", {str(run_dir)!r}]) == 0
sys.exit("torch" in sys.modules or "matplotlib" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{run_dir}/report.html: " in ended.stdout
