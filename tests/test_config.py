"""ast_dist/config.py: presets, YAML and arguments become one configuration, and every mistake one line."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

import ast_dist.config
from ast_dist.command_line import parse, preset_names
from ast_dist.config import Config, differences, to_dict
from ast_dist.errors import UserError, run_command

SOURCE = Path(ast_dist.config.__file__)
NEEDED = ["--run-dir", "run", "--data.train", "t", "--data.val", "v"]


@pytest.fixture
def in_yaml(tmp_path):
    """Parses YAML text as --config, with arguments behind it."""

    def parse_text(text, *arguments):
        (tmp_path / "settings.yaml").write_text(text)
        return parse([*NEEDED, "--config", str(tmp_path / "settings.yaml"), *arguments])

    return parse_text


def complaint(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def on_the_command_line(*arguments):
    return parse([*NEEDED, *arguments])


class TestPrecedence:
    def test_arguments_win_over_yaml_and_yaml_over_the_preset_and_the_preset_over_defaults(self, in_yaml):
        default = on_the_command_line()
        assert (default.loop.epochs, default.optim.lr, default.data.image_size) == (30, 0.5, 224)
        preset = yaml.safe_load((SOURCE.parent / "presets" / "digits.yaml").read_text())
        config = in_yaml("{optim: {lr: 0.03}, loop: {epochs: 7}}", "--preset", "digits", "--loop.epochs", "3")
        assert config.loop.epochs == 3
        assert config.optim.lr == 0.03
        assert config.data.image_size == preset["data"]["image_size"] != 224
        assert config.checkpoint.keep_last == default.checkpoint.keep_last

    def test_where_a_setting_stands_among_the_arguments_matters_only_to_its_own_repetitions(self, in_yaml, tmp_path):
        config = in_yaml("loop: {epochs: 7}", "--preset", "digits")
        before = parse(["--loop.epochs", "3", "--config", str(tmp_path / "settings.yaml"), *NEEDED])
        assert config.loop.epochs == 7 and before.loop.epochs == 3
        assert on_the_command_line("--loop.epochs", "3", "--loop.epochs=4").loop.epochs == 4

    @pytest.mark.parametrize("word", ["flip", "no-flip"])
    def test_flags_follow_the_last_word_too(self, in_yaml, word):
        for text in ("data: {flip: true}", "data: {flip: no}", "data: {flip: false}", "data: {flip: on}"):
            assert in_yaml(text, f"--data.{word}").data.flip is (word == "flip")

    def test_lists_follow_the_last_word_too(self, in_yaml):
        text = "data: {mean: [0.1, -0.2, 0.3]}"
        assert in_yaml(text).data.mean == (0.1, -0.2, 0.3)
        assert in_yaml(text, "--data.mean", "1", "2", "3").data.mean == (1.0, 2.0, 3.0)

    def test_a_limit_that_only_the_whole_configuration_meets_is_judged_on_the_whole(self, in_yaml):
        assert in_yaml("gate: {p_min: 0.5}", "--gate.target-rate", "0.6").gate.p_min == 0.5

    def test_a_preset_may_be_named_in_yaml(self, in_yaml):
        config = in_yaml("{preset: digits, loop: {epochs: 7}}")
        assert config.preset == "digits" and config.data.image_size == 16 and config.loop.epochs == 7
        assert in_yaml("preset: null").preset is None


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name):
    assert on_the_command_line("--preset", name).preset == name


def test_the_last_config_file_counts(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(f"seed: {number}")
    assert on_the_command_line(f"--config={tmp_path}/1.yaml", "--config", f"{tmp_path}/2.yaml").seed == 2


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "section", "name", "value"),
        [
            ("optim: {lr: 5e-5}", "optim", "lr", 5e-5),  # which YAML 1.1 takes for text
            ("optim: {lr: 1}", "optim", "lr", 1.0),
            ("track: {wandb: off}", "track", "wandb", "off"),  # … and this for false
            ("track: {wandb: 'off'}", "track", "wandb", "off"),
            ("data: {cache: none}", "data", "cache", "none"),
            ("data: {auto_augment: none}", "data", "auto_augment", "none"),
            ("data: {color_jitter: [0.4, 0.4, 0.4, 0.1]}", "data", "color_jitter", (0.4, 0.4, 0.4, 0.1)),
            ("data: {color_jitter: [1, 1, 1, 0]}", "data", "color_jitter", (1.0, 1.0, 1.0, 0.0)),
            ("data: {flip: off}", "data", "flip", False),
            ("data:\n  flip: no\n", "data", "flip", False),
            ("loop: {compile: true}", "loop", "compile", True),
            ("track: {wandb_project: '--quiet'}", "track", "wandb_project", "--quiet"),
            ("track: {wandb_project: two words}", "track", "wandb_project", "two words"),
            ("gate.target_rate: 0.33", "gate", "target_rate", 0.33),
            ("gate: {target-rate: 0.33}", "gate", "target_rate", 0.33),
            ("gate:\n  # all of it commented out\n", "gate", "target_rate", 0.6),
            ("# nothing\n", "gate", "target_rate", 0.6),
        ],
    )
    def test_values_arrive_as_they_are_meant(self, in_yaml, text, section, name, value):
        found = getattr(getattr(in_yaml(text), section), name)
        assert found == value and type(found) is type(value)

    def test_top_level_flags_work(self, in_yaml):
        assert in_yaml("{dry_run: true, seed: 4}").dry_run is True
        assert in_yaml("dry_run: false").dry_run is False

    def test_a_whole_configuration_comes_back_from_its_own_yaml(self, in_yaml):
        config = on_the_command_line("--preset", "digits", "--seed", "3", "--gate.ki", "1e-5", "--track.quiet")
        again = in_yaml(yaml.safe_dump(to_dict(config)))
        assert dataclasses.replace(again, config=None) == config


class TestMistakes:
    @pytest.mark.parametrize(
        ("yaml_text", "argument", "hint"),
        [
            ("gate: {taget_rate: 0.3}", "--gate.taget-rate=0.3", "--gate.target-rate"),
            ("data: {flp: false}", "--data.no-flp", "--data.no-flip"),
            ("dry_rnu: true", "--dry-rnu", "--dry-run"),
            ("optm: {lr: 1}", "--optm.lr=1", "--optim.lr"),
            ("data: {mena: [1, 2, 3]}", "--data.mena", "--data.mean"),
        ],
    )
    def test_a_typo_gets_the_same_answer_in_yaml_and_on_the_command_line(self, in_yaml, yaml_text, argument, hint):
        typed = complaint(on_the_command_line, argument)
        assert argument.split("=")[0] in typed
        assert re.search(f"Perhaps you meant:.*{hint}", typed)
        written = complaint(in_yaml, yaml_text)
        assert re.search(rf"settings\.yaml: .*{argument.split('=')[0]}.*Perhaps you meant:.*{hint}", written)

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("gate: {target_rate: 2}", "gate.target_rate is 2, not in (0, 1]."),
            ("loop: {epochs: 3.5}", "loop.epochs: invalid literal for int() with base 10: '3.5'"),
            ("data: {crop: foo}", "'foo' for argument '--data.crop'. Expected one of ('resized', 'padded', 'none')"),
            ("data: {mean: [1, 2]}", "'--data.mean'. Expected 3 values"),
            ("gate: 3", "--gate=3"),
            ("[1, 2]", "found a list"),
            ("a: [b", "not valid YAML"),
        ],
    )
    def test_a_wrong_value_in_yaml_is_told_with_the_files_name(self, in_yaml, text, named):
        message = complaint(in_yaml, text)
        assert "settings.yaml: " in message and named in message

    def test_the_users_own_mistake_is_not_blamed_on_the_file(self, in_yaml):
        message = complaint(in_yaml, "seed: 1", "--gate.target-rate", "2")
        assert message == "gate.target_rate is 2, not in (0, 1]."

    def test_a_mistake_in_the_file_is_named_even_where_the_run_dir_is_missing(self, tmp_path):
        (tmp_path / "settings.yaml").write_text("gate: {taget_rate: 1}")
        assert "settings.yaml: " in complaint(parse, ["--config", str(tmp_path / "settings.yaml")])

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--preset", "digit"], "--preset digit: no such preset. There are: "),
            (["--preset"], "'--preset'"),
            (["--config", "no/such.yaml"], "--config no/such.yaml: cannot be read"),
            (["--config", "."], "--config .: cannot be read"),
            (["stray"], "stray"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments, named):
        assert named in complaint(on_the_command_line, *arguments)

    @pytest.mark.parametrize(
        ("missing", "named"), [(0, "--run-dir is missing"), (2, "--data.train is"), (4, "--data.val is")]
    )
    def test_what_a_run_cannot_do_without_is_asked_for(self, missing, named):
        assert named in complaint(parse, NEEDED[:missing] + NEEDED[missing + 2 :])

    @pytest.mark.parametrize(
        "setting",
        [
            *("data.image-size=0", "data.crop-scale-min=0", "data.crop-scale-min=1.1", "data.val-crop-ratio=0"),
            *("data.crop-pad-px=-1", "data.threads=-1", "data.prefetch-batches=0", "data.damaged-limit=1.5"),
            *("data.randaugment-ops=0", "data.randaugment-magnitude=31", "data.randaugment-magnitude=-1"),
            *("data.erase-share=1.5", "data.erase-share=-0.1"),
            *("model.num-classes=-1", "model.width=12", "model.width=0"),
            *("optim.lr=0", "optim.lr=nan", "optim.momentum=1", "optim.weight-decay=-1", "optim.warmup-epochs=-1"),
            *("optim.label-smoothing=1", "optim.clip-grad-norm=-1"),
            *("gate.target-rate=0", "gate.target-rate=1.01", "gate.p-min=0.7", "gate.p-min=-0.1", "gate.ki=-1"),
            *("gate.warmup-epochs=-1", "gate.anneal-share=1.1", "gate.memory-decay=1", "gate.loss-weight=-1"),
            *("loop.epochs=0", "loop.global-batch-size=0", "loop.eval-every-epochs=0"),
            *("checkpoint.every-s=-1", "checkpoint.every-steps=-1", "checkpoint.keep-last=0", "checkpoint.grace-s=0"),
            *("session.hours=-1", "track.every-steps=0"),
        ],
    )
    def test_every_range_is_held_and_told_with_the_value(self, setting):
        name, value = setting.split("=")
        message = complaint(on_the_command_line, f"--{setting}")
        assert message.startswith(f"{name.replace('-', '_')} is {value}")

    def test_a_std_of_zero_is_refused(self):
        assert "data.std" in complaint(on_the_command_line, "--data.std", "1", "0", "1")

    @pytest.mark.parametrize(
        ("setting", "named"),
        [
            ("data.color-jitter -0.1 0 0 0", "brightness is -0.1, but must be at least 0 and finite."),
            ("data.color-jitter 0 inf 0 0", "contrast is inf, but must be at least 0 and finite."),
            ("data.color-jitter 0 0 nan 0", "saturation is nan, but must be at least 0 and finite."),
            ("data.color-jitter 0 0 0 0.6", "hue is 0.6, but must be in 0 … 0.5."),
            ("data.erase-scale 0.3 0.2", "0 ≤ least ≤ largest ≤ 1."),
            ("data.erase-scale 0.3 1.2", "0 ≤ least ≤ largest ≤ 1."),
            ("data.erase-ratio 0 1", "0 < least ≤ largest"),
            ("data.erase-ratio 2 1", "0 < least ≤ largest"),
        ],
    )
    def test_ranges_of_values_that_belong_together_are_held(self, setting, named):
        name, *values = setting.split()
        message = complaint(on_the_command_line, f"--{name}", *values)
        assert message.startswith(f"{name.replace('-', '_')} is ({', '.join(str(float(v)) for v in values)})")
        assert named in message

    def test_bounds_themselves_are_allowed(self):
        settings = ["gate.target-rate=1", "gate.p-min=1", "gate.anneal-share=1", "data.val-crop-ratio=1"]
        on_the_command_line(*(f"--{setting}" for setting in settings))
        on_the_command_line("--gate.target-rate=0.3", "--gate.p-min=0.3", "--gate.memory-decay=0")
        on_the_command_line("--data.color-jitter", "2", "0", "0", "0.5", "--data.erase-scale", "0", "1")
        on_the_command_line("--data.randaugment-magnitude=30", "--data.erase-share=1", "--data.erase-ratio", "1", "1")


class TestDifferences:
    def test_changed_settings_are_named_with_both_values(self):
        old, new = to_dict(on_the_command_line()), to_dict(on_the_command_line("--gate.ki=0.1", "--seed=4"))
        assert differences(old, new) == ["gate.ki: 0.05 → 0.1", "seed: 0 → 4"]

    def test_settings_on_which_no_weight_depends_may_change(self):
        free = ["--run-dir=x", "--data.train=x", "--data.val=x", "--data.cache=none", "--data.cache-mb=1"]
        free += ["--data.threads=3", "--data.prefetch-batches=9", "--data.damaged-limit=0.5", "--resume=must"]
        free += ["--loop.eval-every-epochs=2", "--checkpoint.every-s=1", "--session.hours=1", "--track.quiet"]
        assert differences(to_dict(on_the_command_line()), to_dict(on_the_command_line(*free))) == []

    @pytest.mark.parametrize(
        "setting",
        [
            *("data.auto-augment=randaugment", "data.randaugment-ops=3", "data.erase-share=0.1"),
            *("data.image-size=32", "data.no-flip", "data.crop=none", "model.name=resnet18", "model.norm=group"),
            *(
                "optim.lr=0.3",
                "gate.policy=full",
                "loop.epochs=31",
                "loop.global-batch-size=128",
                "loop.precision=bf16",
            ),
        ],
    )
    def test_settings_on_which_weights_depend_may_not(self, setting):
        found = differences(to_dict(on_the_command_line()), to_dict(on_the_command_line(f"--{setting}")))
        assert len(found) == 1

    def test_yaml_and_back_makes_no_difference(self):
        config = to_dict(on_the_command_line("--optim.lr=0.1", "--optim.weight-decay=5e-5"))
        assert differences(yaml.safe_load(yaml.safe_dump(config)), config) == []

    def test_a_setting_that_a_run_of_an_older_version_lacks_had_its_default(self):
        new = to_dict(on_the_command_line())
        old = {**new, "gate": {k: v for k, v in new["gate"].items() if k != "ki"}}
        assert differences(old, new) == []
        assert differences(old, to_dict(on_the_command_line("--gate.ki=0.1"))) == ["gate.ki: 0.05 → 0.1"]
        without_section = {key: value for key, value in new.items() if key != "gate"}
        assert differences(without_section, new) == []
        changed = to_dict(on_the_command_line("--gate.ki=0.1"))
        assert differences(without_section, changed) == ["gate.ki: 0.05 → 0.1"]
        assert differences(new, {**new, "manifest": {"train": "0f"}}) == ["manifest.train: None → 0f"]

    def test_a_setting_of_a_newer_version_is_a_difference_that_an_upgrade_mends(self):
        new = to_dict(on_the_command_line())
        [said] = differences({**new, "gate": {**new["gate"], "depth": 3}}, new)
        assert said.startswith("gate.depth: 3 → unknown here") and "upgrade ast-dist" in said


def test_a_configuration_cannot_be_changed():
    config = on_the_command_line()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_every_setting_has_its_help():
    """tyro shows the text under a field as its help; --help is where people look first."""
    sections = [field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
    for kind in sections:
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            assert re.search(rf'^    {field.name}: .*\n    """\w', source, re.MULTILINE), field.name


def test_a_command_ends_with_2_and_one_line_for_a_mistake(capsys):
    assert run_command(lambda argv: parse(argv) and 0, [*NEEDED, "--gate.target-rate", "2"]) == 2
    assert capsys.readouterr().err == "error: gate.target_rate is 2, not in (0, 1].\n"


def test_only_local_rank_0_tells_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(lambda argv: parse(argv) and 0, []) == 2
    assert capsys.readouterr().err == ""


def test_other_errors_are_not_swallowed():
    def fail(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(fail, [])


def test_quiet_is_short_for_the_trackers_quiet_and_the_last_word_wins() -> None:
    assert on_the_command_line("--quiet").track.quiet
    assert not on_the_command_line("--quiet", "--track.no-quiet").track.quiet
    assert not on_the_command_line("--track.quiet", "--no-quiet").track.quiet
