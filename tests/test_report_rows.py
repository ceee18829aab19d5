"""The report's columns hold what the rows say, and little more than their numbers."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.report_rows import Rows
from ast_dist.report_run import Run, as_number, open_run

ODD = st.sampled_from([None, "1.5", True, [1], {}, math.inf, math.nan, 10**400, -1e300])
VALUES = st.one_of(st.floats(-10, 10), st.integers(-5, 5), ODD)
KEYS = st.sampled_from(["progress/epoch", "epoch", "time/total_s", "gate/threshold", "global_step"])
KINDS = st.sampled_from(["step", "epoch", "other", None, []])
A_ROW = st.builds(lambda kind, row: {"kind": kind, **row}, KINDS, st.dictionaries(KEYS, VALUES))


def of_the_rows(
    rows: list[dict[str, Any]], key: str, kind: str = "", x_key: str = "progress/epoch", has_gaps: bool = False
) -> list[tuple[float, float]]:
    """What `series` and `gapped` state, row by row."""
    found = []
    for row in rows:
        x, y = as_number(row.get(x_key, row.get("epoch"))), as_number(row.get(key))
        if (key in row or has_gaps) and (not kind or row["kind"] == kind) and x is not None:
            found.append((x, math.nan if y is None else y))
    return found


@given(st.lists(A_ROW, max_size=12))
def test_columns_say_what_the_rows_say(rows: list[dict[str, Any]]) -> None:
    run = Run(Path("run"), "run", rows=Rows(rows))
    key = "gate/threshold"
    for kind in ("", "step", "epoch"):
        for x_key in ("progress/epoch", "time/total_s"):
            expected = of_the_rows(rows, key, kind, x_key)
            np.testing.assert_array_equal(np.column_stack(run.series(key, kind, x_key)).ravel(), np.ravel(expected))
    np.testing.assert_array_equal(
        np.column_stack(run.gapped(key)).ravel(), np.ravel(of_the_rows(rows, key, has_gaps=True))
    )
    known = [value for row in rows if (value := as_number(row.get(key))) is not None]
    assert run.last(key) == (known[-1] if known else None)
    assert run.best(key) == max(known, default=None)
    assert run.epochs == [row for row in rows if row["kind"] == "epoch"]
    pairs = [(as_number(row.get("global_step")), as_number(row.get(key))) for row in rows]
    both = [pair for pair in pairs if None not in pair]
    np.testing.assert_array_equal(np.column_stack(run.rows.together("global_step", key)).ravel(), np.ravel(both))


def test_a_run_takes_less_memory_than_its_file(tmp_path: Path) -> None:
    row = {"kind": "step", "progress/epoch": 1.0, **{f"gate/{number}": 0.123456 + number for number in range(30)}}
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 5000)
    tracemalloc.start()
    try:
        run = open_run(tmp_path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(run.rows) == 5000 and run.last("gate/29") == 29.123456
    assert peak_bytes < path.stat().st_size, peak_bytes
