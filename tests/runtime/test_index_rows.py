"""The best rows against plain sorting, in blocks of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime import index_rows
from mammut_runtime.errors import InputError
from mammut_runtime.index_rows import best_rows


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
def test_the_best_rows_are_those_of_a_plain_sort(rows: int, count: int, block: int, seed: int, some: bool) -> None:
    source = np.random.default_rng(seed)
    embeddings = source.integers(-2, 3, (rows, 3)).astype(np.float32)  # many equal scores
    embeddings[source.random(rows) < 0.1] = np.nan
    inside = source.random(rows) < 0.6 if some else None
    vector = np.array([1, 2, -1], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_rows, "_ROWS_AT_ONCE", block)
        found = best_rows(embeddings, vector, count, inside)
    scored = [(-float(row @ vector), at) for at, row in enumerate(embeddings) if inside is None or inside[at]]
    expected = sorted(each for each in scored if each[0] == each[0])[:count]
    assert [(-score, row) for row, score in found] == expected


def test_a_count_out_of_range_is_refused() -> None:
    one = np.eye(1, 3, dtype=np.float32)
    for count in (0, -1, index_rows.MAX_HITS + 1):
        with pytest.raises(InputError, match="number of hits must be from 1 to 10000"):
            best_rows(one, one[0], count)
    assert best_rows(one, one[0], index_rows.MAX_HITS) == [(0, 1.0)]  # control
