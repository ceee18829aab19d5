"""Functions of the user's own are called with the rows, and no failure of theirs gets out."""

import pytest

from ast_dist.errors import UserError
from ast_dist.track.callbacks import Callbacks, load


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="hooks.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return to_file


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("def on_step(row:\n    pass\n", "line 1: '(' was never closed"),
        ("x = 1\n\nx / 0\n", ", line 3: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", ", line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(0)\n", ", line 1: SystemExit: 0"),
        ("def on_steps(row):\n    pass\n", "has none of on_step, on_epoch, on_checkpoint"),
        ("on_epoch = 3\n", "on_epoch is a int"),
        ("def on_epoch():\n    pass\n", "on_epoch must take one argument"),
        ("def on_epoch(row, model):\n    pass\n", "on_epoch must take one argument"),
    ],
)
def test_a_file_that_cannot_be_called_is_refused_in_one_line(write, tmp_path, text, told):
    path = str(tmp_path / "absent.py") if text is None else write(text)
    with pytest.raises(UserError) as refused:
        load(path)
    assert str(refused.value).startswith(f"track.callbacks {path}") and told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_no_python_file_is_refused(write):
    with pytest.raises(UserError, match=r"not a \.py file"):
        load(write("def on_step(row): pass\n", "hooks.txt"))


def test_each_function_gets_a_copy_of_what_it_is_told(write):
    path = write("seen = []\ndef on_step(row, *more, factor=2):\n    seen.append(dict(row))\n    row.clear()\n")
    said = []
    callbacks = Callbacks(path, said.append)
    row = {"global_step": 1}
    callbacks.call("on_step", row)
    callbacks.call("on_epoch", row)
    assert load(path)["on_step"].__globals__["seen"] == [{"global_step": 1}]
    assert row == {"global_step": 1} and said == []


@pytest.mark.parametrize("end", ["1 / 0", "raise SystemExit(3)"])
def test_one_that_fails_is_named_with_its_line_once_and_not_called_again(write, end):
    path = write(
        f"calls = []\ndef helper():\n    {end}\ndef on_step(row):\n    calls.append(row)\n    helper()\n"
        "def on_epoch(row):\n    calls.append(row)\n"
    )
    said = []
    callbacks = Callbacks(path, said.append)
    for _ in range(3):
        callbacks.call("on_step", {"kind": "step"})
        callbacks.call("on_epoch", {"kind": "epoch"})
    assert [row["kind"] for row in load(path)["on_step"].__globals__["calls"]] == ["step", *["epoch"] * 3]
    assert len(said) == 1 and said[0].startswith(f"{path}: on_step, line 3: ")
    assert said[0].endswith("It is not called again. Training goes on.")


def test_ctrl_c_in_one_is_meant_for_the_training(write):
    callbacks = Callbacks(write("def on_step(row):\n    raise KeyboardInterrupt\n"), print)
    with pytest.raises(KeyboardInterrupt):
        callbacks.call("on_step", {})


@pytest.mark.parametrize(("took_s", "is_told"), [(0.9, False), (1.1, True)])
def test_slow_ones_are_told_once(write, took_s, is_told):
    path = write("def on_step(row):\n    row['clock'][0] += row['took_s']\n")
    clock, said = [0.0], []
    callbacks = Callbacks(path, said.append, now=lambda: clock[0])
    callbacks.call("on_step", {"clock": clock, "took_s": 10.0})
    assert said == [], "opening a file at the start is no habit"
    callbacks = Callbacks(path, said.append, now=lambda: clock[0])
    for _ in range(3):
        clock[0] += 100.0 - took_s
        callbacks.call("on_step", {"clock": clock, "took_s": took_s})
    assert [f"({took_s:.1f}%)" in text and "training waits for them" in text for text in said] == [True] * is_told
