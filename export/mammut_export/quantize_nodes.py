"""Rewrites the layers of one graph in place, in standard operators of opset 21.

A layer keeps the names of its node, its activation input and its output, so that it can be found in both graphs and
compared. Its bias stays in floating point. What an engine makes of the nodes was measured; docs/log.md has it:

- int8: QuantizeLinear, DequantizeLinear around the activation, DequantizeLinear after the weight. The engine fuses
  them with the product into one integer kernel whose result is a float.
- int8-dynamic: DynamicQuantizeLinear, MatMulInteger, Cast and two Mul.
- int4: DequantizeLinear in blocks after the weight; the activation stays a float.
- A table of rows (the token embedding) is stored in 8 bits in all of these; the rows taken are cast and scaled. One
  scale for each row serves the tied vocabulary projection as well: both read the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mammut_calibration.statistics import Range
from mammut_export.quantize_weights import QuantizedMatrix, block_for, int4_blocks, int8_channels

LAYER_TYPES = ("MatMul", "Gemm", "Conv", "Gather")
SYMMETRIC_TARGETS = ("openvino", "tensorrt")
"""Their integer kernels want signed activations around zero; ONNX Runtime's want unsigned ones with a zero point."""
TENSORRT_BLOCK = 64
"""Smallest block that TensorRT's documentation names ("Quantization Schemes": 64 and 128). TensorRT for RTX builds
smaller ones as well, so a matrix that 64 does not divide gets those; no model that we know has one."""
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def float_layers(model: ir.Model) -> list[ir.Node]:
    """Nodes with one operand that does not depend on the graph's inputs, a float: as activations.layers finds them."""
    constant: set[ir.Value] = set(model.graph.initializers.values())
    found = []
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in constant for value in inputs):
            constant.update(node.outputs)
        elif node.op_type in LAYER_TYPES and _has_weight(inputs[:2], node.op_type, constant):
            found.append(node)
    return found


def _has_weight(operands: Sequence[ir.Value], op_type: str, constant: set[ir.Value]) -> bool:
    first, second = (value in constant for value in operands)
    if op_type == "Gather":
        table = operands[0].const_value
        return first and not second and (table is None or table.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16))
    return first != second


