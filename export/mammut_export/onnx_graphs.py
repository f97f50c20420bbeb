"""PyTorch to ONNX: traces one graph, checks what came out, and gives it the contract's names.

The opset is pinned and asserted, because the exporter answers some requests with another one; so is that every operator
is a standard one of that opset. Nothing of the exporting machine stays in the file: no paths, no stack traces.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from mammut_export.graphs import TraceableGraph
from mammut_runtime.errors import EngineError
from mammut_runtime.manifest import GraphInfo, TensorInfo

OPSET = 21
"""The newest with blocked quantization (for int4) and without the Attention operator, which not every engine takes."""
IR_VERSION = 10
"""Of the ONNX file format; the one that belongs to opset 21."""
PRODUCER = "mammut-edge"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CORES = ("detector.model.", "model.")
"""Where the core hangs in the graph modules; not part of a parameter's name."""
_NAMED = (*_CORES, "detector.")
"""Before names that say where something is from: a detector's own keep theirs."""
_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}


def to_onnx(graph: TraceableGraph) -> ir.Model:
    """Trace a graph. Its weights are still in memory; see weights.py.

    Raises EngineError when the exporter made something else than what was asked for.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.module,
            graph.example(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in graph.info.inputs],
            output_names=[tensor.name for tensor in graph.info.outputs],
            dynamic_shapes=_dynamic_shapes(graph.info),
            verbose=False,
        )
    if program is None:
        raise EngineError(f"{graph.name}: the exporter returned nothing; install the versions in constraints.txt")
    model: ir.Model = program.model
    _check_standard(model, graph.name)
    _name_values(model)
    _one_layout_per_matrix(model)
    _strip(model, graph.name)
    _check_contract(model, graph)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write the file: the same graph gives the same bytes. Large tensors must be in a WeightStore by now."""
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def check_file(path: Path) -> None:
    """ONNX's own checker, which also looks whether the outside data exist. Raises EngineError."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise EngineError(f"{path.name}: not valid ONNX: {error}; install the versions in constraints.txt") from error


def graph_info(model: ir.Model, file: str) -> GraphInfo:
    """Inputs and outputs as the graph has them, for the manifest."""
    return GraphInfo(
        file,
        tuple(_tensor_info(value) for value in model.graph.inputs),
        tuple(_tensor_info(value) for value in model.graph.outputs),
    )


# --- tracing --------------------------------------------------------------------------------------------------------


def _dynamic_shapes(info: GraphInfo) -> tuple[object, ...]:
    """In the form of the module's arguments: one entry per named argument, the rest (the caches) as one tuple."""
    dimensions: dict[str, torch.export.Dim] = {}

    def shape(tensor: TensorInfo) -> dict[int, torch.export.Dim]:
        names = {index: size for index, size in enumerate(tensor.shape) if isinstance(size, str)}
        return {index: dimensions.setdefault(name, torch.export.Dim(name)) for index, name in names.items()}

    first, *rest = (shape(tensor) for tensor in info.inputs)
    return (first, tuple(rest)) if rest else (first,)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes off the user's terminal. What it logged at level ERROR still comes through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# --- checking -------------------------------------------------------------------------------------------------------


def _check_standard(model: ir.Model, name: str) -> None:
    """The asked-for opset, and only operators that are in it: an exporter may stamp one version and emit another."""
    if dict(model.opset_imports) != {"": OPSET}:
        raise EngineError(
            f"{name}: asked the exporter for opset {OPSET}, got {dict(model.opset_imports)}; "
            f"install the versions in constraints.txt"
        )
    if model.functions:
        raise EngineError(f"{name}: the exporter left {len(model.functions)} functions in the graph; expected none")
    for node in model.graph.all_nodes():
        standard = node.domain == "" and onnx.defs.has(node.op_type) and _since(node.op_type) is not None
        if not standard:
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise EngineError(f"{name}: the graph has {operator}, which is not an operator of opset {OPSET}")


def _since(op_type: str) -> int | None:
    try:
        return int(onnx.defs.get_schema(op_type, OPSET, "").since_version)
    except onnx.defs.SchemaError:
        return None


