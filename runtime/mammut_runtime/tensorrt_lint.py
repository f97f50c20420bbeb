"""Says whether TensorRT will take a graph, and if not, which node stands in the way, why, and what to do.

It needs no TensorRT, no ONNX library and no GPU: it reads the file and knows the parser's rules, from the published
list of operators (tensorrt_operators.py) and from what tensorrt-rtx refuses. It may be stricter than a given version of
TensorRT, because a bundle serves them all from 10.3 on; the tests hold it against tensorrt-rtx in the other direction:
what that refuses, this must find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mammut_runtime import onnx_reader as onnx
from mammut_runtime.bundle import Bundle
from mammut_runtime.manifest import InputProfile
from mammut_runtime.onnx_reader import Node, OnnxGraph, read_onnx
from mammut_runtime.tensorrt_operators import (
    BYTES,
    CONSTANT_INPUTS,
    FLOATS,
    FLOATS_ONLY_ALIKE,
    KINDS,
    LARGEST_TOP_K,
    NEWER,
    NEWEST_OPSET,
    OLDEST_OPSET,
    OPERATORS,
    PLUGINS,
)

HEAD_ALIGNMENT = 8
_EXPORT_AGAIN = "export the bundle again with --target tensorrt"
_REMEDIES = {
    "DynamicQuantizeLinear": "ranges must be known beforehand: export with --precision int8 and --calibration",
    "MatMulInteger": "ranges must be known beforehand: export with --precision int8 and --calibration",
    "QLinearMatMul": "keep QuantizeLinear and DequantizeLinear around a MatMul instead",
    "QLinearConv": "keep QuantizeLinear and DequantizeLinear around a Conv instead",
    "Attention": "write it as MatMul, Softmax, MatMul (export with opset 21)",
}
_RESIZE_MODES = ("nearest", "linear")


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT will not take."""

    graph: str
    node: str
    """Its name; of an input where it is about a shape; "" where it is about the whole graph."""
    op_type: str
    """"" where it is no node."""
    rule: str
    """operator, plugin, attention, dtype, types, zero-point, bias, quantized-constant, constant, resize, outputs,
    profile or opset."""
    reason: str
    remedy: str

    def describe(self) -> str:
        """One line."""
        place = f"{self.graph}: {self.node}" if self.node else self.graph
        kind = f" ({self.op_type})" if self.op_type else ""
        return f"{place}{kind}: {self.reason}; {self.remedy}"


def lint_bundle(bundle: Bundle) -> tuple[Finding, ...]:
    """Every graph of a bundle, with the bundle's own profiles."""
    return tuple(
        finding
        for name in bundle.manifest.graphs
        for finding in lint_graph(bundle.graph_path(name), bundle.manifest.profiles.get(name, {}))
    )


def lint_graph(path: Path, profiles: Mapping[str, InputProfile] | None = None) -> tuple[Finding, ...]:
    """One graph's file. profiles: input -> sizes to build for. Raises BundleError for a file that is not ONNX."""
    graph = read_onnx(path.read_bytes(), path.name)
    return tuple(_Lint(path.stem, path.parent, graph).findings(profiles or {}))


