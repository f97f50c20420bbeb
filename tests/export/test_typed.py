"""Typing a graph: who is half, who is float32, where the casts are, and that the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mammut_export.onnx_graphs import graph_info
from mammut_export.typed import for_tensorrt, structural_islands, survives_half, to_typed_half
from mammut_runtime.manifest import is_between

F32, F16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
op = helper.make_node


def make(nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], **constants: Any) -> ir.Model:
    """float32 inputs ("ids": int64) and outputs, opset 21."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, I64 if name == "ids" else F32, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, F32, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.serde.deserialize_model(model)


def proto(model: ir.Model) -> onnx.ModelProto:
    found = ir.serde.serialize_model(model)
    onnx.shape_inference.infer_shapes(found, check_type=True, strict_mode=True)
    return found


def run(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto(model).SerializeToString(), options)
    half = {each.name for each in session.get_inputs() if each.type == "tensor(float16)"}
    fitting = {name: value.astype(np.float16) if name in half else value for name, value in feeds.items()}
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, fitting), strict=True))


def casts(model: ir.Model) -> list[str]:
    return [str(node.outputs[0].name) for node in model.graph if node.op_type == "Cast"]


def block() -> ir.Model:
    """A product, a sum, a norm: what a block of a transformer ends with."""
    random = np.random.default_rng(1)
    nodes = [
        op("MatMul", ["tokens", "w"], ["a"], name="mlp/MatMul"),
        op("Add", ["a", "b"], ["c"], name="mlp/Add"),
        op("LayerNormalization", ["c", "s"], ["n"], name="norm"),
        op("MatMul", ["n", "w"], ["cross_k.0"], name="key/MatMul"),
    ]
    weights = random.standard_normal((8, 8)).astype(np.float32)
    bias = random.standard_normal(8).astype(np.float32)
    return make(nodes, {"tokens": ["batch", 4, 8]}, ["cross_k.0"], w=weights, b=bias, s=np.ones(8, np.float32))


def test_everything_is_half_without_islands() -> None:
    model = block()
    to_typed_half(model)
    assert casts(model) == []
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT16}


def test_an_island_is_between_casts() -> None:
    model = block()
    to_typed_half(model, frozenset({"norm"}))
    assert casts(model) == ["c.single", "n.half"]
    names = [str(node.name) for node in model.graph]
    assert [name for name in names if not name.endswith("/Cast")] == ["mlp/MatMul", "mlp/Add", "norm", "key/MatMul"]
    assert model.graph.initializers["s"].const_value.dtype == ir.DataType.FLOAT
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT16


def test_a_weight_that_both_kinds_use_is_there_twice() -> None:
    model = block()
    to_typed_half(model, frozenset({"key/MatMul"}))
    kinds = {name: value.const_value.dtype for name, value in model.graph.initializers.items() if name[0] == "w"}
    assert sorted(kinds.values()) == [ir.DataType.FLOAT, ir.DataType.FLOAT16]


def test_numbers_stay() -> None:
    feeds = {"tokens": np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)}
    wanted = run(block(), feeds)["cross_k.0"]
    for islands in (frozenset[str](), frozenset({"norm"}), frozenset({"norm", "mlp/MatMul", "mlp/Add", "key/MatMul"})):
        model = block()
        to_typed_half(model, islands)
        got = run(model, feeds)["cross_k.0"]
        assert got.dtype == np.float16
        assert np.abs(got - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_same_bytes_every_time() -> None:
    first, second = block(), block()
    for model in (first, second):
        to_typed_half(model, frozenset({"norm"}))
    assert proto(first).SerializeToString(deterministic=True) == proto(second).SerializeToString(deterministic=True)


@pytest.mark.parametrize("graph", ["vision", "text", "memory", "decoder"])
def test_tiny_graphs(graph: str, models: dict[str, ir.Model]) -> None:
    """The contract's types, the old names, valid ONNX, and numbers within what the parity gives fp16."""
    model = models[graph]
    before = {str(node.name) for node in model.graph}
    random = np.random.default_rng(3)
    sizes = {"batch": 2, "beams": 3, "past": 5, "new": 2, "length": 6}
    feeds: dict[str, Any] = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape]
        integers = value.dtype == ir.DataType.INT64
        feeds[str(value.name)] = (
            random.integers(3, 60, shape) if integers else random.standard_normal(shape, np.float32)
        )
    wanted = run(model, feeds)
    for_tensorrt(model, "fp16")
    info = graph_info(model, f"{graph}.onnx")
    for tensor in (*info.inputs, *info.outputs):
        assert tensor.dtype == (
            "int64" if tensor.name == "ids" else "float16" if is_between(tensor.name) else "float32"
        )
    after = {str(node.name) for node in model.graph if node.op_type != "Cast"}
    assert after == {name for name in before if name in after} and before - after <= {"Cast"}
    for name, value in run(model, feeds).items():
        assert np.abs(value - wanted[name]).max() <= 5e-3 * np.abs(wanted[name]).max(), name


def test_fp32_is_left_alone_unless_others_are_half(models: dict[str, ir.Model]) -> None:
    model = models["memory"]
    before = proto(model).SerializeToString(deterministic=True)
    for_tensorrt(model, "fp32", half=False)
    assert proto(model).SerializeToString(deterministic=True) == before
    for_tensorrt(model, "fp32", half=True)
    assert {node.inputs[1].dtype for node in model.graph if node.op_type == "MatMul"} == {ir.DataType.FLOAT}
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT16}


