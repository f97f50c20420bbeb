"""Memory by weights: what is counted, and from where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_runtime import memory_use
from mammut_runtime.bundle import Bundle
from mammut_runtime.engines import EngineOptions
from mammut_runtime.memory_use import MemoryUse, measure_memory, resident_bytes, start_engine, unique_weight_bytes
from mammut_runtime.model import Model

ONE = EngineOptions(threads=1)


def test_every_graph_is_opened_and_used(tiny_bundle: Path) -> None:
    with Model.load(tiny_bundle, ONE) as model:
        use = measure_memory(model, ONE)
        assert set(model._graphs._engines) == {"vision", "text", "memory", "decoder"}
    assert use.unique_weights > 0 and (use.resident is None or use.resident >= 0)


def test_weights_of_several_graphs_count_once(tiny_bundle: Path) -> None:
    """The text tower's are the decoder's too. The control: a bundle without the decoder has fewer, not half."""
    with Model.load(tiny_bundle, ONE) as model:
        size = (tiny_bundle / "weights.bin").stat().st_size
        assert 0.9 * size < unique_weight_bytes(model) <= size


def test_resident_bytes_follow_what_is_held() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("this system does not say")
    block = np.ones(50_000_000, np.uint8)
    after = resident_bytes()
    assert after is not None and 40e6 < after - before < 60e6
    del block


def test_the_ratio() -> None:
    assert MemoryUse(100, 140).ratio == 1.4
    assert MemoryUse(100, None).ratio is None and MemoryUse(0, 5).ratio is None


def test_systems_that_do_not_say(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_use, "resident_bytes", lambda: None)
    with Model.load(tiny_bundle, ONE) as model:
        assert measure_memory(model, ONE).resident is None


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_engine_starts_with_a_graph_without_weights(
    target: str, bundle_for: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_for(target)  # skips where the engine is missing
    original, outputs = memory_use.open_engine, []

    def watched(*arguments: Any) -> Any:
        engine = original(*arguments)
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda feeds: outputs.append(run(feeds)))
        return engine

    monkeypatch.setattr(memory_use, "open_engine", watched)
    start_engine(target, ONE)
    (output,) = outputs
    np.testing.assert_array_equal(output["y"], [[2, 2], [2, 2]])


def test_an_engine_that_runs_only_what_was_built_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start_engine("coreml", ONE)


def test_a_bundle_of_fakes_has_no_weights(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    assert isinstance(model.bundle, Bundle)
    assert measure_memory(model, ONE).unique_weights == 0
