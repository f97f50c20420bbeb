"""Which quantized layers hurt a graph's outputs most: what to keep in floating point next when the gate fails.

The effect of a layer is measured alone, exactly, and without making a graph for it. Given real inputs, the reference
says what flows into every layer; there each layer of the candidate is run by itself, and what it makes is compared
with the reference: the local error. Then the reference runs again with that one difference added behind the layer.
What changes at the outputs is what a graph would do in which only this layer is quantized: the output error.

One session with a place for a difference behind every layer serves all of them, so the cost is one run of the
reference for each layer and recorded input, and a limit of time is kept: layers with a large local error come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mammut_calibration.feeds import Feeds
from mammut_calibration.observe import ObservedEngine, open_session
from mammut_export.quantize_nodes import float_layers, names_of
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import Scheme

QUANTIZED_SCHEMES = ("int8", "int8-dynamic", "int4")
DEFAULT_BUDGET_S = 120.0
_LAYERS_AT_ONCE = 16
"""Observed together: bounds the memory that their inputs and outputs take."""
_NO_DIFFERENCE = np.zeros((), np.float32)
Array = NDArray[Any]


@dataclass(frozen=True)
class LayerSensitivity:
    """What one quantized layer does to the outputs of its graph, all others being float32."""

    graph: str
    layer: str
    """The node's name."""
    local_error: float
    """Length of the difference over length of the layer's own output in the reference, over all inputs."""
    output_error: float | None
    """The same of the graph's outputs, the worst of them; of logits, after their mean is taken out (it changes no
    probability). None: there was no time left to measure it."""
    bytes: int
    """How much larger the graph's weights become if the layer is kept in float32. A table that two layers share counts
    at both."""


@dataclass(frozen=True)
class _Layer:
    """A layer by the names that reference and candidate share."""

    name: str
    given: str
    output: str
    bytes: int