def _check_contract(model: ir.Model, graph: TraceableGraph) -> None:
    """Names and fixed sizes as in the contract; its words for the sizes that are open ("past+new")."""
    for found, expected in ((model.graph.inputs, graph.info.inputs), (model.graph.outputs, graph.info.outputs)):
        names = [value.name for value in found]
        if names != [tensor.name for tensor in expected]:
            raise EngineError(f"{graph.name}: expected tensors {[t.name for t in expected]}, got {names}")
        for value, tensor in zip(found, expected, strict=True):
            sizes = [size if isinstance(size, int) else None for size in value.shape]
            wanted = [size if isinstance(size, int) else None for size in tensor.shape]
            if sizes != wanted or _DTYPES.get(value.dtype) != tensor.dtype:
                raise EngineError(f"{graph.name}: {value.name} became {value.dtype}{value.shape}, expected {tensor}")
            value.shape = ir.Shape(tensor.shape)


def _tensor_info(value: ir.Value) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorInfo(str(value.name), _DTYPES[value.dtype], shape)  # type: ignore[arg-type]


# --- tidying --------------------------------------------------------------------------------------------------------


def _name_values(model: ir.Model) -> None:
    """Nodes after the module they come from, weights after their parameter: for profiles, and to quantize by name.

    A weight that the exporter transposed once and for all has lost its name; it gets its module's, with `.T`. What
    flows between nodes is named after the node it comes from: the exporter's own names may repeat an output's.
    """
    graph = model.graph
    taken: Counter[str] = Counter()
    outputs = set(graph.outputs)
    for node in graph:
        module = _module(node)
        stem = f"{module}/{node.op_type}" if module else node.op_type
        taken[stem] += 1
        node.name = stem if taken[stem] == 1 else f"{stem}.{taken[stem]}"
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = node.name if index == 0 else f"{node.name}:{index}"
    for value in list(graph.initializers.values()):
        old = str(value.name)
        new = _without_core(old)
        if not old.startswith(_NAMED) and len(value.const_value.shape) == 2:
            modules = [_module(use.node) for use in value.uses() if use.node.op_type in ("MatMul", "Gemm")]
            new = f"{modules[0]}.weight.T" if modules and modules[0] else old
        _rename(graph, value, new)


def _module(node: ir.Node) -> str:
    """The module that a node was traced in, e.g. "text.self_blocks.0.qkv"; "" for the model as a whole."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope.startswith(_NAMED)]
    return _without_core(str(modules[-1])) if modules else ""


def _without_core(name: str) -> str:
    return next((name.removeprefix(core) for core in _CORES if name.startswith(core)), name)


def _one_layout_per_matrix(model: ir.Model) -> None:
    """Store every Linear's matrix as [in, out], as a MatMul wants it.

    The exporter keeps [out, in] where the input has two dimensions, so a matrix used on both sides of that line would
    be stored twice (the paper's image projection is one). The vocabulary projection stays [V, W]: that is the token
    embedding's layout, and the two may be one matrix.
    """
    for node in model.graph:
        matrix = node.inputs[1] if node.op_type == "Gemm" else None
        if matrix is None or matrix.const_value is None or not str(matrix.name).endswith(".weight"):
            continue
        if (
            node.attributes.get_int("transB", 0) != 1
            or "embedding" in str(matrix.name)
            or len(list(matrix.uses())) != 1
        ):
            continue
        array = matrix.const_value.numpy().T.copy()
        name = f"{matrix.name}.T"
        _rename(model.graph, matrix, name)
        matrix.const_value = ir.Tensor(array, name=name)
        matrix.shape = ir.Shape(array.shape)
        node.attributes.add(ir.AttrInt64("transB", 0))


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[str(value.name)]
    value.name = name
    graph.initializers[name] = value


def _strip(model: ir.Model, name: str) -> None:
    """Nothing of the exporting machine, and nothing that differs from run to run."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = PRODUCER, None
    model.domain, model.model_version, model.doc_string = None, None, None
    model.graph.name, model.graph.doc_string = name, None
    for part in (model, model.graph, *model.graph.all_nodes()):
        part.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
