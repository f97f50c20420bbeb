"""The best few of many: exactly what sorting everything gives, also with ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut_runtime.probabilities import best, log_softmax, softmax


@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(1, 12), st.sampled_from([2, 50, 10**6]))
def test_best_equals_a_stable_sort(seed: int, size: int, count: int, levels: int) -> None:
    """Few levels make many ties; sizes are chosen around multiples of the block."""
    scores = np.random.default_rng(seed).integers(0, levels, size).astype(np.float32)
    expected = np.argsort(-scores, kind="stable")[:count]
    np.testing.assert_array_equal(best(scores, count), expected)


def test_best_of_minus_infinity() -> None:
    scores = np.full(500, -np.inf, np.float32)
    scores[321] = -3.0
    assert best(scores, 3).tolist() == [321, 0, 1]


def test_best_1_is_argmax() -> None:
    scores = np.random.default_rng(0).integers(0, 3, 49408).astype(np.float32)
    assert best(scores, 1)[0] == scores.argmax()


def test_log_softmax_against_closed_form() -> None:
    scores = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(scores)), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(softmax(scores), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_keeps_dtype_and_gives_zero_for_minus_infinity(dtype: type) -> None:
    probabilities = softmax(np.array([-np.inf, 2.0], dtype))
    assert probabilities.dtype == dtype and probabilities.tolist() == [0.0, 1.0]
