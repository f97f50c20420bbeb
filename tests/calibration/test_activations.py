from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mammut_calibration.activations import activation_names, constants, layers, read_graph
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError


def test_layers_of_a_real_graph_are_the_modules_with_weights(tiny: Bundle) -> None:
    found = layers(read_graph(tiny.graph_path("vision")))
    names = [layer.name for layer in found]
    assert "vision.blocks.0.qkv/MatMul" in names and "vision.patch_embedding/Conv" in names
    assert "vision.blocks.0/MatMul" not in names  # attention: a product of two activations
    qkv = next(layer for layer in found if layer.name == "vision.blocks.0.qkv/MatMul")
    assert qkv.inputs == ("vision.blocks.0.norm_1/LayerNormalization",)
    assert (qkv.weight, qkv.output) == ("vision.blocks.0.qkv.weight.T", "vision.blocks.0.qkv/MatMul")
    gathers = [each for each in layers(read_graph(tiny.graph_path("decoder"))) if each.op_type == "Gather"]
    assert [each.inputs for each in gathers] == [("ids",)]


def test_scopes_hold_one_another(tiny: Bundle) -> None:
    for graph in tiny.manifest.graphs:
        model = read_graph(tiny.graph_path(graph))
        linear, matmul, everything = (set(activation_names(model, scope)) for scope in ("linear", "matmul", "all"))
        assert linear and linear <= matmul <= everything
        assert "ids" not in everything  # no floats
    with pytest.raises(InputError, match="scope: expected one of linear, matmul, all, got 'some'"):
        activation_names(model, "some")  # type: ignore[arg-type]


def test_a_weight_behind_a_cast_is_a_weight() -> None:
    """How float16 bundles store their matrices."""
    weight = numpy_helper.from_array(np.ones((2, 2), np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w32"], ["y"], name="layer"),
        helper.make_node("MatMul", ["y", "y"], ["z"], name="product"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight]))
    assert constants(model) == {"w", "w32"}
    assert [layer.name for layer in layers(model)] == ["layer"]
    assert activation_names(model, "linear") == ("x", "y")
    assert activation_names(model, "matmul") == ("x", "y", "z")


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\xff\xff not a protobuf")
    with pytest.raises(InputError, match=r"x\.onnx: not readable as an ONNX file"):
        read_graph(path)
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), str(path))
    assert layers(read_graph(path)) == ()  # control
