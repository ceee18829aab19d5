"""Claims about exported files: what they hold, that nothing of ours is needed to read them, and what is refused."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional

from ast_dist.config import Config, DataConfig, ModelConfig
from ast_dist.data.index import Index
from ast_dist.data.loader import Loader
from ast_dist.errors import run_command
from ast_dist.export import main, write
from ast_dist.fault import checkpoint as checkpoint_file
from ast_dist.fault import commit
from ast_dist.fault.checkpoint import read
from ast_dist.fault.commit import committed
from ast_dist.model import Normalize, build_model
from ast_dist.train import main as train
from ast_dist.weights import load_weights, preprocessing
from tests import training
from tests.launching import ROOT, environment, finish, start, wait_for
from tests.shards import photos, write_split
from tests.training import snapshot, write_shards

WITHOUT_OURS = """
import json, sys, torch, torchvision
from safetensors import safe_open

with safe_open(sys.argv[1], "pt") as file:
    weights = {name: file.get_tensor(name) for name in file.keys()}
    about = {key: json.loads(file.metadata()[key]) for key in ("architecture", "classes", "preprocessing")}
model = torchvision.models.get_model(about["architecture"]["name"], num_classes=about["architecture"]["num_classes"])
model.load_state_dict(weights)
model.eval()
outputs = model(torch.zeros(1, 3, 32, 32)).shape[1]
print(json.dumps({"outputs": outputs, "ours": "ast_dist" in sys.modules}))
"""
BOTH = ["model.safetensors", "model.pt"]
EPOCHS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an average, three checkpoints and channels_last weights."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    more = ("--optim.ema-decay", "0.9", "--track.quiet")
    assert run_command(train, training.words(shards, run_dir, *more)) == 0
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def export(run_dir: Path, target: Path, *more: str) -> Path:
    assert run_command(main, [str(run_dir), "--to", str(target), *more]) == 0
    return target


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run the command, which must answer with one line and exit code 2; return the line."""
    capsys.readouterr()
    assert run_command(main, [str(word) for word in argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an exported file and what is said of them, as anybody would read it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            strings = file.metadata()
        assert strings["format"] == "pt"
        plain = ("format", "ast_dist", "weights", "checkpoint")
        about = {key: value if key in plain else json.loads(value) for key, value in strings.items()}
        return safetensors.torch.load_file(path), {key: value for key, value in about.items() if key != "format"}
    about = torch.load(path, weights_only=True)
    return about.pop("model"), about


def restate(checkpoint: Path, **scores: float | None) -> None:
    """Put other values into a checkpoint's manifest."""
    content = {**commit.read_manifest(checkpoint), **scores}
    (checkpoint / "manifest.json").write_bytes(commit.manifest_bytes(content))


def damage(checkpoint: Path) -> None:
    """Flip a bit of its tensors."""
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_file_holds_the_checkpoints_weights_and_what_is_needed_to_use_them(
    trained: Path, tmp_path: Path, name: str, weights: str
) -> None:
    tensors, about = opened(export(trained, tmp_path / name, "--weights", weights, "--checkpoint", "last"))
    last = committed(trained / "checkpoints")[-1]
    state, _ = read(last)
    expected = state["model"] if weights == "model" else state["ema"]["model"]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    manifest = json.loads((last / "manifest.json").read_text())
    assert about["classes"] == [f"class-{number}" for number in range(10)]
    assert about["architecture"] == {
        "name": "small_cnn", "norm": "batch", "width": 8, "stem_stride": 1, "num_classes": 10
    }  # fmt: skip
    assert about["preprocessing"]["image_size"] == 8
    assert about["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert about["val_acc1"] == manifest["val_acc1" if weights == "model" else "val_ema_acc1"]
    assert (about["weights"], about["checkpoint"]) == (weights, last.name)
    assert (about["step"], about["epoch"]) == (state["global_step"], EPOCHS)


def test_the_model_that_is_built_from_the_file_reaches_the_accuracy_it_states(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    tensors, about = opened(export(trained, tmp_path / "model.safetensors"))
    options = dict(about["architecture"])
    model = build_model(ModelConfig(**{**options, "channels_last": False}), options["num_classes"])
    model.load_state_dict(tensors)
    index = Index.open(shards / "val")
    correct = 0
    for sample_id in range(index.num_samples):
        with index.shard_paths[index.shard[sample_id]].open("rb") as file:
            file.seek(index.offset[sample_id])
            encoded = torch.frombuffer(bytearray(file.read(int(index.size[sample_id]))), dtype=torch.uint8)
        logits = model.eval()(preprocessed(decode_image(encoded), about["preprocessing"]))
        correct += int(logits.argmax() == index.label[sample_id])
    assert about["val_acc1"] == pytest.approx(100 * correct / index.num_samples)


def preprocessed(image: Tensor, how: dict[str, Any]) -> Tensor:
    """What `how["steps"]` says, by torchvision."""
    height, width = image.shape[-2:]
    side = round(how["crop_ratio"] * min(height, width))
    box = ((height - side) // 2, (width - side) // 2, side, side)
    image = functional.resized_crop(image, *box, [how["image_size"]] * 2, how["interpolation"], how["antialias"])
    return functional.normalize(image[None] / 255, how["mean"], how["std"])


def test_the_preprocessing_it_states_gives_the_pixels_that_were_validated(tmp_path: Path) -> None:
    index = write_split(tmp_path / "val", photos(12))
    config = DataConfig(train="x", val="x", image_size=24, decoder="torch")
    how = preprocessing(Config(run_dir="x", data=config))
    loader = Loader(index, config, 0, 1, 1, torch.device("cpu"))
    [batch] = loader.val_batches(12)
    loader.close()
    inputs = Normalize(config, torch.device("cpu"), channels_last=False)(batch.images)
    for row, sample_id in enumerate(batch.ids.tolist()):
        image = decode_image(torch.frombuffer(bytearray(photos(12)[sample_id]), dtype=torch.uint8))
        torch.testing.assert_close(inputs[row], preprocessed(image, how)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_the_same_checkpoint_gives_the_same_bytes_in_every_process(trained: Path, tmp_path: Path, name: str) -> None:
    written = []
    for number in range(3):
        target = tmp_path / f"{number}-{name}"
        program = ["-m", "ast_dist", "export", str(trained), "--to", str(target)]
        subprocess.run([sys.executable, *program], env=environment(), cwd=ROOT, check=True, capture_output=True)
        written.append(target.read_bytes())
    assert written[0] == written[1] == written[2]


def test_nothing_that_it_writes_names_the_folder_of_the_run(trained: Path, tmp_path: Path) -> None:
    for name in BOTH:
        assert str(trained).encode() not in export(trained, tmp_path / name).read_bytes()


def test_a_torchvision_model_is_used_with_safetensors_and_torchvision_alone(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ("--model.name", "resnet18", "--data.image-size", "32", "--loop.epochs", "1", "--track.quiet")
    assert run_command(train, training.words(shards, run_dir, *more)) == 0
    target = export(run_dir, tmp_path / "model.safetensors")
    assert opened(target)[1]["weights"] == "model", "no average was kept"
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_OURS, str(target)], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"outputs": 10, "ours": False}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((80.0, 70.0), "model"), ((70.0, 80.0), "ema"), ((70.0, 70.0), "ema"), ((None, None), "ema")],
)
def test_auto_takes_what_was_better_on_validation(
    run_dir: Path, scores: tuple[float | None, float | None], expected: str
) -> None:
    last = committed(run_dir / "checkpoints")[-1]
    restate(last, val_acc1=scores[0], val_ema_acc1=scores[1])
    source = load_weights(run_dir, last.name)
    assert (source.about["weights"], source.about["val_acc1"]) == (expected, scores[expected == "ema"])


def test_best_is_by_the_better_weights_last_is_the_newest_and_a_name_is_itself(run_dir: Path) -> None:
    first, second, third = committed(run_dir / "checkpoints")
    for path, scores in ((first, (30.0, 90.0)), (second, (80.0, 40.0)), (third, (50.0, 50.0))):
        restate(path, val_acc1=scores[0], val_ema_acc1=scores[1])
    found = {wanted: load_weights(run_dir, wanted).about["checkpoint"] for wanted in ("best", "last", second.name)}
    assert found == {"best": first.name, "last": third.name, second.name: second.name}


@pytest.mark.parametrize("wanted", ["best", "last"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_stays_where_it_is(run_dir: Path, wanted: str) -> None:
    first, second, third = committed(run_dir / "checkpoints")
    for path, score in ((first, 10.0), (second, 20.0), (third, 30.0)):
        restate(path, val_acc1=score, val_ema_acc1=score)
    damage(third)
    before = snapshot(run_dir)
    with pytest.warns(RuntimeWarning, match=rf"{third.name}.*SHA-256.*passed over"):
        source = load_weights(run_dir, wanted)
    assert source.about["checkpoint"] == second.name
    assert snapshot(run_dir) == before


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_no_fault(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third = committed(run_dir / "checkpoints")
    restate(first, val_acc1=99.0)
    verify = commit.verify

    def prune_then_verify(path: Path) -> dict[str, Any]:
        if path == first and path.exists():
            restate(third, val_acc1=100.0)
            commit.remove(run_dir / "checkpoints", {path.name for path in committed(path.parent)} - {third.name})
        return verify(path)

    monkeypatch.setattr(checkpoint_file.commit, "verify", prune_then_verify)
    assert load_weights(run_dir, "best").about["checkpoint"] == third.name


def test_exporting_again_and_again_does_not_disturb_a_training(shards: Path, tmp_path: Path) -> None:
    run_dir, target = tmp_path / "run", tmp_path / "model.safetensors"
    more = ("--checkpoint.every-steps", "1", "--checkpoint.keep-last", "1", "--loop.epochs", "12")
    job = start("-m", "ast_dist.train", *training.words(shards, run_dir, *more))
    wait_for(lambda: committed(run_dir / "checkpoints"), "the first checkpoint", job)
    while job.poll() is None:
        export(run_dir, target, "--overwrite", "--checkpoint", "last")
        opened(target)
    assert "warning" not in finish(job)
    whole = tmp_path / "whole"
    assert run_command(train, training.words(shards, whole, *more, "--track.quiet")) == 0
    assert training.state_hash(run_dir) == training.state_hash(whole)


def test_a_run_without_classes_takes_them_from_the_shards_it_was_trained_on(
    shards: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "classes.json").unlink()
    expected = [f"class-{number}" for number in range(10)]
    assert load_weights(run_dir).about["classes"] == expected, "the configuration names them"
    config = run_dir / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(shards / "train"), str(shards / "val")))
    assert "is not there or has changed" in refused(capsys, run_dir, "--to", tmp_path / "a.pt")
    config.write_text(text.replace(str(shards / "train"), str(tmp_path / "gone")))
    line = refused(capsys, run_dir, "--to", tmp_path / "a.pt")
    assert "holds no classes.json" in line and "Add --data.train DIR" in line
    assert load_weights(run_dir, train=shards / "train").about["classes"] == expected
    line = refused(capsys, run_dir, "--to", tmp_path / "a.pt", "--data.train", shards / "val")
    assert "its manifest's SHA-256 is" in line
    assert not (tmp_path / "a.pt").exists()


def test_the_file_that_stands_there_stays_unless_it_may_be_replaced(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.pt"
    target.write_text("mine")
    assert "exists. Name another file, or add --overwrite" in refused(capsys, trained, "--to", target)
    assert target.read_text() == "mine"
    export(trained, target, "--overwrite")
    assert opened(target)[1]["classes"]


def test_a_disk_that_refuses_leaves_the_old_file_and_no_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.pt"
    target.write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        line = refused(capsys, trained, "--to", target, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "bytes cannot be written (File too large)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert target.read_text() == "mine"


def test_wrong_arguments_are_told_in_one_line(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.pt"
    assert "required: --to" in refused(capsys, trained)
    assert "use one of .safetensors, .pt, .pth" in refused(capsys, trained, "--to", tmp_path / "model.onnx")
    assert "there is no folder" in refused(capsys, trained, "--to", tmp_path / "no" / "model.pt")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", "--to", target)
    assert "it is no run" in refused(capsys, shards, "--to", target)
    line = refused(capsys, trained, "--to", target, "--checkpoint", "step-99")
    assert "has no such checkpoint. There are: step-000000" in line
    assert "invalid choice: 'best'" in refused(capsys, trained, "--to", target, "--weights", "best")
    assert not target.exists()


def test_an_average_that_was_not_kept_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_command(train, training.words(shards, run_dir, "--loop.epochs", "1", "--track.quiet")) == 0
    line = refused(capsys, run_dir, "--to", tmp_path / "a.pt", "--weights", "ema")
    assert "keeps no average of its weights (optim.ema_decay is 0)" in line


def test_a_run_with_no_sound_checkpoint_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = committed(run_dir / "checkpoints")
    for path in saved:
        damage(path)
    assert "SHA-256" in refused(capsys, run_dir, "--to", tmp_path / "a.pt", "--checkpoint", saved[0].name)
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert "none of 3 checkpoints is sound" in refused(capsys, run_dir, "--to", tmp_path / "a.pt")
    shutil.rmtree(run_dir / "checkpoints")
    assert "holds no checkpoint yet" in refused(capsys, run_dir, "--to", tmp_path / "a.pt")


def test_the_line_it_prints_says_what_was_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    target = export(trained, tmp_path / "model.safetensors", "--weights", "ema")
    [line] = capsys.readouterr().out.splitlines()
    about = opened(target)[1]
    assert line == (
        f"{target}: {target.stat().st_size:,} bytes, averaged weights of {about['checkpoint']} (epoch "
        f"{about['epoch']}), val top-1 {about['val_acc1']:.2f} %"
    )


def test_names_in_any_script_survive(trained: Path, tmp_path: Path) -> None:
    source = load_weights(trained)
    names = ["Käfer", "雀", 'a"b\\c', "\n"]
    source.about["classes"] = names
    for name in BOTH:
        write(source, tmp_path / name)
        assert opened(tmp_path / name)[1]["classes"] == names
