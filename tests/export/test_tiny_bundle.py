"""The committed tests/data/tiny-bundle is what today's exporter makes of tests/make_tiny_bundle.py's checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from mammut.checkpoint import Checkpoint
from mammut_export.contents import detection_rule, write_graphs
from mammut_export.export import export
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.options import ExportOptions
from mammut_runtime.bundle import Bundle
from mammut_runtime.model import Model

REMEDY = "run python tests/make_tiny_bundle.py and commit what it writes"


def test_it_is_small_and_works(maker: ModuleType) -> None:
    assert sum(path.stat().st_size for path in maker.BUNDLE.iterdir()) < 400_000
    with Model.load(maker.BUNDLE) as model:
        assert model.replay_canary().ok
        assert len(model.encode(np.zeros((20, 30, 3), np.uint8)).caption().text) < 500


@pytest.fixture
def fresh(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> Bundle:
    export(tiny, tmp_path / "bundle", ExportOptions())
    return Bundle.open(tmp_path / "bundle")


def test_it_is_what_the_exporter_makes(maker: ModuleType, fresh: Bundle) -> None:
    committed = Bundle.open(maker.BUNDLE)
    for name in GRAPHS:
        assert _signature(committed, name) == _signature(fresh, name), f"{name}: {REMEDY}"
    for part in ("model", "preprocess", "text", "graphs", "opset", "files"):
        old, new = (getattr(each.manifest, part) for each in (committed, fresh))
        if part == "files":
            old, new = old.keys(), new.keys()
        assert old == new, f"{part}: {REMEDY}"
    assert committed.manifest.canary.caption_ids == fresh.manifest.canary.caption_ids, REMEDY
    np.testing.assert_allclose(committed.manifest.canary.embedding, fresh.manifest.canary.embedding, atol=1e-5)
    assert committed.read("tokenizer.json") == fresh.read("tokenizer.json"), REMEDY


def test_the_detector_is_what_the_exporter_makes(maker: ModuleType, tiny_detector: Checkpoint, tmp_path: Path) -> None:
    committed = Bundle.open(maker.DETECTOR_BUNDLE)
    assert sum(path.stat().st_size for path in maker.DETECTOR_BUNDLE.iterdir()) < 600_000
    made = write_graphs(tmp_path, tiny_detector, {"detector": "fp32"})
    old, new = (
        onnx.load(str(folder / "detector.onnx"), load_external_data=False)
        for folder in (maker.DETECTOR_BUNDLE, tmp_path)
    )
    kinds = [[(node.op_type, node.name) for node in each.graph.node] for each in (old, new)]
    assert kinds[0] == kinds[1] and committed.manifest.graphs["detector"] == made["detector"], REMEDY
    assert committed.manifest.detection == detection_rule(tiny_detector, ("detector",)), REMEDY


def test_a_changed_graph_is_noticed(maker: ModuleType, fresh: Bundle) -> None:
    """Control: one operator more."""
    path = fresh.path / "memory.onnx"
    model = onnx.load(str(path), load_external_data=False)
    before = _signature(fresh, "memory")
    model.graph.node.append(onnx.helper.make_node("Identity", [model.graph.output[0].name], ["more"]))
    path.write_bytes(model.SerializeToString())
    assert _signature(fresh, "memory") != before == _signature(Bundle.open(maker.BUNDLE), "memory")


def _signature(bundle: Bundle, name: str) -> list[tuple[object, ...]]:
    """Operators with what they read, and weights with their shapes: all but the numbers."""
    graph = onnx.load(str(bundle.path / bundle.manifest.graphs[name].file), load_external_data=False).graph
    nodes: list[tuple[object, ...]] = [(node.op_type, *node.input, *node.output) for node in graph.node]
    return nodes + sorted((tensor.name, tensor.data_type, *tensor.dims) for tensor in graph.initializer)
