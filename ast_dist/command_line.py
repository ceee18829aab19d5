"""From command-line arguments, presets and YAML files to a configuration.

`--preset NAME` and `--config FILE.yaml` are flattened into arguments that stand before the user's own, so the last
word wins and a typo gets the same answer wherever it was made.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ast_dist.arguments import parse_arguments
from ast_dist.config import Config
from ast_dist.errors import UserError

# Settings that are typed so often that a short form is known, too.
_SHORT = {"--quiet": "--track.quiet", "--no-quiet": "--track.no-quiet"}


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.name[:-5] for p in resources.files("ast_dist.presets").iterdir() if p.name.endswith(".yaml"))


def parse(argv: Sequence[str], prog: str = "python -m ast_dist.train") -> Config:
    """Build the configuration from command-line arguments.

    Raises UserError, in one line, for an unknown key (with the nearest known one), a value of the wrong type or
    outside its range, an unknown preset or an unreadable YAML file. `--help` prints and raises SystemExit(0).
    """
    argv = [_SHORT.get(word, word) for word in argv]
    in_preset: list[str] = []
    in_file: list[str] = []
    config_file = _last_value(argv, "--config")
    if config_file is not None:
        try:
            text = Path(config_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {config_file}: cannot be read ({error}).") from None
        in_file = _yaml_to_argv(text, config_file)
    preset = _last_value([*in_file, *argv], "--preset")
    if preset not in (None, "None"):
        if preset not in preset_names():
            raise UserError(f"--preset {preset}: no such preset. There are: {', '.join(preset_names())}.")
        text = resources.files("ast_dist.presets").joinpath(f"{preset}.yaml").read_text(encoding="utf-8")
        in_preset = _yaml_to_argv(text, f"preset {preset}")
    try:
        return parse_arguments(Config, [*in_preset, *in_file, *argv], prog)
    except UserError as error:
        needed = ["--run-dir=x", "--data.train=x", "--data.val=x"]
        if in_file and str(error) == _complaint([*in_preset, *in_file, *needed], prog):
            raise UserError(f"{config_file}: {error}") from None
        raise


def settings_to_argv(settings: dict[str, Any]) -> list[str]:
    """Settings as a preset has them, as arguments: {"gate": {"target_rate": 0.3}} → ["--gate.target-rate=0.3"]."""
    return list(_flatten(settings, ""))


def _complaint(argv: Sequence[str], prog: str) -> str | None:
    """What is wrong with arguments, if anything."""
    try:
        parse_arguments(Config, argv, prog)
    except UserError as error:
        return str(error)
    return None


def _last_value(argv: Sequence[str], flag: str) -> str | None:
    """The value that `flag` was last given, as `--flag VALUE` or `--flag=VALUE`."""
    value = None
    for position, word in enumerate(argv):
        if word == flag and position + 1 < len(argv):
            value = argv[position + 1]
        elif word.startswith(f"{flag}="):
            value = word.split("=", 1)[1]
    return value


def _yaml_to_argv(text: str, source: str) -> list[str]:
    """Flatten YAML settings into arguments: {gate: {target_rate: 0.3}} → ["--gate.target-rate=0.3"]."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML ({' '.join(str(error).split())}).") from None
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected keys like `gate: {{target_rate: 0.3}}`, found a {type(tree).__name__}.")
    # A run's own config.yaml also states its data's hashes; the rest of it can start another run.
    tree.pop("manifest", None)
    try:
        return to_argv(tree)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def to_argv(settings: dict[str, Any]) -> list[str]:
    """Flatten settings into arguments: {"gate": {"target_rate": 0.3}} → ["--gate.target-rate=0.3"].

    settings: sections are dicts; names are the command line's, with `_` or `-`. Values are turned into text by `str`;
    lists and tuples into as many words. None leaves a section as it is; raises UserError for a setting that must have
    a value.
    """
    return list(_flatten(settings, ""))


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        kind = _type_of(f"{prefix}{key}")
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is None and dataclasses.is_dataclass(kind):
            continue  # a section whose settings are all commented out
        elif value is None and kind is not None and type(None) not in typing.get_args(kind):
            raise UserError(f"{prefix}{key} has no value. Give it one, or leave it out to have its default.")
        elif isinstance(value, bool) and kind in (bool, None):
            head, _, leaf = name.rpartition(".")
            yield f"--{name}" if value else f"--{head + '.' if head else ''}no-{leaf}"
        elif isinstance(value, bool):  # YAML takes a bare off for false, and `track.wandb: off` is meant
            yield f"--{name}={'on' if value else 'off'}"
        elif isinstance(value, list | tuple):
            yield f"--{name}"
            yield from map(str, value)
        else:
            yield f"--{name}={value}"


def _type_of(name: str) -> Any:
    """The type of a setting or section by its dotted name; None where there is none."""
    kind: Any = Config
    for part in name.replace("-", "_").split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        kind = {field.name: field.type for field in dataclasses.fields(kind)}.get(part)
    return kind