class _Lint:
    def __init__(self, name: str, folder: Path, graph: OnnxGraph) -> None:
        self._name, self._folder, self._graph = name, folder, graph
        self._types = _types(graph)
        self._known = _constants(graph)
        self._makers = {output: node for node in graph.nodes for output in node.outputs}

    def findings(self, profiles: Mapping[str, InputProfile]) -> Iterator[Finding]:
        yield from self._whole()
        yield from self._inputs(profiles)
        for node in self._graph.nodes:
            for check in (self._operator, self._quantization, self._types_of, self._details):
                found = list(check(node))
                yield from found
                if found:
                    break  # what follows from it would only distract

    def _found(self, node: Node, rule: str, reason: str, remedy: str = _EXPORT_AGAIN) -> Finding:
        return Finding(self._name, node.shown, node.op_type, rule, reason, remedy)

    # --- the graph as a whole -----------------------------------------------------------------------------------------

    def _whole(self) -> Iterator[Finding]:
        opset = self._graph.opset
        if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
            reason = f"opset {opset}, expected {OLDEST_OPSET} to {NEWEST_OPSET}"
            yield Finding(self._name, "", "", "opset", reason, "export with opset 21")
        for value in (*self._graph.inputs, *self._graph.outputs):
            if KINDS.get(value.dtype) in (None, "quantized"):
                reason = f"{_type(value.dtype)} is no type of an input or output"
                yield Finding(self._name, value.name, "", "dtype", reason, "use float32, float16, int64 or bool")

    def _inputs(self, profiles: Mapping[str, InputProfile]) -> Iterator[Finding]:
        for value in self._graph.inputs:
            if value.name in self._graph.constants:
                continue
            profile = profiles.get(value.name)
            problem = _profile_problem(value.shape, profile)
            if problem:
                remedy = "give the smallest, usual and largest shape (manifest: profiles)"
                yield Finding(self._name, value.name, "", "profile", problem, remedy)

    # --- a node -------------------------------------------------------------------------------------------------------

    def _operator(self, node: Node) -> Iterator[Finding]:
        operator = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        remedy = _REMEDIES.get(node.op_type, "express it in operators of TensorRT's list")
        if node.op_type == "Attention":
            yield self._found(node, "attention", "TensorRT before 10.15 does not have it, tensorrt-rtx rarely", remedy)
        elif operator != node.op_type:
            yield self._found(node, "operator", f"{operator} is not an ONNX standard operator", remedy)
        elif node.op_type in NEWER:
            yield self._found(node, "operator", "TensorRT 10.3 does not have it", remedy)
        elif node.op_type not in OPERATORS:
            yield self._found(node, "operator", "TensorRT does not have it", remedy)
        elif node.op_type in PLUGINS:
            reason = "it runs as a plugin, which tensorrt-rtx does not have"
            yield self._found(node, "plugin", reason, "do it outside of the graph, or in plain operators (gather)")

    def _types_of(self, node: Node) -> Iterator[Finding]:
        taken = [self._types.get(name) for name in node.inputs if name]
        index = 1 if node.op_type == "Where" else 0
        data = taken[index] if len(taken) > index else None
        made = [self._types.get(name) for name in node.outputs]
        if node.op_type == "DequantizeLinear":
            return  # _quantization has looked at it
        if node.op_type == "Cast" and made:
            made = [_whole_number(node.attributes.get("to", 0))]
        for dtype in (data, *(made if node.op_type != "QuantizeLinear" else ())):
            if dtype is not None and KINDS.get(dtype) not in OPERATORS[node.op_type] and not _makes_truths(node, dtype):
                allowed = " and ".join(sorted(OPERATORS[node.op_type]))
                yield self._found(node, "dtype", f"{_type(dtype)} data; TensorRT has it for {allowed}")
                return
        floats = {each for each in taken if each is not None and KINDS.get(each) == FLOATS}
        if node.op_type in FLOATS_ONLY_ALIKE and len(floats) > 1:
            names = " and ".join(sorted(map(_type, floats)))
            yield self._found(node, "types", f"mixes {names}; a typed network converts nothing by itself", "add a Cast")

    def _quantization(self, node: Node) -> Iterator[Finding]:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            data = self._types.get(node.inputs[0])
            if node.op_type == "DequantizeLinear" and data == onnx.INT32:
                reason = "dequantizes int32: a quantized bias"
                yield self._found(node, "bias", reason, "keep biases in floating point (QuantizeBias=False)")
                return
            yield from self._zero_point(node)
            return
        for name in node.inputs:
            constant = self._graph.constants.get(name)
            if constant is not None and KINDS.get(constant.dtype) == "quantized":
                reason = f"takes the {_type(constant.dtype)} constant {name}"
                yield self._found(node, "quantized-constant", reason, "put a DequantizeLinear directly behind it")

    def _zero_point(self, node: Node) -> Iterator[Finding]:
        remedy = "quantize symmetrically, in int8 with zero points of 0"
        if BYTES in (KINDS.get(self._types.get(name, 0)) for name in (node.inputs[0], *node.outputs)):
            yield self._found(node, "zero-point", "quantizes to uint8", remedy)
            return
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        constant = self._graph.constants.get(name)
        if name and constant is None:
            yield self._found(node, "zero-point", f"its zero point {name} is not a constant", remedy)
        elif constant is not None:
            data = constant.data(self._folder)
            if data is None or any(data):
                what = "cannot be read" if data is None else "is not 0"
                yield self._found(node, "zero-point", f"its zero point {name} {what}", remedy)

    def _details(self, node: Node) -> Iterator[Finding]:
        for index in CONSTANT_INPUTS.get(node.op_type, ()):
            if len(node.inputs) > index and node.inputs[index] and node.inputs[index] not in self._known:
                reason = f"{node.inputs[index]} must be known when the engine is built"
                yield self._found(node, "constant", reason, "make it a constant")
        if node.op_type == "Resize":
            yield from self._resize(node)
        elif node.op_type == "Softmax":
            yield from self._heads(node)
        elif node.op_type == "LayerNormalization" and len([name for name in node.outputs if name]) > 1:
            yield self._found(node, "outputs", "more than its first output is used", "compute the others apart")
        elif node.op_type == "MaxPool" and len([name for name in node.outputs if name]) > 1:
            yield self._found(node, "outputs", "its indices are used", "use ArgMax")
        elif node.op_type == "ScatterND" and node.attributes.get("reduction", "none") != "none":
            yield self._found(node, "operator", "a reduction is not supported", "scatter without one")
        elif node.op_type == "TopK":
            yield from self._top_k(node)

    def _resize(self, node: Node) -> Iterator[Finding]:
        mode = node.attributes.get("mode", "nearest")
        if node.attributes.get("antialias"):
            yield self._found(node, "resize", "antialiasing is not supported", "resize at export, or without it")
        elif mode not in _RESIZE_MODES:
            yield self._found(node, "resize", f"mode {mode!r}, expected nearest or linear", "resize at export")

    def _top_k(self, node: Node) -> Iterator[Finding]:
        constant = self._graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        data = constant.data(self._folder) if constant is not None else None
        count = int.from_bytes(data[:8], "little", signed=True) if data else 0
        if count > LARGEST_TOP_K or node.attributes.get("sorted", 1) != 1:
            what = f"K is {count}, expected at most {LARGEST_TOP_K}" if count > LARGEST_TOP_K else "sorted is 0"
            yield self._found(node, "operator", what, "use a smaller K, sorted")

    def _heads(self, node: Node) -> Iterator[Finding]:
        """Attention in float16 with heads that are no multiple of 8 channels wide: an internal error of the builder."""
        if self._types.get(node.inputs[0]) != onnx.FLOAT16:
            return
        scores = self._makers.get(node.inputs[0])
        if scores is not None and scores.op_type == "Add":
            makers = [self._makers.get(name) for name in scores.inputs]
            scores = next((each for each in makers if each is not None and each.op_type == "MatMul"), None)
        if scores is None or scores.op_type != "MatMul":
            return
        for name, axis in zip(scores.inputs, (-1, -2), strict=False):
            value = self._graph.values.get(name)
            width = value.shape[axis] if value is not None and value.shape and len(value.shape) > 1 else None
            if isinstance(width, int) and width % HEAD_ALIGNMENT:
                reason = f"attention in float16 with heads of {width} channels, expected a multiple of {HEAD_ALIGNMENT}"
                yield self._found(node, "attention", reason, "compute the Softmax in float32")
                return


