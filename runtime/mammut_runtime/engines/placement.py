"""Which provider of ONNX Runtime runs which nodes of a graph, and the refusal when that is not what was asked for.

ONNX Runtime gives nodes that a provider does not take to the processor, and says nothing. It also keeps on the
processor what only computes sizes (the length of the cache, a shape to reshape to), on purpose and at no cost: those
nodes do not count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mammut_runtime.errors import EngineError
from mammut_runtime.onnx_external import message_fields

CPU = "CPUExecutionProvider"
_SHOWN_KINDS, _SHOWN_NAMES = 6, 4
_GRAPH_OF_MODEL, _NODES_OF_GRAPH, _TENSORS_OF_GRAPH = 7, 1, 5
_INPUTS_OF_NODE, _OUTPUTS_OF_NODE, _NAME_OF_NODE, _TYPE_OF_NODE = 1, 2, 3, 4
_NAME_OF_TENSOR = 8
"""Field numbers of onnx.proto3."""


def records_placement(ort: Any) -> bool:
    """Whether this version of ONNX Runtime can tell; 1.20 cannot, 1.32 can."""
    return hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")


def check_placement(path: Path, session: Any, wanted: Sequence[str]) -> None:
    """Raises EngineError that says which nodes went where, if some are on a provider that is not in `wanted`.

    session: an InferenceSession with session.record_ep_graph_assignment_info.
    """
    placed: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for part in session.get_provider_graph_assignment_info():
        placed[part.ep_name] += [(node.name, node.op_type) for node in part.get_nodes()]
    sizes = size_nodes(path.read_bytes(), path.name) if CPU in placed else frozenset()
    placed[CPU] = [(name, kind) for name, kind in placed[CPU] if name not in sizes]
    elsewhere = {provider: nodes for provider, nodes in placed.items() if nodes and provider not in wanted}
    if not elsewhere:
        return
    names = [name for nodes in elsewhere.values() for name, _ in nodes]
    shown = "; ".join(f"{provider} {_counted(placed[provider])}" for provider in [*wanted, *elsewhere])
    raise EngineError(
        f"{path}: {' and '.join(wanted)} cannot run the whole graph. Nodes: {shown}. Not taken: "
        f"{', '.join(names[:_SHOWN_NAMES])}{' ...' if len(names) > _SHOWN_NAMES else ''}. Name a provider that takes "
        f"them, or let the processor have them with allow_fallback (--allow-fallback)"
    )


def size_nodes(model: bytes, where: str) -> frozenset[str]:
    """Names of the nodes of an ONNX file that compute with nothing but sizes of tensors and constants."""
    nodes, constants = _graph(model, where)
    sizes: set[str] = set()
    found = set()
    for name, kind, inputs, outputs in nodes:  # in the order of computing, as ONNX demands
        if kind == "Constant":
            constants |= outputs
        elif kind in ("Shape", "Size") or (inputs & sizes and inputs <= sizes | constants):
            sizes |= outputs
            found |= {name} - {""}  # what has no name cannot be told from others, so it is not excused
    return frozenset(found)


def _graph(model: bytes, where: str) -> tuple[list[tuple[str, str, set[str], set[str]]], set[str]]:
    """(name, operator, inputs, outputs) of every node, and the names of the weights."""
    nodes = []
    weights = set()
    graphs = [content for number, content in message_fields(memoryview(model), where) if number == _GRAPH_OF_MODEL]
    for number, content in (field for graph in graphs for field in message_fields(graph, where)):
        if number == _TENSORS_OF_GRAPH:
            weights |= _texts(content, where)[_NAME_OF_TENSOR]
        elif number == _NODES_OF_GRAPH:
            texts = _texts(content, where)
            name, kind = "".join(texts[_NAME_OF_NODE]), "".join(texts[_TYPE_OF_NODE])
            nodes.append((name, kind, texts[_INPUTS_OF_NODE] - {""}, texts[_OUTPUTS_OF_NODE]))
    return nodes, weights


def _texts(message: memoryview, where: str) -> dict[int, set[str]]:
    """The fields that hold names, by number."""
    wanted = (_INPUTS_OF_NODE, _OUTPUTS_OF_NODE, _NAME_OF_NODE, _TYPE_OF_NODE, _NAME_OF_TENSOR)
    found: dict[int, set[str]] = {number: set() for number in wanted}
    for number, content in message_fields(message, where):
        if number in found:
            found[number].add(str(content, "utf-8", "replace"))
    return found


def _counted(nodes: list[tuple[str, str]]) -> str:
    """12 (5 MatMul, 4 Add, 3 others)."""
    kinds = Counter(kind for _, kind in nodes).most_common()
    parts = [f"{count} {kind}" for kind, count in kinds[:_SHOWN_KINDS]]
    if len(kinds) > _SHOWN_KINDS:
        parts.append(f"{sum(count for _, count in kinds[_SHOWN_KINDS:])} others")
    return f"{len(nodes)} ({', '.join(parts)})" if parts else "0"
