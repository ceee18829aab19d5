"""`ast-dist COMMAND …`."""

import importlib
import subprocess
import sys

import pytest

import ast_dist
from ast_dist.cli import COMMANDS, main


def ast_dist_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ast_dist", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_module_with_a_main(command):
    module, _ = COMMANDS[command]
    assert callable(importlib.import_module(module).main)


def test_python_dash_m_is_the_same_as_the_entry_point(capsys):
    for arguments in (["--version"], ["--help"]):
        by_module = ast_dist_command(*arguments)
        assert main(arguments) == by_module.returncode == 0
        assert capsys.readouterr().out == by_module.stdout


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ast-dist {ast_dist.__version__}\n"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert first_words == list(COMMANDS)


def test_no_command_prints_help_on_stderr_and_is_a_mistake(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "usage: ast-dist COMMAND" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "train"), ("make_shards", "make-shards"), ("statu", "status"), ("Doctor", "doctor")]
)
def test_a_mistyped_command_gets_one_line_with_the_nearest(typed, meant, capsys):
    assert main([typed]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"ast-dist {typed}: no such command. Did you mean {meant}?" in printed


def test_an_unknown_command_near_to_none_gets_the_list(capsys):
    assert main(["xyzzy"]) == 2
    printed = capsys.readouterr().err
    assert "Did you mean" not in printed
    assert all(command in printed for command in COMMANDS)


def test_arguments_reach_the_command_and_its_exit_code_comes_back(tmp_path):
    ended = ast_dist_command("status", str(tmp_path / "no-such-run"))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "no-such-run" in ended.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["nonsense"], ["status", "no-such-run"]])
def test_commands_that_train_nothing_do_not_load_torch(arguments):
    program = f"import sys; from ast_dist.cli import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
