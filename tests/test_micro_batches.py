"""Claims about cutting a rank's rows: each counts once, and all ranks cut alike."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ast_dist.micro_batches import micro_batches


@given(share=st.integers(1, 300), missing=st.integers(0, 299), limit=st.integers(2, 64))
def test_each_row_counts_once_in_order_and_no_part_exceeds_the_limit(share: int, missing: int, limit: int) -> None:
    num_rows = max(1, share - missing)
    parts = micro_batches(num_rows, share, limit)
    counted = np.concatenate([part.rows[part.is_own] for part in parts])
    assert counted.tolist() == list(range(num_rows))
    assert all(2 <= len(part.rows) <= limit for part in parts)


@given(share=st.integers(1, 300), missing=st.integers(0, 299), limit=st.integers(2, 64))
def test_ranks_with_unequal_shares_take_the_same_number_of_passes_of_the_same_size(
    share: int, missing: int, limit: int
) -> None:
    def sizes(num_rows: int) -> list[int]:
        return [len(part.rows) for part in micro_batches(num_rows, share, limit)]

    assert sizes(max(1, share - missing)) == sizes(share)


@given(share=st.integers(1, 300), limit=st.integers(2, 64))
def test_filling_up_costs_less_than_a_row_a_part(share: int, limit: int) -> None:
    parts = micro_batches(share, share, limit)
    assert sum(len(part.rows) for part in parts) - max(share, 2) < len(parts)