class Rewriter:
    """Quantizes layers of one graph. Weights and activations that several layers use are quantized once."""

    def __init__(self, graph: ir.Graph, target: str, ranges: Mapping[str, Range] | None, block: int) -> None:
        self._graph, self._target, self._ranges, self._block = graph, target, ranges or {}, block
        self._matrices: dict[tuple[str, str], QuantizedMatrix] = {}
        self._activations: dict[str, Sequence[ir.Value]] = {}

    def rewrite(self, node: ir.Node, scheme: str) -> bool:
        """Quantize a layer; False if it cannot be, and then nothing is changed."""
        weight = node.inputs[0 if node.op_type == "Gather" else 1]
        if not _is_plain(node) or weight is None or not _is_float_weight(weight, 4 if node.op_type == "Conv" else 2):
            return False
        if node.op_type == "Conv" and (scheme != "int8" or self._target not in SYMMETRIC_TARGETS):
            return False  # ONNX Runtime's integer convolution needs a quantized output; it gained nothing
        if node.op_type == "Gather":
            self._rows(node, weight)
        elif scheme == "int8":
            return self._static(node, weight)
        elif scheme == "int8-dynamic":
            self._dynamic(node, weight)
        else:
            return self._blocked(node, weight)
        return True

    def drop_unused(self) -> None:
        """Remove the float weights that no node uses any more."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]

    # --- the forms of a layer ---------------------------------------------------------------------------------------

    def _static(self, node: ir.Node, weight: ir.Value) -> bool:
        given = node.inputs[0]
        assert given is not None
        if str(given.name) not in self._activations:
            scale_and_zero = self._scale_and_zero(str(given.name))
            if scale_and_zero is None:
                return False
            self._quantize_activation(node, given, *scale_and_zero)
        axis = 0 if _is_transposed(node) or node.op_type == "Conv" else 1
        restored = self._restored(node, weight, self._int8(weight, axis))
        self._separate_bias(node)
        node.replace_input_with(0, self._activations[str(given.name)][0])
        node.replace_input_with(1, restored)
        return True

    def _quantize_activation(self, node: ir.Node, given: ir.Value, scale: np.float32, zero: np.generic) -> None:
        name = str(given.name)
        parameters = [self._constant(f"{name}_scale", scale), self._constant(f"{name}_zero_point", zero)]
        integers = self._node(node, "QuantizeLinear", [given, *parameters], f"{name}_quantized")
        self._activations[name] = [self._node(node, "DequantizeLinear", [integers, *parameters], f"{name}_restored")]

    def _dynamic(self, node: ir.Node, weight: ir.Value) -> None:
        given = node.inputs[0]
        assert given is not None
        name = str(given.name)
        if name not in self._activations:
            names = (f"{name}_quantized", f"{name}_scale", f"{name}_zero_point")
            self._activations[name] = self._nodes(node, "DynamicQuantizeLinear", [given], names)
        integers, scale, zero = self._activations[name]
        axis = 0 if _is_transposed(node) else 1
        matrix = self._int8(weight, axis)
        quantized, scales, _ = self._parameters(weight, matrix)
        if axis == 0:  # the layout of the table; the engine transposes it once, when it loads the graph
            order = [ir.AttrInt64s("perm", [1, 0])]
            quantized = self._node(node, "Transpose", [quantized], f"{node.name}_transposed", order)
        stem = f"{node.name}"
        self._separate_bias(node)
        products = self._node(node, "MatMulInteger", [integers, quantized, zero], f"{stem}_integers")
        to_float = [ir.AttrInt64("to", ir.DataType.FLOAT)]
        floats = self._node(node, "Cast", [products], f"{stem}_float", to_float)
        factors = self._node(node, "Mul", [scale, scales], f"{stem}_factors")
        self._replace(node, "Mul", [floats, factors])

    def _blocked(self, node: ir.Node, weight: ir.Value) -> bool:
        transposed = _is_transposed(node)
        preferred = max(self._block, TENSORRT_BLOCK) if self._target == "tensorrt" else self._block
        block = block_for(int(weight.shape[1 if transposed else 0]), preferred)
        if block is None:
            return False
        key = (str(weight.name), "int4")
        if key not in self._matrices:
            array = _array(weight).T if transposed else _array(weight)
            signed = self._target != "tensorrt"  # its documentation asks for positive scales
            self._matrices[key] = int4_blocks(array, block, signed)
        restored = self._restored(node, weight, self._matrices[key])
        self._separate_bias(node)
        given = node.inputs[0]
        if node.op_type == "Gemm":
            self._replace(node, "MatMul", [given, restored])
        else:
            node.replace_input_with(1, restored)
        return True

    def _rows(self, node: ir.Node, table: ir.Value) -> None:
        matrix = self._int8(table, 0)
        if self._target == "tensorrt":  # it takes no integer weights but before a DequantizeLinear
            node.replace_input_with(0, self._restored(node, table, matrix))
            return
        quantized, _, _ = self._parameters(table, matrix)
        scales = self._constant(f"{table.name}_row_scale", matrix.scales[:, None])
        ids = node.inputs[1]
        rows = self._node(node, "Gather", [quantized, ids], f"{node.name}_integers")
        to_float = [ir.AttrInt64("to", ir.DataType.FLOAT)]
        floats = self._node(node, "Cast", [rows], f"{node.name}_float", to_float)
        factors = self._node(node, "Gather", [scales, ids], f"{node.name}_factors")
        self._replace(node, "Mul", [floats, factors])

    # --- numbers ----------------------------------------------------------------------------------------------------

    def _scale_and_zero(self, tensor: str) -> tuple[np.float32, np.generic] | None:
        """Of an activation; None if no usable range was seen."""
        seen = self._ranges.get(tensor)
        if seen is None or not np.isfinite([seen.low, seen.high]).all():
            return None
        if self._target in SYMMETRIC_TARGETS:
            scale, zero = np.float32(seen.largest / 127), np.int8(0)
            return (scale, zero) if _SMALLEST_SCALE <= scale < np.inf else None
        scale = np.float32((seen.high - seen.low) / 255)
        if not _SMALLEST_SCALE <= scale < np.inf:
            return None
        return scale, np.uint8(np.clip(np.rint(-seen.low / scale), 0, 255))

    def _int8(self, weight: ir.Value, axis: int) -> QuantizedMatrix:
        key = (str(weight.name), f"int8/{axis}")
        if key not in self._matrices:
            self._matrices[key] = int8_channels(_array(weight), axis)
        return self._matrices[key]

    # --- values and nodes -------------------------------------------------------------------------------------------

    def _parameters(self, weight: ir.Value, matrix: QuantizedMatrix) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers, scales and zero points of a weight, as initializers."""
        stem = f"{weight.name}_blocks" if matrix.block else str(weight.name)
        return (
            self._constant(f"{stem}_quantized", matrix.integers),
            self._constant(f"{stem}_scale", matrix.scales),
            self._constant(f"{stem}_zero_point", np.zeros(matrix.scales.shape, matrix.integers.dtype)),
        )

    def _restored(self, node: ir.Node, weight: ir.Value, matrix: QuantizedMatrix) -> ir.Value:
        name = f"{weight.name}_blocks_restored" if matrix.block else f"{weight.name}_restored"
        if name in self._activations:
            return self._activations[name][0]
        attributes = [ir.AttrInt64("axis", matrix.axis)]
        parameters = self._parameters(weight, matrix)
        inputs: Sequence[ir.Value] = parameters
        if matrix.block:
            attributes.append(ir.AttrInt64("block_size", matrix.block))
            inputs = parameters[:2]  # zero points of zero may be left out
            del self._graph.initializers[str(parameters[2].name)]
        restored = self._node(node, "DequantizeLinear", inputs, name, attributes)
        self._activations[name] = [restored]
        return restored

    def _separate_bias(self, node: ir.Node) -> None:
        """Gemm(x, W, b) becomes Add(Gemm(x, W), b), and the sum has the layer's name."""
        if node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:
            return
        bias, output = node.inputs[2], node.outputs[0]
        name = str(output.name)
        node.resize_inputs(2)
        total = ir.Node("", "Add", [output, bias], name=f"{node.name}_bias")
        self._graph.insert_after(node, total)
        ir.convenience.replace_all_uses_with(output, total.outputs[0], replace_graph_outputs=True)
        total.replace_input_with(0, output)
        _describe(total.outputs[0], output)
        output.name, total.outputs[0].name = f"{name}_product", name

    def _replace(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None]) -> None:
        """Put another node in a node's place: its name, its output's name, its users."""
        old, name = node.outputs[0], str(node.name)
        new = ir.Node("", op_type, inputs, name=name)
        self._graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)
        output_name = str(old.name)
        _describe(new.outputs[0], old)
        self._graph.remove(node, safe=True)
        new.name, new.outputs[0].name = name, output_name

    def _constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        known = self._graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        return self._nodes(before, op_type, inputs, (name,), attributes)[0]

    def _nodes(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        attributes: Sequence[ir.Attr] = (),
    ) -> Sequence[ir.Value]:
        node = ir.Node("", op_type, inputs, attributes, num_outputs=len(names), name=f"{names[0]}/{op_type}")
        for output, name in zip(node.outputs, names, strict=True):
            output.name = name
        self._graph.insert_before(before, node)
        return list(node.outputs)


def _is_plain(node: ir.Node) -> bool:
    """Whether the node is a plain product with its weight on the right, or takes rows."""
    attributes = node.attributes
    if node.op_type == "Gather":
        return bool(attributes.get_int("axis", 0) == 0)
    if node.op_type in ("MatMul", "Conv"):
        return True
    usual = attributes.get_float("alpha", 1.0) == 1.0 and attributes.get_float("beta", 1.0) == 1.0
    return bool(usual and attributes.get_int("transA", 0) == 0)


def _is_transposed(node: ir.Node) -> bool:
    return bool(node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)


def _is_float_weight(value: ir.Value, dimensions: int) -> bool:
    """Whether it is an initializer in float32, all finite, of so many dimensions."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or value.producer() is not None:
        return False
    if len(tensor.shape) != dimensions:
        return False
    return bool(np.isfinite(tensor.numpy()).all())


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def _describe(value: ir.Value, like: ir.Value) -> None:
    value.dtype, value.shape = like.dtype, like.shape


def names_of(nodes: Sequence[ir.Node]) -> Iterator[str]:
    """Layer names as activations.layers gives them."""
    for node in nodes:
        yield str(node.name or node.outputs[0].name)
