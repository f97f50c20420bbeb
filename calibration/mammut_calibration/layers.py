"""Which layers of a quantized bundle are wrong, and by how much: each layer alone, with the reference's inputs.

Errors of a quantized graph add up from layer to layer, so a bad layer makes all later ones look bad. Here every layer
of the candidate is cut out of its graph, given what the reference's layer was given on real data, and compared with
what the reference's layer made of it. What is left is the layer's own error.

Layers are found by the names of their input and output tensors, which quantizers keep. Whatever stands between the
two in the candidate (quantize and dequantize nodes, integer products, blocked weights) is part of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.activations import Layer, library, read_graph
from mammut_calibration.activations import layers as layers_of
from mammut_calibration.data import Dataset
from mammut_calibration.feeds import Feeds, record_feeds
from mammut_calibration.observe import ObservedEngine, open_session
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict

DEFAULT_PICTURES = 4
_LAYERS_AT_ONCE = 16
"""Cut out together: bounds the memory that their weights take."""


@dataclass(frozen=True)
class LayerError:
    """How far one layer of the candidate is from the reference's."""

    graph: str
    layer: str
    """The node's name in the reference."""
    output: str
    """The tensor that was compared, by its name in the reference."""
    relative_error: float
    """Length of the difference over length of the reference's output, over all data. 0 is equal; a scale that is four
    times too large gives 3."""
    cosine: float
    """Of the two outputs, all data taken as one vector."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


def layer_errors(
    reference: Bundle | Path,
    candidate: Bundle | Path,
    data: Dataset,
    *,
    pictures: int = DEFAULT_PICTURES,
    graphs: Sequence[str] | None = None,
    feeds: dict[str, list[Feeds]] | None = None,
    threads: int = 0,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[LayerError, ...]:
    """The error of every layer, worst first.

    pictures: of the data, to look at. graphs: only these; None takes all that both bundles have. feeds: what
    `record_feeds` gave before, in place of the data. note: is told of layers that the candidate does not have.
    """
    before = reference if isinstance(reference, Bundle) else Bundle.open(reference)
    after = candidate if isinstance(candidate, Bundle) else Bundle.open(candidate)
    names = [name for name in before.manifest.graphs if name in after.manifest.graphs]
    if graphs is not None:
        if unknown := [name for name in graphs if name not in names]:
            raise InputError(f"no graph {unknown[0]!r} in both bundles, only {', '.join(names)}")
        names = list(graphs)
    recorded = record_feeds(before, data, pictures, threads=threads) if feeds is None else feeds
    found = [
        error
        for name in names
        for error in graph_errors(
            name, before.graph_path(name), after.graph_path(name), recorded.get(name, []), threads=threads, note=note
        )
    ]
    return tuple(sorted(found, key=lambda error: -error.relative_error))


def graph_errors(
    graph: str,
    reference: Path,
    candidate: Path,
    feeds: Sequence[Feeds],
    *,
    threads: int = 0,
    note: Callable[[str], None] = lambda line: None,
) -> list[LayerError]:
    """The error of every layer of one graph, in the order of the graph. Files beside the graphs hold their weights."""
    model = read_graph(candidate)
    pieces = []
    for layer in layers_of(read_graph(reference)):
        piece = _cut_out(model, layer)
        if piece is None:
            note(
                f"{graph}: {layer.name}: not found in the candidate by its tensors {layer.inputs} and {layer.output!r}"
            )
        else:
            pieces.append(piece)
    return [
        error
        for start in range(0, len(pieces), _LAYERS_AT_ONCE)
        for error in _compare(
            graph, reference, candidate, model, pieces[start : start + _LAYERS_AT_ONCE], feeds, threads
        )
    ]


@dataclass(frozen=True)
class _Piece:
    """A layer as the candidate has it."""

    layer: Layer
    nodes: tuple[Any, ...]
    """onnx.NodeProto, in the order of the graph."""
    output: str
    """What the candidate's other nodes see of the layer's output, by its name in the candidate."""


def _cut_out(model: Any, layer: Layer) -> _Piece | None:
    """The nodes between a layer's inputs and output; None where they are not to be found or need something else."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constant = {each.name for each in model.graph.initializer}
    output = _as_seen(model, layer.output)
    needed: dict[int, Any] = {}
    waiting = [output]
    while waiting:
        name = waiting.pop()
        if not name or name in constant or (name in layer.inputs and name != output):
            continue
        if name not in producers:
            return None  # an input of the graph, or a name that the candidate does not have
        node = producers[name]
        if id(node) not in needed:
            needed[id(node)] = node
            waiting.extend(node.input)
    used = {name for node in needed.values() for name in node.input}
    if not all(name in used for name in layer.inputs):
        return None
    return _Piece(layer, tuple(node for node in model.graph.node if id(node) in needed), output)


