"""A float32 graph becomes a strongly typed float16 one: every tensor says what it is, every change of type is a Cast.

TensorRT 11 computes in the types that the graph states and in no others, and TensorRT 10 does so when it is asked to;
one graph serves both. What is float16 here:

- what goes from graph to graph and from step to step (tokens, cross_*, past_*, present_*), so the caches are half;
- weights, and every node that is not an island.

Islands compute in float32: the nodes that the range audit found (range_audit.py), and those that follow from the graph
alone: nodes whose weights or constants float16 does not hold, what lies between the last matrix product and a float32
output (the norm of an embedding), what a detector chooses its boxes by and where they are, and the softmax of heads of
an odd width. pixels, ids, embedding, norm, logits, boxes and scores keep their types.

The same graph runs on ONNX Runtime, where its numbers are checked. Names of nodes and of what flows stay; a Cast is
named after its tensor: "NAME.half", "NAME.single".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mammut_export.weights import LARGEST_HALF
from mammut_runtime.manifest import Scheme, is_between

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
SMALLEST_NORMAL_HALF = 2.0**-14
"""Below it float16 loses digits; a tensor whose largest value is below it is not worth having in float16."""
HEAD_ALIGNMENT = 8
"""Channels. tensorrt-rtx 1.7 fails to build the decoder in float16 (an internal error) with heads of 12 or 20 channels,
and builds it with 8, 16, 24, 32, 40, 64; with the softmax in float32 it builds always."""
_FLOATS = (HALF, SINGLE)
_Wish = Literal["half", "single", "any"]

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
"""Where a tail in float32 ends: these cost time."""
_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Identity", "Flatten", "Gather"}
)
"""Give what they take, elsewhere; of any type."""
_ASK_ONLY = frozenset({"Shape", "Size", "IsNaN", "IsInf", "NonZero", "ArgMax", "ArgMin"})
"""Take floats of any type and give none."""
_COMPARE = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_ALWAYS_SINGLE = frozenset({"NonMaxSuppression"})
"""ONNX has them in float32 only."""
_ALWAYS_SINGLE_INPUTS = {"Resize": (2,)}


def for_tensorrt(model: ir.Model, scheme: Scheme, islands: frozenset[str] = frozenset(), *, half: bool = True) -> None:
    """Make one graph of a bundle for tensorrt ready to be stored. The last step before weights.move_to_store.

    model: the traced float32 graph, or what quantize_graph made of it for this target; changed in place. scheme: the
    graph's own. islands: names of nodes that stay float32 (range_audit.Audit.islands). half: whether what flows between
    the bundle's graphs is float16: False only where all of them are fp32. A graph of scheme fp32 in a mixed bundle
    computes in float32 between casts.
    """
    if half:
        everything = frozenset(str(node.name) for node in model.graph)
        to_typed_half(model, everything if scheme == "fp32" else islands)


def to_typed_half(model: ir.Model, islands: frozenset[str] = frozenset()) -> None:
    """Type a graph, in place. islands: names of nodes that compute in float32; names of no node are ignored."""
    _Typing(model.graph, islands).apply()


def structural_islands(graph: ir.Graph) -> dict[str, str]:
    """Node -> why it computes in float32 whatever the data: what can be seen in the graph alone."""
    found = {str(node.name): "ONNX has it in float32 only" for node in graph if node.op_type in _ALWAYS_SINGLE}
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and (reason := _lost_in_half(value, node, index)):
                found.setdefault(str(node.name), reason)
    for node in graph:
        width = _head_width(node)
        if width is not None and width % HEAD_ALIGNMENT:
            found.setdefault(str(node.name), f"no float16 attention with heads of {width} channels in TensorRT")
    for node in _tails(graph):
        found.setdefault(str(node.name), "between the last matrix product and a float32 output")
    for node in _choices(graph):
        found.setdefault(str(node.name), "decides what is chosen, or where it is")
    return found


def survives_half(array: NDArray[np.floating]) -> bool:
    """Whether float16 holds the values: none of them too large, and the largest not among the subnormal ones."""
    finite = np.abs(array[np.isfinite(array)])
    largest = float(finite.max(initial=0.0))
    return largest == 0.0 or SMALLEST_NORMAL_HALF <= largest <= LARGEST_HALF


def _lost_in_half(value: ir.Value, node: ir.Node, index: int) -> str | None:
    if value.const_value is None or value.producer() is not None or value.const_value.dtype != SINGLE:
        producer = value.producer()
        if producer is None or producer.op_type != "DequantizeLinear" or node.op_type == "DequantizeLinear":
            return None
        scale = producer.inputs[1]
        if scale is None or scale.const_value is None or survives_half(scale.const_value.numpy()):
            return None
        return f"float16 does not hold the scales of {producer.inputs[0].name}"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") or index in _ALWAYS_SINGLE_INPUTS.get(node.op_type, ()):
        return None
    array = value.const_value.numpy()
    if survives_half(array):
        return None
    return f"float16 does not hold {value.name}, largest value {np.abs(array[np.isfinite(array)]).max():.3g}"


def _head_width(node: ir.Node) -> int | None:
    """Channels of the heads that a Softmax is about; None if it is about something else, or the shape is not known."""
    scores = node.inputs[0].producer() if node.op_type == "Softmax" and node.inputs[0] is not None else None
    if scores is not None and scores.op_type == "Add":
        added = [value.producer() for value in scores.inputs if value is not None]
        scores = next((each for each in added if each is not None and each.op_type == "MatMul"), None)
    if scores is None or scores.op_type != "MatMul":
        return None
    shapes = [value.shape for value in scores.inputs if value is not None and value.shape is not None]
    widths = [shape[axis] for shape, axis in zip(shapes, (-1, -2), strict=False)]
    return next((width for width in widths if isinstance(width, int)), None)


def _tails(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes all of whose results end in float32 outputs without passing a product; at most one LayerNormalization."""
    single = {value for value in graph.outputs if not is_between(str(value.name)) and value.dtype == SINGLE}
    floats = _float_values(graph)
    tail: set[ir.Node] = set()
    for node in reversed(list(graph)):
        if node.op_type in _PRODUCTS or not any(value in floats for value in node.outputs):
            continue
        results = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        users = [use.node for value in results for use in value.uses()]
        ends = all(value in single for value in results if value.is_graph_output())
        if ends and results and all(user in tail and user.op_type != "LayerNormalization" for user in users):
            tail.add(node)
            yield node


