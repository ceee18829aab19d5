"""Claims about launch/: what is refused before anything starts, and what torchrun is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ast_dist import outcome_file
from ast_dist.errors import run_command
from ast_dist.supervise import main
from tests.launching import ROOT, finish, start

SHOWS_ITS_WORDS = """#!/bin/sh
if [ "$1" = - ]; then exec {python} "$@"; fi
printf '%s\\n' "$@" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$AST_DIST_LAUNCH" "$OMP_NUM_THREADS"
"""


def torchrun(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run launch/torchrun.sh with no variable of its own set but these."""
    own = ("NNODES", "NPROC", "RDZV", "MAX_RESTARTS", "LOCAL_ADDR", "SLURM", "OMP", "PYTHON", "AST_DIST", "TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environment = {"PYTHON": sys.executable, **kept, **variables}
    return subprocess.run(
        ["launch/torchrun.sh", *words], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60
    )


@pytest.fixture
def shown(tmp_path: Path) -> dict[str, str]:
    """An interpreter that prints what it was told to run."""
    program = tmp_path / "python"
    program.write_text(SHOWS_ITS_WORDS.format(python=sys.executable))
    program.chmod(0o755)
    return {"PYTHON": str(program)}


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        ([], {}, "nothing to run"),
        (["--nnodes=3:2", "-m", "x"], {}, "at least 3 hosts, but at most 2"),
        (["--nnodes=0", "-m", "x"], {}, "--nnodes=0: expected N or MIN:MAX"),
        (["-m", "x"], {"NNODES": "two"}, "--nnodes=two: expected"),
        (["--nproc-per-node=many", "-m", "x"], {}, "--nproc-per-node=many: expected a number"),
        (["--max-restarts=-1", "-m", "x"], {}, "--max-restarts=-1: expected a number"),
        (["--nnodes=2", "-m", "x"], {}, "several hosts need --rdzv-endpoint"),
        (["--nnodes=2", "--rdzv-endpoint=a:1", "-m", "x"], {}, "several hosts need --rdzv-id"),
        (["--nproc-per-node", "2", "-m", "x"], {}, "is written --OPTION=VALUE"),
        (["-m", "x"], {"PYTHON": "/nowhere/python"}, "/nowhere/python: no such program"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(words: list[str], variables: dict[str, str], says: str) -> None:
    ended = torchrun(*words, **variables)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: launch/torchrun.sh: ")
    assert says in ended.stderr


def test_one_host_gets_a_rendezvous_of_its_own_and_restarts(shown: dict[str, str]) -> None:
    words = torchrun("--nproc-per-node=2", "-m", "ast_dist.train", "--seed", "1", **shown).stdout.splitlines()
    assert {"--max-restarts=1000", "--nnodes=1", "--nproc-per-node=2", "--standalone"} <= set(words)
    assert words[-7:] == ["-m", "ast_dist.train", "--seed", "1", "", "", "1"]


def test_several_hosts_share_no_store_and_are_one_launch(shown: dict[str, str]) -> None:
    variables = {"NNODES": "1:4", "RDZV_ENDPOINT": "host0:1", "RDZV_CONF": "is_host=1", "SLURM_JOB_ID": "7"}
    words = torchrun("--max-restarts=5", "-m", "ast_dist.train", **variables, **shown).stdout.splitlines()
    assert {"--max-restarts=5", "--nnodes=1:4", "--rdzv-backend=c10d", "--rdzv-endpoint=host0:1"} <= set(words)
    assert "--rdzv-id=7" in words
    assert [word for word in words if word.startswith("--rdzv-conf=") and word.endswith(",is_host=1")]
    assert words[-5:] == ["-m", "ast_dist.train", "1", "torchrun 7", "1"]


def test_the_interpreter_may_not_have_torch(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    program.chmod(0o755)
    ended = torchrun("-m", "x", PYTHON=str(program))
    assert ended.returncode == 2
    assert "has no torch" in ended.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no command"),
        (["--"], "no command"),
        (["--max-stalled", "-1", "true"], "--max-stalled is -1"),
        (["--backoff-s", "-1", "true"], "--backoff-s is -1"),
    ],
)
def test_the_supervisor_refuses_in_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_command_that_cannot_be_started_is_not_tried_again() -> None:
    [line] = finish(start("-m", "ast_dist.supervise", "/nowhere/torchrun"), expected=2).splitlines()
    assert line.startswith("error: /nowhere/torchrun: cannot be started (No such file or directory)")


def test_without_a_supervisor_nobody_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(outcome_file.FILE_VARIABLE, raising=False)
    outcome_file.tell("finished")
    monkeypatch.setenv(outcome_file.FILE_VARIABLE, str(tmp_path / "outcomes"))
    outcome_file.tell("finished")
    assert not list(tmp_path.iterdir()), "a supervisor that is gone reads nothing"
    (tmp_path / "outcomes").touch()
    outcome_file.tell("refused", message="zwei\nZeilen")
    outcome_file.tell("paused", is_saved=True)
    told = outcome_file.read(tmp_path / "outcomes")
    assert [event["event"] for event in told] == ["refused", "paused"]
    assert told[0]["message"] == "zwei\nZeilen"
