"""metrics.jsonl holds whole rows of strict JSON, whatever is killed, full or damaged."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.errors import UserError
from ast_dist.track.history import History, encode, read, stream

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_a_row_is_one_line_and_comes_back_as_it_was(row):
    line = encode(row)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert json.loads(line) == row


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_what_is_not_a_number_is_null_in_strict_json_and_keeps_its_key(value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(encode({"train/loss": value}), parse_constant=refuse) == {"train/loss": None}


def test_numpy_scalars_are_numbers_and_what_json_cannot_hold_is_named():
    assert encode({"a": np.float64(0.5), "b": np.int64(3), "c": np.bool_(True)}) == b'{"a": 0.5, "b": 3, "c": true}\n'
    with pytest.raises(TypeError, match="gate/rate: a row cannot hold a ndarray"):
        encode({"gate/rate": np.zeros(2)})


def test_length_is_the_size_of_the_file_after_every_row(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    for step in range(5):
        history.append({"global_step": step, "text": "ä"})
        assert history.length == history.path.stat().st_size
        assert history.num_rows == step + 1
    assert history.sync() == history.length
    history.close()


def test_truncating_leaves_the_rows_of_the_checkpoint_and_goes_on_after_them(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    for step in range(10):
        history.append({"global_step": step})
        if step == 5:
            saved = history.length
    history.close()
    resumed = History(tmp_path / "metrics.jsonl")
    resumed.truncate(saved)
    assert (resumed.length, resumed.num_rows) == (saved, 6)
    resumed.append({"global_step": 6, "again": True})
    resumed.close()
    assert [row["global_step"] for row in read(resumed.path)] == list(range(7))


def test_a_file_shorter_than_the_checkpoint_states_is_refused_with_both_numbers(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.append({"global_step": 1})
    with pytest.raises(UserError, match="19 bytes, but the checkpoint was saved at 5,000") as refusal:
        history.truncate(5000)
    assert "\n" not in str(refusal.value)
    assert history.path.stat().st_size == 19
    history.close()


def test_a_length_inside_a_row_is_another_runs_and_refused(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.append({"global_step": 1})
    history.append({"global_step": 2})
    with pytest.raises(UserError, match="no row ends at byte 25"):
        history.truncate(25)
    assert len(read(history.path)) == 2
    history.close()


@given(cut=st.integers(1, 17))
def test_a_torn_last_line_is_passed_over_by_readers_and_cut_by_the_next_writer(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    path.write_bytes(b'{"global_step": 1}\n' + b'{"global_step": 2}\n'[:cut])
    assert read(path) == [{"global_step": 1}]
    history = History(path)
    history.append({"global_step": 3})
    history.close()
    assert read(path) == [{"global_step": 1}, {"global_step": 3}]


@pytest.mark.parametrize("damage", [b'{"global_step": ', b"\x00\x00\x00", b"", b"[1, 2]", b'"text"', b"[" * 100_000])
def test_damage_before_the_last_line_is_told_with_its_line_number(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n' + damage + b'\n{"a": 4}\n')
    with pytest.warns(RuntimeWarning, match=r"1 of 4 rows cannot be read \(line 3\)"):
        assert read(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_an_absent_file_has_no_rows(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
    assert list(stream(tmp_path / "metrics.jsonl")) == []


def test_rows_come_one_by_one_with_the_byte_behind_their_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": "\xc3\xa9"}\n{"a": 2}\n{"a"')
    found = list(stream(path))
    assert found == [({"a": "é"}, 12), ({"a": 2}, 21)]
    history = History(path)
    assert (history.num_rows, history.length) == (2, 21)
    history.close()


def test_rows_are_counted_across_the_chunks_in_which_a_long_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"a": "%s"}\n' % (b"x" * length) for length in (0, 3, 40, 7, 0)]
    for chunk_bytes in (1, 7, 9, 16, 1 << 20):
        monkeypatch.setattr("ast_dist.track.history._CHUNK_BYTES", chunk_bytes)
        path.write_bytes(b"".join(rows) + b'{"torn')
        history = History(path)
        assert (history.num_rows, history.length) == (5, sum(map(len, rows)))
        history.truncate(sum(map(len, rows[:3])))
        assert (history.num_rows, path.read_bytes()) == (3, b"".join(rows[:3]))
        history.close()


def test_every_row_is_with_the_operating_system_when_append_returns(tmp_path):
    program = """
import os, signal, sys
from ast_dist.track.history import History
history = History(sys.argv[1])
for step in range(100):
    history.append({"global_step": step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "metrics.jsonl"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [row["global_step"] for row in read(path)] == list(range(100))


def test_a_full_disk_raises_and_leaves_whole_rows(tmp_path):
    # A limit on the file's size makes the kernel take a part of the line and then refuse, as a full disk does.
    program = """
import resource, sys
from ast_dist.track.history import History
history = History(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (130, resource.RLIM_INFINITY))
try:
    for step in range(100):
        history.append({"global_step": step, "padding": "x" * 20})
except OSError:
    assert history.length == history.path.stat().st_size, (history.length, history.path.stat().st_size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    history.append({"after": True})
    sys.exit(7)
"""
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 7
    assert path.read_bytes().endswith(b"}\n")
    assert [set(row) for row in read(path)] == [{"global_step", "padding"}] * 2 + [{"after"}]