def _choices(graph: ir.Graph) -> Iterator[ir.Node]:
    """In a graph that chooses the best (TopK): what leads from a product to that choice or to a float32 output, and
    what is computed of such values alone: a detector's scores and boxes.

    Float16 has one value for many scores, and half a pixel between those above 512.
    """
    floats, ends = _float_values(graph), [node.inputs[0] for node in graph if node.op_type == "TopK"]
    if not ends:
        return
    ends += [value for value in graph.outputs if not is_between(str(value.name))]
    chosen: set[ir.Node] = set()
    while ends:
        value = ends.pop()
        node = value.producer() if value is not None and value in floats else None
        if node is not None and node not in chosen and not _is_layer(node):
            chosen.add(node)
            ends += node.inputs
    fixed = {value for value in graph.initializers.values()}
    for node in graph:
        given = [value for value in node.inputs if value in floats and value not in fixed]
        if not given:  # a table's entry, or a whole number made a float
            fixed.update(node.outputs)
        elif all(value.producer() in chosen for value in given) and not _is_layer(node):
            chosen.add(node)
    yield from (node for node in graph if node in chosen)


def _is_layer(node: ir.Node) -> bool:
    """Where values of another kind begin."""
    return node.op_type in _PRODUCTS | {"LayerNormalization", "ConvTranspose"}


