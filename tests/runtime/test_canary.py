"""The canary picture is the same everywhere, and a replay that differs is noticed."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mammut_runtime.canary import CanaryAnswers, canary_picture, compare
from mammut_runtime.manifest import Canary

FIRST_PIXELS = [[85, 9, 34], [83, 20, 36]]
DIGEST = "f2b783dea97c34a2426a3f8b7d6662cfe2fafa2f60f69fcdba23f3c489e8008a"
EXPECTED = Canary(7, (1, 2), (0.6, -0.8, 0.0), (0.0, 1.0, 0.0), (5, 6), 1e-4)


def slow_picture(seed: int, height: int, width: int) -> list[list[list[int]]]:
    """The formula of docs/bundle.md with Python's integers, pixel by pixel."""

    def scramble(index: int) -> int:
        word = (index + seed * 0x9E3779B1) % 2**32
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        return (word ^ (word >> 16)) >> 24

    def value(y: int, x: int, c: int) -> int:
        ramp, length = ((x, width - 1), (y, height - 1), (x + y, width + height - 2))[c]
        block = (y * 6 // height) * 8 + x * 8 // width
        parts = 2 * (ramp * 255 // max(length, 1)) + 5 * scramble(2**31 + block * 3 + c)
        return (parts + scramble((y * width + x) * 3 + c)) // 8

    return [[[value(y, x, c) for c in range(3)] for x in range(width)] for y in range(height)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_equals_the_slow_formula(seed: int, height: int, width: int) -> None:
    picture = canary_picture(seed, (height, width))
    assert picture.dtype == np.uint8
    assert picture.tolist() == slow_picture(seed, height, width)


def test_the_bytes_are_fixed_for_ever() -> None:
    """If this fails, the canaries of all bundles that exist fail: change the code back, not the numbers."""
    picture = canary_picture(2, (192, 256))
    assert picture.shape == (192, 256, 3)
    assert picture[0, :2].tolist() == FIRST_PIXELS
    assert hashlib.sha256(picture.tobytes()).hexdigest() == DIGEST
    assert hashlib.sha256(canary_picture(3, (192, 256)).tobytes()).hexdigest() != DIGEST


def test_the_picture_has_structure() -> None:
    """Coarse (the mean changes across it), middle (blocks differ), fine (neighbours differ), on every channel."""
    picture = canary_picture(11, (192, 256)).astype(float)
    for c in range(3):
        assert picture[..., c].std() > 20
        assert np.abs(np.diff(picture[..., c], axis=1)).mean() > 1
    blocks = picture.reshape(6, 32, 8, 32, 3).mean(axis=(1, 3)).reshape(-1, 3)
    assert len(np.unique(blocks.round(), axis=0)) > 40


def _vector(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


GOOD = _vector(0.6, -0.8, 0.00005)
TEXT = _vector(0.0, 1.0, 0.0)


def test_a_replay_within_the_tolerance() -> None:
    result = compare(EXPECTED, CanaryAnswers(GOOD, TEXT, (5, 6)))
    assert result.ok
    assert result.worst_error == pytest.approx(5e-5, rel=1e-3)
    assert result.message == "canary reproduced: worst error 5e-05, tolerance 0.0001"
    assert compare(EXPECTED, CanaryAnswers(text_embedding=TEXT)).ok
    assert compare(EXPECTED, CanaryAnswers(caption_ids=(5, 6))).ok


@pytest.mark.parametrize(
    ("embedding", "text", "ids", "message"),
    [
        (_vector(0.6, -0.8, 0.001), TEXT, [5, 6], "canary differs: embedding differs by 0.001, tolerance 0.0001"),
        (GOOD, -TEXT, [5, 6], "canary differs: text_embedding differs by 2, tolerance"),
        (GOOD, TEXT, [5], r"caption ids \[5\], expected \[5, 6\]"),
        (GOOD, TEXT, list(range(20)), r"caption ids \[0, 1, 2, 3, 4, 5, 6, 7\]..., expected"),
        (_vector(0.6, -0.8), TEXT, [5, 6], "embedding differs by inf"),
        (_vector(0.6, -0.8, np.nan), TEXT, [5, 6], "embedding differs by inf"),
        (None, None, None, "nothing was replayed"),
    ],
)
def test_a_replay_that_differs(
    embedding: NDArray[np.float32] | None, text: NDArray[np.float32] | None, ids: list[int] | None, message: str
) -> None:
    result = compare(EXPECTED, CanaryAnswers(embedding, text, None if ids is None else tuple(ids)))
    assert not result.ok
    assert not np.isnan(result.worst_error)
    assert re.search(message, result.message)
