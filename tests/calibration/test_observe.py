from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mammut_calibration.activations import activation_names, read_graph
from mammut_calibration.observe import ObservedEngine, estimated_bytes, in_groups
from mammut_runtime.bundle import Bundle
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import EngineError

SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 100), max_size=20)


@given(SIZES, st.integers(1, 120))
def test_groups_keep_the_order_and_the_budget(sizes: dict[str, int], budget: int) -> None:
    groups = in_groups(list(sizes), sizes, budget)
    assert [name for group in groups for name in group] == list(sizes)
    for group in groups:
        assert len(group) == 1 or sum(sizes[name] for name in group) <= budget


def observed(tiny: Bundle, budget_bytes: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], int]:
    """What was seen inside, what came out, and in how many parts."""
    path = tiny.graph_path("vision")
    names = activation_names(read_graph(path), "all")
    seen: dict[str, NDArray[Any]] = {}

    def watch(name: str, value: NDArray[Any]) -> None:
        assert name not in seen, f"{name} was shown twice"
        seen[name] = value

    engine = ObservedEngine(path, names, watch, threads=1, budget_bytes=budget_bytes)
    size = tiny.manifest.preprocess.size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    outputs = engine.run({"pixels": pixels})
    parts = engine.parts
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run({"pixels": pixels})
    plain = open_engine(path, "onnxruntime", EngineOptions(threads=1)).run({"pixels": pixels})
    assert outputs.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(outputs[name], value, atol=1e-5)
    assert seen.keys() == set(names)
    return seen, outputs, parts


def test_shows_every_tensor_once_and_computes_as_ever_whatever_the_budget(tiny: Bundle) -> None:
    whole, outputs, parts = observed(tiny, 1 << 30)
    assert parts == 1
    np.testing.assert_array_equal(whole["tokens"], outputs["tokens"])
    small, _, parts = observed(tiny, 20_000)
    assert parts > 3
    for name, value in whole.items():
        np.testing.assert_allclose(small[name], value, atol=1e-5)


def test_sizes_are_estimated_before_anything_runs(tiny: Bundle) -> None:
    estimate = estimated_bytes(read_graph(tiny.graph_path("vision")))
    seen, _, _ = observed(tiny, 1 << 30)
    known = [name for name in seen if name in estimate]
    assert len(known) > 0.8 * len(seen)
    assert all(estimate[name] == seen[name].nbytes for name in known)