class _Typing:
    """Decides a type for each node, then changes the graph to it."""

    def __init__(self, graph: ir.Graph, islands: frozenset[str]) -> None:
        self._graph = graph
        self._floats = _float_values(graph)
        self._islands = islands | structural_islands(graph).keys()
        self._types: dict[ir.Value, ir.DataType] = {}
        """Of float values, as far as they are decided."""
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def apply(self) -> None:
        graph = self._graph
        wishes = self._wishes()
        _agree_on_scales(graph)
        for value in graph.inputs:
            if value in self._floats:
                self._types[value] = HALF if is_between(str(value.name)) else SINGLE
                value.dtype = self._types[value]
        for node in list(graph):
            self._retype(node, wishes)
        for index, value in enumerate(list(graph.outputs)):
            if value in self._floats:
                wanted = HALF if is_between(str(value.name)) else SINGLE
                self._settle_output(index, value, wanted)
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Remove the constants that are used in another type only; that one gets the name."""
        constants = self._graph.initializers
        for name, value in list(constants.items()):
            if value.uses() or value.is_graph_output():
                continue
            del constants[name]
            made = [each for (given, _), each in self._cast.items() if given is value]
            if len(made) == 1 and made[0].const_value is not None:
                del constants[str(made[0].name)]
                made[0].name = made[0].const_value.name = name
                constants[name] = made[0]

    # --- deciding -----------------------------------------------------------------------------------------------------

    def _wishes(self) -> dict[ir.Node, _Wish]:
        """What each node would like its float results to be, from the end of the graph to its beginning."""
        wishes: dict[ir.Node, _Wish] = {}
        for node in reversed(list(self._graph)):
            if str(node.name) in self._islands:
                wishes[node] = "single"
            elif self._follows_users(node):
                wishes[node] = self._wanted_by_users(node, wishes)
            else:
                wishes[node] = "half"
        return wishes

    def _follows_users(self, node: ir.Node) -> bool:
        """Moves, and nodes that make floats of something else: their type costs nothing by itself."""
        makes = not any(value in self._floats for value in node.inputs if value is not None)
        return node.op_type in _MOVES or node.op_type in ("DequantizeLinear", "Cast") or makes

    def _wanted_by_users(self, node: ir.Node, wishes: dict[ir.Node, _Wish]) -> _Wish:
        wanted: set[_Wish] = set()
        for value in node.outputs:
            if value.is_graph_output() and value in self._floats:
                wanted.add("half" if is_between(str(value.name)) else "single")
            for use in value.uses():
                if use.node.op_type in _ASK_ONLY or use.node.op_type == "QuantizeLinear":
                    continue
                if use.node.op_type == "Cast" and use.node.outputs[0] not in self._floats:
                    continue
                wanted.add(wishes[use.node])
        return "half" if "half" in wanted else "single" if "single" in wanted else "any"

    # --- changing -----------------------------------------------------------------------------------------------------

    def _retype(self, node: ir.Node, wishes: dict[ir.Node, _Wish]) -> None:
        """Give one node inputs of its type; those before it are done."""
        if node.op_type == "QuantizeLinear":
            given = node.inputs[0]
            if given in self._floats:
                self._give(node, 1, self._type(given))
            return
        wanted = self._type_of_node(node, wishes[node])
        if node.op_type == "DequantizeLinear":
            self._give(node, 1, wanted)
        elif node.op_type == "Cast":
            if node.outputs[0] in self._floats:
                node.attributes.add(ir.AttrInt64("to", wanted))
        elif node.op_type not in _ASK_ONLY:
            single_only = _ALWAYS_SINGLE_INPUTS.get(node.op_type, ())
            for index, value in enumerate(node.inputs):
                if value is not None and value in self._floats:
                    self._give(node, index, SINGLE if index in single_only else wanted)
            _retype_constant(node, wanted)
        for value in node.outputs:
            if value in self._floats:
                self._types[value] = wanted
                value.dtype = wanted

    def _type_of_node(self, node: ir.Node, wish: _Wish) -> ir.DataType:
        moved = node.inputs[0] if node.op_type in _MOVES and node.inputs else None
        if moved is not None and moved in self._floats and str(node.name) not in self._islands:
            if moved.producer() is None and moved.const_value is not None:
                return SINGLE if wish == "single" else HALF
            # A wish for float32 that the value before it does not have would only move more bytes.
            return self._type(moved) if wish == "any" or self._type(moved) == HALF else _as_type(wish)
        return _as_type(wish)

    def _type(self, value: ir.Value | None) -> ir.DataType:
        return SINGLE if value is None else self._types.get(value, SINGLE)

    def _give(self, node: ir.Node, index: int, wanted: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.const_value is not None and value.producer() is None:
            if value.const_value.dtype in _FLOATS and value.const_value.dtype != wanted:
                node.replace_input_with(index, self._converted(value, wanted))
        elif self._type(value) != wanted:
            node.replace_input_with(index, self._casted(value, wanted))

    def _converted(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """An initializer in another type."""
        if (value, wanted) not in self._cast:
            name = _name(value, wanted)
            assert value.const_value is not None
            with np.errstate(over="ignore"):
                array = value.const_value.numpy().astype(wanted.numpy())
            tensor = ir.Tensor(array, name=name)
            made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted), const_value=tensor)
            self._graph.register_initializer(made)
            self._cast[value, wanted] = made
        return self._cast[value, wanted]

    def _casted(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if (value, wanted) not in self._cast:
            cast = _cast(value, wanted, _name(value, wanted))
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], cast)
            else:
                self._graph.insert_after(producer, cast)
            self._cast[value, wanted] = cast.outputs[0]
        return self._cast[value, wanted]

    def _settle_output(self, index: int, value: ir.Value, wanted: ir.DataType) -> None:
        """An output keeps its name and gets its type, by a cast if need be."""
        if self._type(value) == wanted:
            value.dtype = wanted
            return
        name, kind = str(value.name), "half" if self._type(value) == HALF else "single"
        made = self._cast.get((value, wanted))
        value.name = f"{name}.{kind}"
        if made is None:
            cast = _cast(value, wanted, name)
            producer = value.producer()
            if producer is None:
                self._graph.append(cast)
            else:
                self._graph.insert_after(producer, cast)
            made = cast.outputs[0]
        made.name = name
        made.shape = value.shape
        self._graph.outputs[index] = made


def _as_type(wish: _Wish) -> ir.DataType:
    return SINGLE if wish == "single" else HALF


def _name(value: ir.Value, wanted: ir.DataType) -> str:
    return f"{value.name}.{'half' if wanted == HALF else 'single'}"


def _cast(value: ir.Value, wanted: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", wanted)], name=f"{name}/Cast")
    node.outputs[0].name = name
    node.outputs[0].dtype = wanted
    node.outputs[0].shape = value.shape
    return node


def _retype_constant(node: ir.Node, wanted: ir.DataType) -> None:
    """A node that makes a float of its own attribute."""
    if node.op_type not in ("Constant", "ConstantOfShape") or "value" not in node.attributes:
        return
    tensor = node.attributes["value"].as_tensor()
    if tensor.dtype in _FLOATS and tensor.dtype != wanted:
        node.attributes.add(ir.AttrTensor("value", ir.Tensor(tensor.numpy().astype(wanted.numpy()))))


def _float_values(graph: ir.Graph) -> set[ir.Value]:
    """Every value that is float32 or float16. Not read from the values' own types: new nodes may have none."""
    found = {value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype in _FLOATS}
    found |= {v for v in graph.initializers.values() if v.const_value is not None and v.const_value.dtype in _FLOATS}
    for node in graph:
        if _gives_floats(node, found):
            outputs: Iterable[ir.Value] = node.outputs[:1] if node.op_type == "TopK" else node.outputs
            found.update(outputs)
    return found


