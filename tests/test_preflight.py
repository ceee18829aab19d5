"""ast_dist/preflight.py and ast_dist/run_dir.py: what does not fit is told before anything is written."""

import dataclasses
from dataclasses import replace

import pytest
import torch
import yaml

from ast_dist import run_dir
from ast_dist.config import Config, DataConfig, GateConfig, LoopConfig, ModelConfig
from ast_dist.data.decoder import make_decoder
from ast_dist.errors import UserError
from ast_dist.fault.lease import Lease
from ast_dist.preflight import check_data, print_dry_run
from tests.shards import restate, squares, write_split

CONFIG = Config(
    run_dir="run",
    data=DataConfig(train="train", val="val", image_size=16),
    model=ModelConfig(name="small_cnn", width=8),
    loop=LoopConfig(global_batch_size=8, epochs=10),
)
MANIFESTS = {"train": "a" * 64, "val": "b" * 64}


@pytest.fixture
def train(tmp_path):
    return write_split(tmp_path / "train", squares(12, side=8), num_classes=4)


@pytest.fixture
def val(tmp_path):
    return write_split(tmp_path / "val", squares(6, side=8), num_classes=4)


def complaint(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_model(**options):
    return replace(CONFIG, model=ModelConfig(**{"name": "small_cnn", "width": 8, **options}))


class TestData:
    def test_what_fits_passes_with_the_number_of_classes(self, train, val):
        assert check_data(CONFIG, train, val, 2) == 4
        assert check_data(with_model(num_classes=6), train, val, 2) == 6

    def test_a_global_batch_smaller_than_the_world_is_refused_with_both_numbers(self, train, val):
        message = complaint(check_data, CONFIG, train, val, 9)
        assert message.startswith("loop.global_batch_size is 8, but there are 9 processes.")
        check_data(CONFIG, train, val, 8)

    def test_a_label_outside_the_models_classes_is_named_with_its_sample_and_split(self, train, val):
        message = complaint(check_data, with_model(num_classes=3), train, val, 1)
        assert "--data.train" in message and "sample 0000003-x has label 3" in message
        assert "3 classes (0 … 2)" in message and "--model.num-classes 4" in message

    @pytest.mark.parametrize("label", [-1, 4, 2**31 - 1])
    def test_a_label_that_is_no_class_is_found_wherever_it_stands(self, train, val, label):
        message = complaint(check_data, CONFIG, train, restate(val, "label", 5, label), 1)
        assert "--data.val" in message and f"sample 0000005-x has label {label}" in message

    def test_an_empty_split_is_refused(self, train, tmp_path):
        empty = dataclasses.replace(train, label=train.label[:0])
        assert "holds no samples" in complaint(check_data, CONFIG, train, empty, 1)

    def test_splits_of_other_classes_are_refused_with_the_first_difference(self, train, val, tmp_path):
        renamed = {**val.manifest, "classes": ["class-0", "dog", "class-2", "class-3"]}
        message = complaint(check_data, CONFIG, train, replace(val, manifest=renamed), 1)
        assert "class-1 and dog" in message
        fewer = write_split(tmp_path / "fewer", squares(6, side=8), num_classes=3)
        message = complaint(check_data, CONFIG, train, fewer, 1)
        assert "4 classes" in message and "--data.val 3" in message


class TestModel:
    @pytest.mark.parametrize(("name", "size"), [("small_cnn", 2), ("vit_b_32", 32), ("alexnet", 32)])
    def test_a_model_that_does_not_take_images_of_this_size_is_refused(self, train, val, name, size):
        config = replace(with_model(name=name), data=replace(CONFIG.data, image_size=size))
        message = complaint(check_data, config, train, val, 1)
        assert message.startswith(f"model.name is {name}, which does not take images of data.image_size {size} (")

    def test_a_model_that_does_not_exist_is_refused(self, train, val):
        assert "Perhaps you meant: resnet50" in complaint(check_data, with_model(name="resnet5"), train, val, 1)

    def test_a_model_that_cannot_be_tried_without_memory_passes(self, train, val):
        config = replace(with_model(name="regnet_y_400mf"), data=replace(CONFIG.data, image_size=64))
        assert check_data(config, train, val, 1) == 4

    def test_a_decoder_that_does_not_work_here_is_refused_before_anything_is_written(self, train, val, monkeypatch):
        def broken(_decoder):
            raise TypeError("an older DALI")

        monkeypatch.setattr("ast_dist.data.decode_dali.DaliCpuDecoder.try_out", broken)
        config = replace(CONFIG, data=replace(CONFIG.data, decoder="dali"))
        assert "data.decoder dali: it does not work here (an older DALI)" in complaint(
            check_data, config, train, val, 1
        )
        with pytest.warns(RuntimeWarning, match="DALI does not work here, torchvision decodes: an older DALI"):
            decoder = make_decoder(replace(CONFIG.data, cache="none"), torch.device("cpu"), 1, keeps_whole=False)
        assert decoder.name == "torch"

    def test_sync_norm_without_a_gpu_is_refused(self, train, val, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert "model.norm is sync" in complaint(check_data, with_model(norm="sync"), train, val, 1)


def test_a_dry_run_says_what_would_be_trained(train, val, capsys):
    gate = GateConfig(target_rate=0.5, p_min=0.1, warmup_epochs=1, anneal_share=0.1)
    print_dry_run(replace(CONFIG, gate=gate), train, val)
    # 2 of 10 epochs train all 12 samples, 8 train half of them.
    assert "about 72 of 120 samples trained (60%)" in capsys.readouterr().out


class TestRunDirectory:
    @pytest.fixture
    def config(self, tmp_path):
        return replace(CONFIG, run_dir=str(tmp_path / "run"))

    @pytest.fixture
    def started(self, config, tmp_path):
        (tmp_path / "run").mkdir()
        run_dir.describe(config, MANIFESTS, ["cat", "dog"])
        return tmp_path / "run"

    def test_a_new_or_empty_directory_and_the_runs_own_pass(self, config, tmp_path):
        run_dir.check(config, MANIFESTS)
        (tmp_path / "run").mkdir()
        run_dir.check(config, MANIFESTS)
        run_dir.describe(config, MANIFESTS, ["cat", "dog"])
        run_dir.check(config, MANIFESTS)

    def test_another_configuration_is_refused_with_each_difference(self, config, started):
        changed = replace(config, seed=5, gate=replace(config.gate, target_rate=0.3))
        message = complaint(run_dir.check, changed, {**MANIFESTS, "train": "c" * 64})
        assert "gate.target_rate: 0.6 → 0.3" in message and "seed: 0 → 5" in message
        assert f"manifest.train: {'a' * 64} → {'c' * 64}" in message

    def test_a_restarted_worker_goes_on_whatever_resume_says(self, config, started, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
        Lease(started, run_dir.launch_id()).release()
        for resume in ("auto", "must", "never"):
            run_dir.check(replace(config, resume=resume), MANIFESTS)
        complaint(run_dir.check, replace(config, resume="never", seed=5), MANIFESTS)

    def test_each_start_without_a_launcher_is_a_new_one(self):
        assert run_dir.launch_id() != run_dir.launch_id()

    def test_never_starts_anew_whatever_stands_there(self, config, started):
        run_dir.check(replace(config, resume="never", seed=5), MANIFESTS)

    def test_a_run_begun_anew_has_another_identity_and_one_that_goes_on_keeps_its_own(self, config, started):
        first = run_dir.identity(started)
        run_dir.take(config, MANIFESTS, ["cat", "dog"]).release()
        assert run_dir.identity(started) == first is not None
        run_dir.take(replace(config, resume="never"), MANIFESTS, ["cat", "dog"]).release()
        assert run_dir.identity(started) not in (first, None)
        [aside] = [path for path in started.parent.iterdir() if run_dir.is_aside(path.name)]
        assert run_dir.identity(aside) == first

    def test_must_refuses_where_there_is_no_run_or_no_checkpoint(self, config, tmp_path):
        must = replace(config, resume="must")
        assert "holds no run" in complaint(run_dir.check, must, MANIFESTS)
        (tmp_path / "run").mkdir()
        run_dir.describe(config, MANIFESTS, ["cat", "dog"])
        assert "holds no checkpoint" in complaint(run_dir.check, must, MANIFESTS)

    def test_a_folder_of_other_files_and_a_file_are_refused(self, config, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("")
        assert "thesis.tex" in complaint(run_dir.check, config, MANIFESTS)
        a_file = replace(config, run_dir=str(tmp_path / "run" / "thesis.tex"))
        assert "this is a file" in complaint(run_dir.check, a_file, MANIFESTS)

    @pytest.mark.parametrize("text", ["", "a: [b", "just words"])
    def test_a_configuration_that_cannot_be_read_is_told(self, config, started, text):
        (started / "config.yaml").write_text(text)
        assert "config.yaml" in complaint(run_dir.check, config, MANIFESTS)

    def test_checking_writes_nothing(self, config, tmp_path):
        run_dir.check(config, MANIFESTS)
        assert list(tmp_path.iterdir()) == []

    def test_archiving_moves_a_run_aside_whole_and_never_onto_another(self, started):
        (started / "metrics.jsonl").write_text("kept")
        first = run_dir.archive(started)
        assert not started.exists() and (first / "metrics.jsonl").read_text() == "kept"
        started.mkdir()
        assert run_dir.archive(started) != first and first.is_dir()

    def test_what_is_written_down_is_the_configuration_and_the_versions(self, config, started):
        written = yaml.safe_load((started / "config.yaml").read_text())
        assert written["gate"]["target_rate"] == 0.6 and written["manifest"] == MANIFESTS
        assert yaml.safe_load((started / "env.json").read_text())["torch"]
        assert not list(started.glob(".*"))