def _profile_problem(shape: tuple[int | str, ...] | None, profile: InputProfile | None) -> str | None:
    if shape is None:
        return "its shape is not known"
    open_sizes = [str(size) or "?" for size in shape if isinstance(size, str)]
    if profile is None:
        return f"no profile for its free sizes ({', '.join(open_sizes)})" if open_sizes else None
    sizes = (profile.minimum, profile.optimum, profile.maximum)
    if any(len(each) != len(shape) for each in sizes):
        return f"its profile has {', '.join(str(len(each)) for each in sizes)} sizes, expected {len(shape)} each"
    for size, low, usual, high in zip(shape, *sizes, strict=True):
        if not low <= usual <= high:
            return f"its profile has {low}, {usual}, {high}, expected minimum <= optimum <= maximum"
        if isinstance(size, int) and not low == usual == high == size:
            return f"its profile has {low}, {usual}, {high} where the graph has {size}"
    return None


def _constants(graph: OnnxGraph) -> set[str]:
    """Names of everything that does not depend on the inputs."""
    known = {*graph.constants, ""}
    for node in graph.nodes:
        if all(name in known for name in node.inputs):
            known.update(node.outputs)
    return known


def _types(graph: OnnxGraph) -> dict[str, int]:
    """Element types of all tensors, as far as they follow from the operators."""
    types = {name: tensor.dtype for name, tensor in graph.constants.items()}
    types |= {value.name: value.dtype for value in graph.inputs}
    for node in graph.nodes:
        for index, output in enumerate(node.outputs):
            found = _output_type(node, index, types)
            if output and found is not None:
                types[output] = found
    return types


_TRUTHS = frozenset(
    ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"]
)
_COUNTS = frozenset(["Shape", "Size", "ArgMax", "ArgMin", "NonZero", "NonMaxSuppression"])


def _output_type(node: Node, index: int, types: Mapping[str, int]) -> int | None:
    kind = node.op_type
    given = [types.get(name) for name in node.inputs]
    if kind in _TRUTHS:
        return onnx.BOOL
    if kind in _COUNTS or (kind in ("TopK", "MaxPool") and index == 1):
        return onnx.INT64
    if kind == "Cast":
        return _whole_number(node.attributes.get("to", 0))
    if kind in ("Constant", "ConstantOfShape"):
        return _constant_type(node)
    if kind == "QuantizeLinear":
        stated = _whole_number(node.attributes.get("output_dtype", 0))
        return stated or (given[2] if len(given) > 2 else onnx.UINT8)
    if kind == "DynamicQuantizeLinear":
        return onnx.FLOAT if index == 1 else onnx.UINT8
    if kind in ("MatMulInteger", "ConvInteger"):
        return onnx.INT32
    decisive = {"DequantizeLinear": 1, "Where": 1, "CastLike": 1, "OneHot": 2}.get(kind, 0)
    return given[decisive] if kind not in ("If", "Loop", "Scan") and len(given) > decisive else None


def _constant_type(node: Node) -> int | None:
    if node.value is not None:
        return node.value.dtype
    if node.op_type == "ConstantOfShape" or any(key.startswith("value_float") for key in node.attributes):
        return onnx.FLOAT
    return onnx.INT64 if any(key.startswith("value_int") for key in node.attributes) else None


def _makes_truths(node: Node, dtype: int) -> bool:
    """A comparison gives bools, a Shape int64, whatever they take; that is not data of the kind that is asked about."""
    return (node.op_type in _TRUTHS and dtype == onnx.BOOL) or (node.op_type in _COUNTS and dtype == onnx.INT64)


def _whole_number(value: int | float | str | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else 0


def _type(dtype: int) -> str:
    return onnx.TYPE_NAMES.get(dtype, f"type {dtype}")
