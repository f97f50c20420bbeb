"""Which tensors of a graph a quantizer asks about, read from the ONNX file. Needs the `onnx` library.

A layer is a node with a weight: MatMul, Gemm, Conv or Gather with one operand that does not depend on the graph's
inputs. Products of two activations (attention's) are no layers: they stay unquantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mammut_runtime.errors import EngineError, InputError

Scope = Literal["linear", "matmul", "all"]
"""Which activations are observed. linear: inputs and outputs of MatMul, Gemm and Conv nodes with a weight. matmul: also
of products of two activations. all: every float that flows between nodes."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
LAYER_TYPES = ("MatMul", "Gemm", "Conv", "Gather")
_PRODUCTS = ("MatMul", "Gemm", "Conv")
INSTALL = "pip install mammut-edge[calibrate]"


@dataclass(frozen=True)
class Layer:
    """A node with a weight."""

    name: str
    """Of the node, e.g. "text.self_blocks.0.qkv/MatMul"."""
    op_type: str
    inputs: tuple[str, ...]
    """Activations that go in: tensor names."""
    weight: str
    """The operand that is constant: a tensor name, usually an initializer's."""
    output: str
    """A tensor name. For a MatMul before its bias is added."""


def library() -> Any:
    """The onnx module. Raises EngineError that names the extra if it is missing."""
    try:
        import onnx
    except ImportError as problem:
        raise EngineError(f"this needs the onnx library, which does not load ({problem}); {INSTALL}") from problem
    return onnx


def read_graph(path: Path) -> Any:
    """The onnx.ModelProto in a file; weights that lie outside stay there. Raises InputError if it is none."""
    try:
        return library().load(str(path), load_external_data=False)
    except EngineError:
        raise
    except Exception as problem:  # protobuf's errors share no class with onnx's
        raise InputError(f"{path}: not readable as an ONNX file: {problem}; export the bundle again") from problem


def layers(model: Any) -> tuple[Layer, ...]:
    """Every layer of an onnx.ModelProto, in the order of the graph."""
    constant = constants(model)
    return tuple(
        Layer(
            node.name or node.output[0],
            node.op_type,
            tuple(name for name in node.input if name and name not in constant),
            next(name for name in node.input[:2] if name in constant),
            node.output[0],
        )
        for node in model.graph.node
        if node.op_type in LAYER_TYPES and _has_weight(node, constant)
    )


def activation_names(model: Any, scope: Scope = "linear") -> tuple[str, ...]:
    """Names of the float activations in a scope, each once, in the order of the graph; inputs of the graph included.

    Raises InputError for an unknown scope.
    """
    if scope not in SCOPES:
        raise InputError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    floats = float_names(model)
    return tuple(dict.fromkeys(name for name in _asked_for(model, scope) if name in floats))


def _asked_for(model: Any, scope: Scope) -> Iterator[str]:
    constant = constants(model)
    for node in model.graph.node:
        product = node.op_type in _PRODUCTS and (scope == "matmul" or _has_weight(node, constant))
        if product or scope == "all":
            yield from (name for name in (*node.input, *node.output) if name and name not in constant)


def constants(model: Any) -> set[str]:
    """Names of all tensors that do not depend on the graph's inputs."""
    known = {each.name for each in model.graph.initializer}
    for node in model.graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
    return known


def float_names(model: Any) -> set[str]:
    """Names of the activations that are float32 or float16, as ONNX infers it."""
    onnx = library()
    types = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name for value in values if value.type.tensor_type.elem_type in types}


def _has_weight(node: Any, constant: set[str]) -> bool:
    """Whether exactly one of the two operands is constant. A Gather's must be its table, not its indices."""
    first, second = (name in constant for name in node.input[:2])
    return first and not second if node.op_type == "Gather" else first != second
