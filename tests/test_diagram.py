"""architecture.svg and sundew.svg: a run's own numbers, letters that stay in their boxes, and no torch."""

import dataclasses
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from ast_dist.config import GateConfig
from ast_dist.counter_rng import STREAM_DITHER, uniform
from ast_dist.diagram import main, write_diagrams
from ast_dist.diagram_architecture import architecture_svg
from ast_dist.diagram_numbers import BINS_PER_OCTAVE, COUNTS, LOG2_MIN, NUM_BINS, GateNumbers, Histogram, read_numbers
from ast_dist.diagram_sundew import sundew_svg
from ast_dist.errors import run_command
from ast_dist.fault import contents
from ast_dist.fault.arrays import read_part
from ast_dist.fault.commit import DamagedCheckpointError, committed, manifest_bytes, read_manifest
from ast_dist.gate import threshold
from ast_dist.gate.policy import PolicySetup
from ast_dist.gate.sundew import Sundew, rate_above
from ast_dist.track.history import read
from ast_dist.train import main as train
from tests.training import NUM_SAMPLES, words, write_shards

SVG = "{http://www.w3.org/2000/svg}"
EXTREME = GateNumbers(
    run="a_run-with-a-name-that-is-longer-than-any-picture-is-wide-and-then-some-more-of-it",
    policy="a.module.of.somebody:AndItsVeryLongClassNameThatGoesOnAndOn",
    settings={"p_min": 0.123456, "ki": 0.0512345, "loss_weight": 0.70001, "entropy_weight": 1e-9},
    epoch=1_000_000,
    epochs=10_000_000,
    num_samples=123_456_789_012,
    rate=1e-7,
    rate_target=1.23456789e-7,
    threshold=1.2e-7,
    integral=-1.23456e-12,
    error=-1.2e-9,
    suspects=123_456_789,
    ranks=65_536,
    model="vision_transformer_with_a_very_long_name_patch14_at_518_pixels",
    global_batch_size=1_048_576,
    checkpoint="step-00001234567890-evaluated",
    missing="step-00001234567890-evaluated cannot be read (DamagedCheckpointError)",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A real run of three epochs, the one in the middle gated, that drew its pictures at its end."""
    folder = tmp_path_factory.mktemp("diagram")
    argv = words(write_shards(folder), folder / "run", "--gate.target-rate", "0.4", "--track.dashboard")
    argv.remove("--track.no-dashboard")
    assert run_command(train, argv) == 0
    return folder / "run"


def gated_epoch(run_dir):
    """The last epoch row with a threshold."""
    return [row for row in read(run_dir / "metrics.jsonl") if row["kind"] == "epoch" and "gate/threshold" in row][-1]


def texts(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def width_of(text, size, is_bold):
    """Pixels that a line is wide in DejaVu Sans, the font that browsers have here, by matplotlib's measure."""
    font = FontProperties(family="DejaVu Sans", weight="bold" if is_bold else "normal")
    return TextPath((0, 0), text, size=size, prop=font).get_extents().x1


def test_the_numbers_are_those_of_the_runs_rows(run_dir):
    row, numbers = gated_epoch(run_dir), read_numbers(run_dir)
    assert numbers.num_samples == NUM_SAMPLES
    assert numbers.trained == row["cost/samples_planned"]
    assert numbers.skipped == NUM_SAMPLES - row["cost/samples_planned"]
    assert numbers.kept_above + numbers.kept_below == numbers.trained
    assert (numbers.epoch, numbers.epochs) == (row["epoch"], 3)
    for name in ("rate", "rate_target", "threshold", "integral", "error"):
        assert getattr(numbers, name) == row[f"gate/{name}"], name
    shown = texts((run_dir / "sundew.svg").read_text())
    assert f"{NUM_SAMPLES} training samples" in shown
    assert f"{numbers.trained} trained, {numbers.skipped} skipped" in shown
    assert f"threshold {row['gate/threshold']:.3g} nats" in shown
    assert f"Activation rate {row['gate/rate']:.3g}, target 0.4." in shown
    assert f"{NUM_SAMPLES} of them remembered." in " ".join(shown)
    assert f"{numbers.kept_above} above" in shown and f"{numbers.kept_below} kept" in shown
    assert f"Integral u = {row['gate/integral']:.3g}".replace("-", "−") in shown


def test_the_sizes_in_the_architecture_are_the_runs(run_dir):
    shown = " ".join(texts((run_dir / "architecture.svg").read_text()))
    newest = json.loads((run_dir / "progress.json").read_text())["checkpoint"]
    for text in (f"{NUM_SAMPLES} training samples", "small_cnn, 1 rank, global batch 16", f"newest: {newest}"):
        assert text in shown


def test_the_histogram_is_the_one_that_the_threshold_came_from(run_dir):
    state, _ = contents.read(committed(run_dir / "checkpoints")[-1])
    gate, found = state["gate"]["threshold"], read_numbers(run_dir).histogram
    assert np.array_equal(found.counts, gate["counts"].numpy())
    assert found.total == NUM_SAMPLES
    assert found.threshold == gate["threshold"] == gated_epoch(run_dir)["gate/threshold"]


def test_samples_below_are_hatched_and_those_above_are_solid(run_dir):
    numbers = read_numbers(run_dir)
    bars = list(ET.fromstring(sundew_svg(numbers)).iter(f"{SVG}rect"))
    line = next(
        item for item in ET.fromstring(sundew_svg(numbers)).iter(f"{SVG}polyline") if item.get("stroke-dasharray")
    )
    where = float(line.get("points").split(",")[0])
    swatches = [bar for bar in bars if bar.get("stroke-width") == "1"]
    drawn = [bar for bar in bars if bar.get("stroke-width") == "0.8"]
    assert {bar.get("fill") for bar in drawn} == {bar.get("fill") for bar in swatches} and len(swatches) == 2
    for bar in drawn:
        right = float(bar.get("x")) + float(bar.get("width"))
        assert (bar.get("fill") == "url(#hatched)") == (right <= where + 1), "the threshold lies between them"


def test_kept_above_counts_what_the_policy_kept_for_its_score():
    # Scores that are nearly all alike lie in one bin, where chance decides: the share kept differs from the target.
    config = GateConfig(target_rate=0.4, p_min=0.2, warmup_epochs=0, anneal_share=0.0)
    differs = set()
    for epoch in range(5):
        policy = Sundew(PolicySetup(config, 500, 10))
        policy.memory.significance[:] = 1.0 + np.arange(500, dtype=np.float32) / 1e6
        order = np.random.default_rng(epoch).permutation(500)
        plan, told = policy.plan(epoch, order), policy.report()
        scores = torch.from_numpy(policy.memory.significance[order])
        dither = torch.from_numpy(uniform(order, STREAM_DITHER, 0, epoch))
        above = int(policy.threshold.keep(scores, dither).sum())
        state = policy.threshold.state_dict()
        histogram = Histogram(state["counts"].numpy(), state["threshold"], state["bin"], "step-1")
        told = {name: told[name] for name in ("rate", "rate_target", "threshold", "integral", "error")}
        settings = dataclasses.asdict(config)
        numbers = GateNumbers("run", "sundew", settings, num_samples=500, histogram=histogram, **told)
        assert (numbers.seen, numbers.kept_above, numbers.trained) == (500, above, len(plan.ids))
        assert numbers.kept_below == len(plan.ids) - above
        differs.add(above)
    assert len(differs) > 1


@pytest.mark.parametrize(("rate", "p_min"), [(0.4, 0.2), (0.1, 0.2), (0.5, 0.0), (0.3, 1.0)])
def test_the_share_above_is_the_gates_own(rate, p_min):
    assert GateNumbers("run", "sundew", {"p_min": p_min}, rate_target=rate).target_above == rate_above(rate, p_min)


def test_the_bins_are_the_gates_own():
    ours = (LOG2_MIN, BINS_PER_OCTAVE, NUM_BINS)
    assert ours == (threshold.LOG2_MIN, threshold.BINS_PER_OCTAVE, threshold.NUM_BINS)


@pytest.mark.parametrize("draw", [sundew_svg, architecture_svg])
@pytest.mark.parametrize("case", ["letters", "run", "extreme", "online", "full"])
def test_the_drawing_is_valid_and_its_letters_stay_in_their_boxes(draw, case, run_dir):
    of_run = read_numbers(run_dir)
    cases = {
        "letters": None,
        "run": of_run,
        "extreme": EXTREME,
        "online": dataclasses.replace(of_run, policy="online"),
        "full": GateNumbers("run", "full", num_samples=NUM_SAMPLES),
    }
    root = ET.fromstring(draw(cases[case]))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width <= 480, "a phone would scale it down until nobody can read it"
    assert root.get("role") == "img" and root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    boxes = [(group, list(group.iter(f"{SVG}rect"))) for group in root.iter(f"{SVG}g") if group.get("class") == "box"]
    assert len(boxes) >= 4
    inside = {text: rects[0] for group, rects in boxes for text in group.iter(f"{SVG}text")}
    for text in root.iter(f"{SVG}text"):
        size, is_bold = float(text.get("font-size")), text.get("font-weight") == "bold"
        long = width_of(text.text, size, is_bold)
        x, y = float(text.get("x")), float(text.get("y"))
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor")] * long
        assert size >= 12
        if text.get("transform"):  # reads upwards
            assert y - long / 2 >= 0 and y + long / 2 <= height and size <= x <= width, text.text
        elif text in inside:
            x0, y0, wide, high = (float(inside[text].get(name)) for name in ("x", "y", "width", "height"))
            assert x0 <= left and left + long <= x0 + wide, text.text
            assert y0 <= y - 0.75 * size and y + 0.25 * size <= y0 + high, text.text
        else:
            assert left >= 0 and left + long <= width and y + 0.25 * size <= height, text.text


def test_without_a_run_letters_stand_for_the_numbers_and_it_says_so(tmp_path, capsys):
    assert main([str(tmp_path / "new" / "folder")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new/folder" / name) for name in ("architecture.svg", "sundew.svg")
    ]
    shown = texts((tmp_path / "new/folder/sundew.svg").read_text())
    assert "No run was named: letters stand in the place of its numbers." in " ".join(shown)
    assert {"N training samples", "threshold θ", "n trained, N − n skipped"} < set(shown)
    assert "A sketch, not data. Low significance left, high right." in shown
    assert not re.search(r"\d{2,}", " ".join(shown).replace("480", ""))


def test_a_run_without_a_gated_epoch_shows_letters_and_says_why(tmp_path):
    (tmp_path / "progress.json").write_text('{"policy": "full", "num_samples": 96, "epochs": 3}')
    sundew = write_diagrams(tmp_path)[1].read_text()
    assert "policy full: no gated epoch so far; letters stand for the numbers." in " ".join(texts(sundew))


def test_a_histogram_that_cannot_be_read_is_left_out_and_said_to_be(run_dir, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    for checkpoint in committed(damaged / "checkpoints"):
        with next(checkpoint.glob("*.distcp")).open("r+b") as file:
            file.write(b"x")
    shown = texts(sundew_svg(read_numbers(damaged)))
    assert "Histogram: not drawn" in shown and "cannot be read (DamagedCheckpointError)." in " ".join(shown)
    assert f"{gated_epoch(run_dir)['cost/samples_planned']} trained" in " ".join(shown)


def test_a_pickle_in_a_checkpoint_runs_nothing_and_is_damage(run_dir, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'was-run')!r}, 'w')",))

    copied = tmp_path / "step-00000001"
    shutil.copytree(committed(run_dir / "checkpoints")[-1], copied)
    content = {key: value for key, value in read_manifest(copied).items() if key != "sha256_of_the_above"}
    (copied / ".metadata").write_bytes(raw := pickle.dumps(Evil()))
    content["files"][".metadata"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (copied / "manifest.json").write_bytes(manifest_bytes(content))
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        read_part(copied, {COUNTS: "f8"})
    assert not (tmp_path / "was-run").exists()


def test_drawing_a_run_imports_no_torch_and_changes_none_of_its_files(run_dir, tmp_path):
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    program = (
        "import sys; from ast_dist.diagram import main; main(sys.argv[1:]); "
        "sys.exit(sorted({'torch', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "--run", str(run_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "sundew.svg").read_bytes() == (run_dir / "sundew.svg").read_bytes()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_bad_folders_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys):
    def refusal(*argv):
        assert run_command(main, [str(word) for word in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert refusal(tmp_path / "out", "--run", tmp_path / "absent").startswith(
        f"error: {tmp_path}/absent: no such folder."
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(tmp_path / "file")


def test_a_browser_keeps_all_letters_inside_their_boxes_and_the_sheet(run_dir, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: make browser")
    numbers = read_numbers(run_dir)
    drawings = [draw(case) for draw in (sundew_svg, architecture_svg) for case in (None, numbers, EXTREME)]
    script = """
        const found = [];
        for (const svg of document.querySelectorAll('svg')) {
          const sheet = svg.getBoundingClientRect();
          for (const text of svg.querySelectorAll('text')) {
            const box = text.closest('g.box');
            const outer = box ? box.querySelector('rect').getBoundingClientRect() : sheet;
            const inner = text.getBoundingClientRect();
            if (inner.left < outer.left || inner.right > outer.right || inner.bottom > outer.bottom + 1)
              found.push(text.textContent);
          }
        }
        const seen = [document.querySelectorAll('text').length, document.documentElement.scrollWidth];
        document.body.innerHTML = '<pre>' + JSON.stringify({found, seen}) + '</pre>';
    """
    page = tmp_path / "page.html"
    page.write_text(f"<meta charset='utf-8'><body style='margin:0'>{''.join(drawings)}<script>{script}</script></body>")
    ended = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=390,800", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = json.loads(re.search(r"<pre>(.*)</pre>", ended.stdout)[1])
    assert told["found"] == [] and told["seen"][0] > 100
    assert told["seen"][1] <= 500, "headless Chromium's narrowest window is 500 pixels wide"