def _gives_floats(node: ir.Node, floats: set[ir.Value]) -> bool:
    if node.op_type in _ASK_ONLY | _COMPARE | {"QuantizeLinear", "NonMaxSuppression", "Not", "And", "Or"}:
        return False
    if node.op_type == "DequantizeLinear":
        return True
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) in [int(each) for each in _FLOATS]
    if node.op_type in ("Constant", "ConstantOfShape"):
        value = node.attributes.get("value")
        return value.as_tensor().dtype in _FLOATS if value is not None else node.op_type == "ConstantOfShape"
    decisive = node.inputs[1] if node.op_type == "Where" else node.inputs[0] if node.inputs else None
    return decisive is not None and decisive in floats


def _agree_on_scales(graph: ir.Graph) -> None:
    """Round the scales of activations to float16 values, so that both sides of a quantized tensor mean the same.

    The side before it may be float32 (after a LayerNormalization), the side behind it float16.
    """
    for node in graph:
        scale = node.inputs[1] if node.op_type == "QuantizeLinear" else None
        if scale is None or scale.const_value is None or scale.const_value.dtype != SINGLE:
            continue
        array = scale.const_value.numpy()
        if survives_half(array):
            scale.const_value = ir.Tensor(array.astype(np.float16).astype(np.float32), name=str(scale.name))
