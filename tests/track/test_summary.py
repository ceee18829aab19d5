"""The last words: three figures apart, where everything is, and commands that can be typed as they stand."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ast_dist.track.command import typed_command
from ast_dist.track.summary import summary

PROGRESS = {"state": "finished", "total_s": 75.0, "best_acc1": 91.0, "last_acc1": 90.5, "checkpoint": "step-00000020"}
PRINT_IT = "from ast_dist.track.command import typed_command\nprint(typed_command())\n"


def test_skipped_samples_flops_and_joules_are_three_figures_and_what_was_not_measured_is_said(tmp_path):
    told = summary(tmp_path, PROGRESS, {"cost/samples_skipped": 14712, "cost/flops_saved": 0.512})
    assert {key: told[key] for key in ("samples skipped", "FLOPs saved", "GPU joules")} == {
        "samples skipped": "14,712",
        "FLOPs saved": "51.2 %",
        "GPU joules": "not measured",
    }
    measured = summary(
        tmp_path, PROGRESS, {"cost/samples_skipped": 0, "cost/flops_saved": 0, "cost/gpu_joules": 1234.5}
    )
    assert measured["GPU joules"] == "1,234" and measured["FLOPs saved"] == "0.0 %"
    assert not any("energy" in key.lower() for key in told)


def test_every_command_that_is_named_exists_and_survives_a_shell(tmp_path):
    run_dir = tmp_path / "a run, with 'quotes'"
    run_dir.mkdir()
    told = summary(run_dir, PROGRESS, {})
    for name in ("look", "report", "evaluate", "export"):
        python, dash_m, module, run, *_ = shlex.split(told[name])
        assert (python, dash_m, run) == ("python", "-m", str(run_dir))
        assert importlib.util.find_spec(module) or module == "ast_dist.report"
    assert "go on" not in told


def test_a_paused_run_says_what_is_left_and_the_command_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("AST_DIST_COMMAND", "launch/torchrun.sh -m ast_dist.train --run-dir 'my run'")
    left = {"eta_s": 31.0, "eta_low_s": 28.0, "eta_high_s": 40.0, "sessions_left_low": 1, "sessions_left_high": 2}
    paused = {**PROGRESS, **left, "state": "paused", "message": "session deadline: saved", "session_hours": 8.5}
    told = summary(tmp_path, paused, {})
    assert told["state"] == "paused after 1:15: session deadline: saved"
    assert told["left"] == "0:31 left (0:28 to 0:40), 1 to 2 more of 8.5 h"
    assert told["go on"] == "launch/torchrun.sh -m ast_dist.train --run-dir 'my run'"
    failed = summary(tmp_path, {**paused, "state": "failed", "needs_person": True}, {})
    assert failed["go on"].startswith("mend it, then launch/torchrun.sh")


def test_only_files_that_are_there_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    assert summary(tmp_path, PROGRESS, {})["files"] == f"{tmp_path}/metrics.jsonl, {tmp_path}/checkpoints"


def without_agent():
    return {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "AST_DIST"))}


@pytest.mark.parametrize(
    "typed", [["say.py", "--run-dir", "a run"], ["-u", "-m", "say", "-x"], ["-X", "dev", "say.py"]]
)
def test_the_typed_command_is_the_one_that_was_typed(tmp_path, typed):
    (tmp_path / "say.py").write_text(PRINT_IT)
    env = without_agent() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *typed]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env).stdout
    assert shlex.split(printed) == command


@pytest.mark.parametrize("words", [["-c", PRINT_IT], ["-"]])
def test_what_cannot_be_typed_again_is_no_command(words):
    env = without_agent() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *words]
    ended = subprocess.run(command, input=PRINT_IT, capture_output=True, text=True, check=True, env=env)
    assert ended.stdout == "None\n"


def test_a_worker_of_torchrun_names_torchrun_and_its_options(tmp_path, monkeypatch):
    # A stand-in for the agent: a process with torchrun's name and arguments that starts one worker.
    agent = tmp_path / "torchrun"
    agent.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {PRINT_IT!r}], check=True)\n")
    env = without_agent() | {"PYTHONPATH": os.pathsep.join(sys.path), "TORCHELASTIC_RUN_ID": "job"}
    options = ["--standalone", "--nproc_per_node=2", "-m", "ast_dist.train", "--run-dir", "a run"]
    command = [sys.executable, str(agent), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert printed == "torchrun --standalone --nproc_per_node=2 -m ast_dist.train --run-dir 'a run'\n"


def test_launchers_hand_their_own_command_to_the_workers(tmp_path):
    root = Path(__file__).parents[2]
    say = tmp_path / "say.py"
    say.write_text(PRINT_IT)
    env = without_agent() | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "PYTHON": sys.executable}
    launcher = [str(root / "launch" / "torchrun.sh"), "--nproc-per-node=1", str(say), "--note", "two words"]
    printed = subprocess.run(launcher, capture_output=True, text=True, check=True, env=env).stdout
    assert shlex.split(printed) == launcher
    supervised = [str(root / "launch" / "supervise"), *launcher]
    # It takes the end of workers that never said that they are trainings for a failure; what they print is the claim.
    printed = subprocess.run(supervised, capture_output=True, text=True, check=False, env=env).stdout
    said = next(line for line in printed.splitlines() if "say.py" in line)
    assert shlex.split(said)[-len(launcher) :] == launcher and "ast_dist.supervise" in said


def test_the_present_process_is_no_torchrun_worker(monkeypatch):
    for variable in ("TORCHELASTIC_RUN_ID", "AST_DIST_COMMAND"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["/env/bin/python", "/env/bin/ast-dist", "train", "--run-dir", "r"])
    assert typed_command() == "ast-dist train --run-dir r"
