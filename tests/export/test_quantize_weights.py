"""The arithmetic of weight quantization, against its promises and against ONNX Runtime's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator

from mammut_export.quantize_weights import (
    INT8_LARGEST,
    PackingStore,
    QuantizedMatrix,
    block_for,
    int4_blocks,
    int8_channels,
    pack,
)

MATRICES = hnp.arrays(
    np.float32,
    st.tuples(st.sampled_from([16, 32, 64]), st.integers(1, 12)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(deadline=None)
@given(MATRICES, st.sampled_from([0, 1]))
def test_int8_rounds_to_the_nearest_step(matrix, axis):
    quantized = int8_channels(matrix, axis)
    scales = np.expand_dims(quantized.scales, 1 - axis)
    assert (np.abs(quantized.restored() - matrix) <= scales * (0.5 + 1e-4)).all()
    assert np.abs(quantized.integers.astype(int)).max() <= INT8_LARGEST
    assert (quantized.scales > 0).all()


@settings(deadline=None)
@given(MATRICES)
def test_int8_of_the_other_axis_is_the_transposed(matrix):
    rows, columns = int8_channels(matrix, 0), int8_channels(np.ascontiguousarray(matrix.T), 1)
    np.testing.assert_array_equal(rows.integers, columns.integers.T)
    np.testing.assert_array_equal(rows.scales, columns.scales)


@settings(deadline=None, max_examples=50)
@given(MATRICES, st.sampled_from([8, 16]), st.booleans())
def test_int4_is_never_worse_than_the_plain_scale(matrix, block, signed):
    quantized = int4_blocks(matrix, block, signed)
    blocks = matrix.astype(np.float64).reshape(-1, block, matrix.shape[1])
    steps = np.abs(blocks).max(axis=1, keepdims=True) / 7
    plain = np.clip(np.rint(blocks / np.where(steps > 0, steps, 1)), -8, 7) * steps
    error = (quantized.restored().astype(np.float64).reshape(blocks.shape) - blocks) ** 2
    rounding = np.square(np.abs(blocks).max(axis=1)) * 1e-10 + 1e-60  # of float32
    assert (error.sum(axis=1) <= ((plain - blocks) ** 2).sum(axis=1) * 1.001 + rounding).all()
    assert signed or (quantized.scales > 0).all()


def test_int4_of_random_weights_has_the_known_error():
    matrix = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    errors = [
        float(np.sqrt(np.square(int4_blocks(matrix, 32, signed).restored() - matrix).mean()))
        for signed in (True, False)
    ]
    assert errors[0] < errors[1] < 0.09
    plain = np.abs(matrix.reshape(16, 32, 64)).max(axis=1, keepdims=True) / 7
    rounded = np.rint(matrix.reshape(16, 32, 64) / plain) * plain
    assert np.sqrt(np.square(rounded.reshape(512, 64) - matrix).mean()) > 0.095  # control: one scale for all


@pytest.mark.parametrize("quantize", [lambda m: int8_channels(m, 1), lambda m: int4_blocks(m, 16)])
def test_zeros_and_subnormal_weights(quantize):
    matrix = np.zeros((32, 3), np.float32)
    matrix[:, 1] = 1e-42
    matrix[:, 2] = 1.0
    quantized = quantize(matrix)
    assert np.isfinite(quantized.scales).all()
    assert (np.abs(quantized.scales) >= np.finfo(np.float32).tiny).all()
    np.testing.assert_array_equal(quantized.restored()[:, :2], 0)
    np.testing.assert_allclose(quantized.restored()[:, 2], 1.0, rtol=0.01)


def test_int8_equals_the_engines_own_quantizer():
    pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization.quant_utils import quantize_data

    matrix = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
    quantized = int8_channels(matrix, 1)
    for column in range(6):
        zero, scale, integers = quantize_data(matrix[:, column], onnx.TensorProto.INT8, True)
        assert int(np.ravel(zero)[0]) == 0
        np.testing.assert_allclose(quantized.scales[column], np.ravel(scale)[0], rtol=1e-6)
        np.testing.assert_array_equal(quantized.integers[:, column], integers)


def test_restored_is_what_the_operator_gives():
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(32, 5)).astype(np.float32)
    convolution = rng.normal(size=(4, 3, 2, 2)).astype(np.float32)
    for quantized in (
        int8_channels(matrix, 0),
        int8_channels(matrix, 1),
        int8_channels(convolution, 0),
        int4_blocks(matrix, 16),
    ):
        np.testing.assert_allclose(quantized.restored(), dequantized(quantized), rtol=1e-6)


def dequantized(quantized: QuantizedMatrix):
    """By ONNX's own reference implementation."""
    integers, scales = ir.tensor(quantized.integers), ir.tensor(quantized.scales)
    inputs = [
        ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        for name, tensor in (("integers", integers), ("scales", scales))
    ]
    attributes = [ir.AttrInt64("axis", quantized.axis), ir.AttrInt64("block_size", quantized.block)]
    node = ir.Node("", "DequantizeLinear", inputs, attributes)
    node.outputs[0].name, node.outputs[0].dtype = "out", ir.DataType.FLOAT
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=inputs, opset_imports={"": 21}, name="one")
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    return ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.parametrize(
    ("rows", "preferred", "expected"),
    [(256, 64, 64), (192, 128, 64), (48, 64, 16), (24, 32, 8), (768, 32, 32), (12, 32, None)],
)
def test_block_divides_the_rows(rows, preferred, expected):
    assert block_for(rows, preferred) == expected


@given(hnp.arrays(np.int8, st.integers(0, 33), elements=st.integers(-8, 7)))
def test_packing_is_onnx_packing(values):
    array = values.astype(ml_dtypes.int4)
    assert pack(array).tobytes() == ir.tensor(array).tobytes()


def test_store_keeps_four_bits_in_half_a_byte(tmp_path):
    values = np.arange(-8, 8).astype(ml_dtypes.int4).reshape(2, 8)
    with PackingStore(tmp_path / "weights.bin") as store:
        first = store.add(values)
        assert store.add(values.copy()) == first
        assert store.add(np.arange(4, dtype=np.float32)) != first
    assert first == (0, 8)
    assert (tmp_path / "weights.bin").read_bytes()[:8] == ir.tensor(values).tobytes()