def _as_seen(model: Any, tensor: str) -> str:
    """The tensor after it was quantized and dequantized, if that is all that is done with it."""
    readers = [node for node in model.graph.node if tensor in node.input]
    shown = {each.name for each in model.graph.output}
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or tensor in shown:
        return tensor
    rounded = readers[0].output[0]
    restored = [node for node in model.graph.node if rounded in node.input and node.op_type == "DequantizeLinear"]
    return str(restored[0].output[0]) if restored else tensor


def _compare(
    graph: str,
    reference: Path,
    candidate: Path,
    model: Any,
    pieces: Sequence[_Piece],
    feeds: Sequence[Feeds],
    threads: int,
) -> Iterator[LayerError]:
    seen: dict[str, NDArray[Any]] = {}
    wanted = dict.fromkeys(name for piece in pieces for name in (*piece.layer.inputs, piece.layer.output))
    engine = ObservedEngine(reference, tuple(wanted), seen.__setitem__, threads=threads)
    session: Any = None
    sums = np.zeros((len(pieces), 4))
    for feed in feeds:
        seen.clear()
        engine.run(feed)
        given = {f"given/{name}": seen[name] for piece in pieces for name in piece.layer.inputs}
        if session is None:
            isolated = _isolated(model, pieces, {name: value.dtype for name, value in given.items()})
            session = open_session(isolated, candidate.parent, str(candidate), threads)
        outputs = session.run([f"{index}/{piece.output}" for index, piece in enumerate(pieces)], given)
        for index, (piece, value) in enumerate(zip(pieces, outputs, strict=True)):
            a, b = seen[piece.layer.output].astype(np.float64), value.astype(np.float64)
            sums[index] += ((b - a) ** 2).sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()
    engine.close()
    for piece, (difference, of_a, of_b, product) in zip(pieces, sums, strict=True):
        if not np.isfinite(difference):
            difference, product = np.inf, 0.0
        yield LayerError(
            graph,
            piece.layer.name,
            piece.layer.output,
            float(np.sqrt(difference / max(of_a, 1e-30))) if difference else 0.0,
            float(product / max(np.sqrt(of_a) * np.sqrt(of_b), 1e-30)) if of_a or of_b else 1.0,
        )


def _isolated(model: Any, pieces: Sequence[_Piece], dtypes: dict[str, Any]) -> Any:
    """A graph of the pieces side by side, each with its own names "INDEX/NAME" and the inputs "given/NAME"."""
    onnx = library()
    result = onnx.ModelProto(ir_version=model.ir_version)
    result.opset_import.extend(model.opset_import)
    result.graph.name = "layers"
    constant = {each.name: each for each in model.graph.initializer}
    used: set[str] = set()
    for index, piece in enumerate(pieces):
        for node in piece.nodes:
            own = result.graph.node.add()
            own.CopyFrom(node)
            own.name = f"{index}/{node.name}"
            own.input[:] = [_renamed(name, index, piece.layer, constant) for name in node.input]
            own.output[:] = [f"{index}/{name}" if name else "" for name in node.output]
            used.update(node.input)
        result.graph.output.append(onnx.ValueInfoProto(name=f"{index}/{piece.output}"))
    result.graph.initializer.extend(each for name, each in constant.items() if name in used)
    for name, dtype in dtypes.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        result.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return result


def _renamed(name: str, index: int, layer: Layer, constant: dict[str, Any]) -> str:
    if not name or name in constant:
        return name
    return f"given/{name}" if name in layer.inputs else f"{index}/{name}"
