"""The reader says what the onnx library says, and survives anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mammut_runtime.errors import BundleError
from mammut_runtime.onnx_reader import read_onnx

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"


@pytest.mark.parametrize("name", ["vision", "text", "memory", "decoder"])
def test_as_the_library_reads_it(name: str) -> None:
    data = (TINY / f"{name}.onnx").read_bytes()
    found, wanted = read_onnx(data, name), onnx.ModelProto.FromString(data)
    assert found.opset == wanted.opset_import[0].version and found.functions == 0
    assert len(found.nodes) == len(wanted.graph.node)
    for node, other in zip(found.nodes, wanted.graph.node, strict=True):
        assert (node.name, node.op_type, node.domain) == (other.name, other.op_type, other.domain)
        assert (node.inputs, node.outputs) == (tuple(other.input), tuple(other.output))
        for attribute in other.attribute:
            value = helper.get_attribute_value(attribute)
            value = tuple(value) if isinstance(value, list) else value.decode() if isinstance(value, bytes) else value
            assert node.attributes[attribute.name] == value
    for value, other in zip(found.inputs, wanted.graph.input, strict=True):
        sizes = [d.dim_param or d.dim_value for d in other.type.tensor_type.shape.dim]
        assert (value.name, value.dtype, list(value.shape or ())) == (
            other.name,
            other.type.tensor_type.elem_type,
            sizes,
        )
    for tensor in wanted.graph.initializer:
        header = found.constants[tensor.name]
        assert (header.dtype, header.shape) == (tensor.data_type, tuple(tensor.dims))
        array = numpy_helper.to_array(tensor, base_dir=str(TINY))
        assert header.data(TINY) == array.tobytes()


@pytest.mark.parametrize("values", [[0, 0, 0], [0, -3, 7]])
@pytest.mark.parametrize("dtype", [TensorProto.INT8, TensorProto.INT32, TensorProto.INT64])
@pytest.mark.parametrize("raw", [True, False])
def test_values_however_they_are_stored(values: list[int], dtype: int, raw: bool) -> None:
    array = np.array(values, helper.tensor_dtype_to_np_dtype(dtype))
    tensor = helper.make_tensor("t", dtype, [3], array.tobytes() if raw else values, raw=raw)
    graph = helper.make_graph([helper.make_node("Identity", ["t"], ["y"])], "g", [], [], [tensor])
    found = read_onnx(helper.make_model(graph).SerializeToString(), "g")
    assert found.constants["t"].data(Path()) == array.tobytes()


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "", ".."])
def test_outside_data_in_this_folder_only(location: str, tmp_path: Path) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.INT8, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "1")):
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph([helper.make_node("Identity", ["t"], ["y"])], "g", [], [], [tensor])
    found = read_onnx(helper.make_model(graph).SerializeToString(), "g")
    assert found.constants["t"].data(tmp_path) is None


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        read_onnx(data, "g")
    except BundleError as problem:
        assert str(problem).startswith("g: ")


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_change_of_a_byte(position: int, value: int) -> None:
    data = bytearray((TINY / "memory.onnx").read_bytes())
    data[position % len(data)] = value
    try:
        read_onnx(bytes(data), "g")
    except BundleError as problem:
        assert str(problem).startswith("g: ")