def rank_layers(
    reference: Bundle,
    candidate: Path | Bundle,
    schemes: Mapping[str, Scheme],
    feeds: Mapping[str, Sequence[Feeds]],
    *,
    budget_s: float = DEFAULT_BUDGET_S,
    threads: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[LayerSensitivity, ...]:
    """Every layer that is quantized in the candidate, the one to keep in floating point first first.

    candidate: a folder that write_quantized filled, or a bundle. schemes: graph -> scheme; graphs in fp32 and fp16 are
    left out. feeds: graph -> real inputs of it (mammut_calibration.feeds.record_feeds). budget_s: time for the output
    errors of all graphs, shared by their numbers of layers; layers it does not reach come last, by local error.
    Raises InputError when there are no inputs for a graph.
    """
    folder = candidate.path if isinstance(candidate, Bundle) else candidate
    graphs = [name for name in reference.manifest.graphs if schemes.get(name) in QUANTIZED_SCHEMES]
    found: list[LayerSensitivity] = []
    started = time.monotonic()
    for index, graph in enumerate(graphs):
        if not feeds.get(graph):
            raise InputError(f"no recorded inputs for the graph {graph!r}; record_feeds gives them from a few pictures")
        progress(f"sensitivity of {graph}")
        left = budget_s - (time.monotonic() - started)
        path = folder / reference.manifest.graphs[graph].file
        found += _rank(graph, reference.graph_path(graph), path, feeds[graph], left / (len(graphs) - index), threads)
    return tuple(sorted(found, key=_worst_first))


def _worst_first(found: LayerSensitivity) -> tuple[bool, float]:
    measured = found.output_error is not None
    return not measured, -(found.output_error if found.output_error is not None else found.local_error)


def _rank(
    graph: str, reference: Path, candidate: Path, feeds: Sequence[Feeds], budget_s: float, threads: int
) -> list[LayerSensitivity]:
    deadline = time.monotonic() + budget_s
    layers = _quantized_layers(ir.load(reference), ir.load(candidate))
    if not layers:
        return []
    local = _Ratios(len(layers))
    differences: list[dict[str, Array]] = [{} for _ in feeds]
    for start in range(0, len(layers), _LAYERS_AT_ONCE):
        part = layers[start : start + _LAYERS_AT_ONCE]
        for index, (before, after) in enumerate(_both_outputs(reference, candidate, part, feeds, threads)):
            for offset, layer in enumerate(part):
                difference = after[layer.output].astype(np.float32) - before[layer.output]
                local.add(start + offset, difference, before[layer.output])
                differences[index][layer.output] = difference
    errors = local.values()
    order = sorted(range(len(layers)), key=lambda index: -errors[index])
    probe = _Probe(reference, layers, threads)
    unchanged = [probe.run(feed, {}) for feed in feeds]
    measured: dict[int, float] = {}
    for index in order:
        if time.monotonic() > deadline:
            break
        name = layers[index].output
        changed = (probe.run(feed, {name: each[name]}) for feed, each in zip(feeds, differences, strict=True))
        measured[index] = output_error(unchanged, changed)
    return [
        LayerSensitivity(graph, layer.name, float(errors[index]), measured.get(index), layer.bytes)
        for index, layer in enumerate(layers)
    ]


def output_error(reference: Sequence[Mapping[str, Array]], candidate: Iterator[Mapping[str, Array]]) -> float:
    """Relative error of a graph's outputs over several runs, of the worst kind of output.

    Kinds are the names before the dot, so that the keys of all layers count as one. The caches that a decoder hands on
    do not count beside logits, nor an embedding's norm beside the embedding. 0 is equal.
    """
    kinds = sorted({name.partition(".")[0] for name in reference[0]})
    kinds = [kind for kind in kinds if not kind.startswith("present_") and kind != "norm"] or kinds
    ratios = _Ratios(len(kinds))
    for before, after in zip(reference, candidate, strict=True):
        for name, value in before.items():
            if (kind := name.partition(".")[0]) in kinds:
                a, b = _compared(kind, value), _compared(kind, after[name])
                ratios.add(kinds.index(kind), b - a, a)
    return float(ratios.values().max())


def _compared(kind: str, value: Array) -> Array:
    exact = value.astype(np.float64)
    return exact - exact.mean(axis=-1, keepdims=True) if kind == "logits" else exact


class _Ratios:
    """Length of differences over length of values, summed over many arrays. Infinite where something is not finite."""

    def __init__(self, count: int) -> None:
        self._sums = np.zeros((count, 2))

    def add(self, index: int, difference: Array, value: Array) -> None:
        for column, each in enumerate((difference, value)):
            self._sums[index, column] += float(np.square(each, dtype=np.float64).sum())

    def values(self) -> NDArray[np.float64]:
        difference, value = self._sums.T
        ratios: NDArray[np.float64] = np.sqrt(difference / np.maximum(value, 1e-30))
        return np.where(np.isfinite(ratios), ratios, np.inf)


# --- the layers, alone ----------------------------------------------------------------------------------------------


def _quantized_layers(reference: ir.Model, candidate: ir.Model) -> list[_Layer]:
    """Layers whose float weight the candidate does not have behind that name any more."""
    same = {(node.name, value.name) for node in candidate.graph for value in node.inputs if value is not None}
    made = {value.name for node in candidate.graph for value in node.outputs}
    found = []
    nodes = float_layers(reference)
    for name, node in zip(names_of(nodes), nodes, strict=True):
        first, second = node.inputs[:2]
        weight, given = (first, second) if node.op_type == "Gather" else (second, first)
        if (node.name, weight.name) in same or weight.const_value is None:
            continue
        output = str(node.outputs[0].name)
        if output not in made:
            raise InputError(f"layer {name!r}: its output {output!r} is not in the candidate; quantize with this tool")
        extra = weight.const_value.nbytes - _weight_bytes(candidate, output, str(given.name))
        found.append(_Layer(name, str(given.name), output, extra))
    return found


def _weight_bytes(model: ir.Model, output: str, given: str) -> int:
    """Of the constants between a layer's input and its output, without its bias."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    waiting, seen, total = [values[output]], set(), 0
    while waiting:
        value = waiting.pop()
        if value in seen or value.name == given:
            continue
        seen.add(value)
        if value.const_value is not None and value.producer() is None:
            total += value.const_value.nbytes
        if (node := value.producer()) is not None:
            waiting += [each for each in node.inputs if each is not None]
    return total


def _both_outputs(
    reference: Path, candidate: Path, layers: Sequence[_Layer], feeds: Sequence[Feeds], threads: int
) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """For each input: what the layers of the reference make, and the candidate's of the same inputs."""
    seen: dict[str, Array] = {}
    names = dict.fromkeys(name for layer in layers for name in (layer.given, layer.output))
    engine = ObservedEngine(reference, tuple(names), seen.__setitem__, threads=threads)
    alone = open_session(_alone(candidate, layers), candidate.parent, str(candidate), threads)
    outputs = [layer.output for layer in layers]
    for feed in feeds:
        seen.clear()
        engine.run(feed)
        given = {f"given/{layer.given}": seen[layer.given] for layer in layers}
        after = dict(zip(outputs, alone.run(outputs, given), strict=True))
        yield {name: seen[name] for name in outputs}, after
    engine.close()


def _alone(path: Path, layers: Sequence[_Layer]) -> Any:
    """The candidate's layers side by side as an onnx.ModelProto, each with an input "given/NAME" of its own."""
    model = ir.load(path)
    graph = model.graph
    values = {str(value.name): value for value in graph.inputs}
    values |= {str(value.name): value for node in graph for value in node.outputs}
    outputs = [values[layer.output] for layer in layers]
    given = []
    for name in dict.fromkeys(layer.given for layer in layers):
        value = ir.Value(name=f"given/{name}", type=values[name].type or ir.TensorType(ir.DataType.FLOAT))
        ir.convenience.replace_all_uses_with(values[name], value, replace_graph_outputs=False)
        given.append(value)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    needed: set[ir.Node] = set()
    waiting = [output.producer() for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    graph.remove([node for node in reversed(list(graph)) if node not in needed], safe=False)
    graph.inputs.clear()
    graph.inputs.extend(given)
    used = {value for node in graph for value in node.inputs}
    for name, value in list(graph.initializers.items()):
        if value not in used:
            del graph.initializers[name]
    return ir.serde.serialize_model(model)


class _Probe:
    """The reference with a place behind every layer where a difference can be added."""

    def __init__(self, path: Path, layers: Sequence[_Layer], threads: int) -> None:
        model = ir.load(path)
        graph = model.graph
        producers = {str(value.name): (node, value) for node in graph for value in node.outputs}
        self._outputs = [str(value.name) for value in graph.outputs]
        self._places = {layer.output: f"difference/{layer.output}" for layer in layers}
        renamed = {}
        for name, place in self._places.items():
            node, value = producers[name]
            difference = ir.Value(name=place, type=ir.TensorType(ir.DataType.FLOAT))
            graph.inputs.append(difference)
            total = ir.Node("", "Add", [value, difference], name=f"{place}/Add")
            total.outputs[0].name = f"{place}/sum"
            total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.insert_after(node, total)
            if value.is_graph_output():
                renamed[name] = f"{place}/sum"
            ir.convenience.replace_all_uses_with(value, total.outputs[0], replace_graph_outputs=True)
            total.replace_input_with(0, value)
        self._seen = [renamed.get(name, name) for name in self._outputs]
        self._session = open_session(ir.serde.serialize_model(model), path.parent, str(path), threads)

    def run(self, feeds: Feeds, differences: Mapping[str, Array]) -> dict[str, Array]:
        """The graph's outputs when differences are added to some layers' outputs (by name), and nothing to the rest."""
        added = {place: differences.get(name, _NO_DIFFERENCE) for name, place in self._places.items()}
        return dict(zip(self._outputs, self._session.run(self._seen, {**feeds, **added}), strict=True))
