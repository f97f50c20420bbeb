"""Feeds that do not fit are refused in words; the engines' own tests show the same through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mammut_runtime.engines.feeds import GraphInputs
from mammut_runtime.errors import EngineError

INPUTS = GraphInputs("g.onnx", {"x": (np.dtype(np.float32), ("batch", 3)), "n": (np.dtype(np.int64), (None,))})
RIGHT: dict[str, Any] = {"x": np.zeros((2, 3), np.float32), "n": np.zeros(4, np.int64)}


def test_right_ones() -> None:
    INPUTS.check(RIGHT)
    INPUTS.check(RIGHT | {"x": np.zeros((0, 3), np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3))}, r"input x must be float32\[batch, 3\], got float64\[2, 3\]"),
        ({"x": np.zeros(3, np.float32)}, r"input x must be float32\[batch, 3\], got float32\[3\]"),
        ({"n": np.zeros((1, 1), np.int64)}, r"input n must be int64\[\?\], got int64\[1, 1\]"),
        ({f"y{i}": np.zeros(1) for i in range(9)}, r"missing: none; unknown: y0, y1, .*, y7 \.\.\."),
    ],
)
def test_wrong_ones(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=rf"g\.onnx: .*{message}"):
        INPUTS.check(RIGHT | change)
    with pytest.raises(EngineError, match="missing: n, x; unknown: none"):
        INPUTS.check({})
