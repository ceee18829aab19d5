"""Claims about the supervisor, with agents that do in milliseconds what torchrun's do in minutes."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ast_dist import outcome_file
from tests.launching import finish, start, wait_for

# Its N-th start does the N-th word (the last one from then on): `python AGENT RUN_DIR WORD …`.
AGENT = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from pathlib import Path
from ast_dist import outcome_file
from ast_dist.fault.lease import Lease

run_dir, words = Path(sys.argv[1]), sys.argv[2:]
with (run_dir / "starts").open("a") as starts:
    starts.write("x")
number = (run_dir / "starts").stat().st_size
word = words[min(number, len(words)) - 1]
if word == "idle":
    sys.exit(1)
if word == "two":
    sys.exit(2)
outcome_file.tell("started", run_dir=str(run_dir), restart=0)
if word == "gain":
    lease = Lease(run_dir, "launch")
    for step in range(1, 51):
        lease.beat(step)
        time.sleep(0.01)
elif word == "torn":
    with open(os.environ[outcome_file.FILE_VARIABLE], "a") as file:
        file.write('{"event": "finis')
elif word == "off":
    outcome_file.tell("refused", message="the server does not answer", may_pass=True)
elif word == "mistake":
    outcome_file.tell("refused", message="optim.lr is -1", may_pass=False)
    time.sleep(60)
elif word == "finish":
    outcome_file.tell("finished", message="", is_saved=True, is_deadline=False)
    sys.exit(0)
elif word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (
        outcome_file.tell("paused", message="", is_saved=True, is_deadline=False), sys.exit(1)))
    print("waits", flush=True)
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL)
"""

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "agent.py").write_text(AGENT)
    return folder


def supervise(run_dir: Path, *words: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    agent = [sys.executable, str(run_dir.parent / "agent.py"), str(run_dir), *words]
    return start("-m", "ast_dist.supervise", "--backoff-s=0.05", *options, "--", *agent)


def starts(run_dir: Path) -> int:
    return (run_dir / "starts").stat().st_size


def pauses_s(output: str) -> list[float]:
    return [float(text) for text in re.findall(r"starting it again in ([\d.]+) s", output)]


@pytest.mark.parametrize("state", ["finished", "paused"])
def test_what_the_session_before_wrote_is_not_taken_for_the_end_of_this_one(run_dir: Path, state: str) -> None:
    old = {"state": state, "message": "session deadline: saved, nothing lost; run the same command again"}
    (run_dir / "progress.json").write_text(json.dumps(old))
    finish(supervise(run_dir, "die", "die", "finish"))
    assert starts(run_dir) == 3


def test_pauses_double_where_no_step_is_gained_and_it_gives_up(run_dir: Path) -> None:
    output = finish(supervise(run_dir, "die", options=("--max-stalled=4", "--backoff-max-s=0.3")), expected=1)
    assert pauses_s(output) == [0.05, 0.1, 0.2, 0.3]
    assert "given up: no step beyond step 0 was gained in 4 restarts" in output


def test_pauses_double_also_where_no_worker_starts(run_dir: Path) -> None:
    job = supervise(run_dir, "gain", *["idle"] * 5, "finish", options=("--backoff-max-s=0.4",))
    assert pauses_s(finish(job)) == [0.05, 0.05, 0.1, 0.2, 0.4, 0.4]


def test_an_exit_code_that_says_mistake_is_not_tried_again(run_dir: Path) -> None:
    assert "no restart mends this" in finish(supervise(run_dir, "two"), expected=2)
    assert starts(run_dir) == 1


def test_a_mistake_ends_an_agent_that_would_go_on(run_dir: Path) -> None:
    assert finish(supervise(run_dir, "mistake"), expected=2).endswith("error: optim.lr is -1\n")
    assert starts(run_dir) == 1


def test_a_server_that_does_not_answer_is_tried_again_once_steps_were_gained(run_dir: Path) -> None:
    output = finish(supervise(run_dir, "gain", *["off"] * 6, "finish", options=("--backoff-max-s=0.1",)))
    assert starts(run_dir) == 8
    assert "the server does not answer" in output


def test_a_server_that_does_not_answer_at_the_first_start_is_for_a_person(run_dir: Path) -> None:
    assert "the server does not answer" in finish(supervise(run_dir, "off"), expected=2)


def test_a_torn_report_does_not_end_the_supervisor(run_dir: Path) -> None:
    finish(supervise(run_dir, "torn", "finish"))
    assert starts(run_dir) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_every_signal_that_asks_to_stop_lets_the_workers_save(run_dir: Path, number: signal.Signals) -> None:
    job = supervise(run_dir, "wait")
    assert job.stdout is not None
    assert job.stdout.readline() == "waits\n"
    job.send_signal(number)
    finish(job)
    assert starts(run_dir) == 1


def test_the_second_ctrl_c_does_not_wait(run_dir: Path) -> None:
    (run_dir.parent / "agent.py").write_text(DEAF)
    job = supervise(run_dir, "deaf")
    assert job.stdout is not None
    assert job.stdout.readline() == "deaf\n"

    def press_again() -> bool:
        job.send_signal(signal.SIGINT)
        return job.poll() is not None

    try:
        wait_for(press_again, "its end", job)
    finally:
        job.kill()
        job.communicate()


def test_a_line_after_a_torn_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcomes"
    path.write_text('{"event": "star')
    monkeypatch.setenv(outcome_file.FILE_VARIABLE, str(path))
    outcome_file.tell("finished")
    assert [event["event"] for event in outcome_file.read(path)] == ["finished"]