def test_an_output_that_is_used_inside_keeps_its_name() -> None:
    nodes = [
        op("LayerNormalization", ["pixels", "s"], ["tokens"], name="norm"),
        op("ReduceMean", ["tokens", "axes"], ["m"], keepdims=0, name="pool"),
        op("MatMul", ["m", "w"], ["embedding"], name="head"),
    ]
    constants = {"s": np.ones(8, np.float32), "axes": np.array([1]), "w": np.eye(8, dtype=np.float32)}
    feeds = {"pixels": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
    model = make(nodes, {"pixels": ["batch", 3, 8]}, ["tokens", "embedding"], **constants)
    wanted = run(model, feeds)
    to_typed_half(model, frozenset({"norm", "pool"}))
    got = run(model, feeds)
    assert {name: value.dtype for name, value in got.items()} == {"tokens": np.float16, "embedding": np.float32}
    for name, value in got.items():
        assert np.abs(value - wanted[name]).max() < 5e-3


def test_structural_islands() -> None:
    nodes = [
        op("MatMul", ["tokens", "w"], ["a"], name="head"),
        op("ReduceL2", ["a", "axes"], ["l"], name="length"),
        op("Clip", ["l", "least"], ["c"], name="floor"),
        op("Div", ["a", "c"], ["embedding"], name="unit"),
    ]
    constants = {"axes": np.array([1]), "least": np.float32(1e-12)}
    fine = np.eye(8, dtype=np.float32)
    found = structural_islands(make(nodes, {"tokens": ["batch", 8]}, ["embedding"], w=fine, **constants).graph)
    assert found.keys() == {"length", "floor", "unit"}
    assert found["floor"] == "float16 does not hold least, largest value 1e-12"
    large = structural_islands(make(nodes, {"tokens": ["batch", 8]}, ["embedding"], w=fine * 1e5, **constants).graph)
    assert large["head"] == "float16 does not hold w, largest value 1e+05"


@pytest.mark.parametrize(("width", "islands"), [(12, {"attend"}), (16, set())])
def test_odd_heads_have_their_softmax_in_float32(width: int, islands: set[str]) -> None:
    nodes = [
        op("MatMul", ["past_k.0", "past_v.0"], ["scores"], name="scores"),
        op("Add", ["scores", "mask"], ["masked"], name="mask"),
        op("Softmax", ["masked"], ["present_k.0"], name="attend"),
    ]
    inputs = {"past_k.0": [1, 4, width], "past_v.0": [1, width, "past"]}
    model = make(nodes, inputs, ["present_k.0"], mask=np.float32(0.5))
    assert structural_islands(model.graph).keys() == islands


@pytest.mark.parametrize(
    ("values", "held"),
    [([0.0], True), ([1.0, 1e-9], True), ([65504.0], True), ([65600.0], False), ([1e-5], False), ([-np.inf, 1], True)],
)
def test_survives_half(values: list[float], held: bool) -> None:
    assert survives_half(np.array(values, np.float32)) is held


def test_quantized_layer(tmp_path: Path) -> None:
    """Scales have the type of their side; both sides of an activation mean the same value."""
    nodes = [
        op("LayerNormalization", ["tokens", "s"], ["n"], name="norm"),
        op("QuantizeLinear", ["n", "x_scale", "zero"], ["q"], name="q"),
        op("DequantizeLinear", ["q", "x_scale", "zero"], ["d"], name="d"),
        op("DequantizeLinear", ["w", "w_scale"], ["r"], axis=1, name="r"),
        op("MatMul", ["d", "r"], ["cross_k.0"], name="key"),
    ]
    constants = {
        "s": np.ones(8, np.float32),
        "x_scale": np.float32(0.0237),
        "zero": np.int8(0),
        "w": np.arange(64, dtype=np.int8).reshape(8, 8),
        "w_scale": np.linspace(0.01, 0.02, 8, dtype=np.float32),
    }
    feeds = {"tokens": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
    wanted = run(make(nodes, {"tokens": ["batch", 3, 8]}, ["cross_k.0"], **constants), feeds)["cross_k.0"]
    model = make(nodes, {"tokens": ["batch", 3, 8]}, ["cross_k.0"], **constants)
    to_typed_half(model, frozenset({"norm"}))
    scales = {name: value.const_value for name, value in model.graph.initializers.items() if "scale" in name}
    assert {name: scale.dtype for name, scale in scales.items()} == {
        "x_scale": ir.DataType.FLOAT, "x_scale.half": ir.DataType.FLOAT16, "w_scale": ir.DataType.FLOAT16,
    }  # fmt: skip
    assert float(scales["x_scale"].numpy()) == float(scales["x_scale.half"].numpy())
    assert casts(model) == ["tokens.single"]
    got = run(model, feeds)["cross_k.0"]
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


def test_scales_too_small_for_half_make_an_island() -> None:
    nodes = [
        op("DequantizeLinear", ["w", "scale"], ["r"], name="r"),
        op("MatMul", ["tokens", "r"], ["cross_k.0"], name="m"),
    ]
    for scale, islands in ((1e-6, {"m"}), (1e-2, set[str]())):
        weights = np.ones((8, 8), np.int8)
        model = make(nodes, {"tokens": [2, 8]}, ["cross_k.0"], w=weights, scale=np.float32(scale))
        assert structural_islands(model.graph).keys() == islands
