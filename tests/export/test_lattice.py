from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mammut.checkpoint import Checkpoint
from mammut_export import onnx_graphs
from mammut_export.contents import model_info
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.graphs import TRACED_SIZES
from mammut_export.lattice import replay
from mammut_runtime.engines import open_engine
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.manifest import graph_contract


@pytest.mark.parametrize("name", GRAPHS)
def test_every_shape_gives_the_cores_numbers(
    models: dict[str, ir.Model], tiny: Checkpoint, tmp_path: Path, name: str
) -> None:
    onnx_graphs.save(models[name], tmp_path / "graph.onnx")
    info = graph_contract(model_info(tiny), tiny.preprocess.size)[name]
    engine = open_engine(tmp_path / "graph.onnx", "onnxruntime")
    labels = []
    for label, got, wanted in replay(name, tiny, info, engine):
        labels.append(label)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(got[key], value, atol=2e-5, err_msg=f"{label}: {key}")
    assert len(set(labels)) == len(labels) >= 3


def test_shapes_go_beyond_the_traced_one(tiny: Checkpoint) -> None:
    context = tiny.model.config.text.context_length
    shapes = _shapes(tiny, "decoder")
    ids = {shape["ids"] for shape in shapes}
    past = {shape["past_k.0"][3] for shape in shapes}
    assert {batch for batch, _, _ in ids} == {1, 2, 5} and {beams for _, beams, _ in ids} >= {1, 2, 3, 4}
    assert {0, 1, context - 1} <= past and len(past) >= 6
    assert any(shape["ids"][2] == context for shape in shapes)  # a prompt that fills the context
    assert any(new > 1 and shape["past_k.0"][3] for shape in shapes for new in [shape["ids"][2]])
    assert len(ids - {(TRACED_SIZES["batch"], TRACED_SIZES["beams"], TRACED_SIZES["new"])}) >= 6
    lengths = {shape["ids"] for shape in _shapes(tiny, "text")}
    assert {length for _, length in lengths} >= {1, 2, 7, context}
    assert {shape["pixels"][0] for shape in _shapes(tiny, "vision")} == {1, 2, 5}


def test_texts_have_pads_but_never_only_pads(tiny: Checkpoint) -> None:
    rows = [row for feeds in _feeds(tiny, "text") for row in feeds["ids"]]
    pads = [np.mean(row == tiny.model.text.pad_id) for row in rows]
    assert max(pads) < 1 and sum(share > 0 for share in pads) >= 3


def _feeds(tiny: Checkpoint, name: str) -> list[dict[str, NDArray[Any]]]:
    info = graph_contract(model_info(tiny), tiny.preprocess.size)[name]
    engine = FakeEngine(lambda feeds: {})
    assert list(replay(name, tiny, info, engine))
    return engine.calls


def _shapes(tiny: Checkpoint, name: str) -> list[dict[str, tuple[int, ...]]]:
    return [{key: value.shape for key, value in feeds.items()} for feeds in _feeds(tiny, name)]
