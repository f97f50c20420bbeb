"""The graphs of a bundle as PyTorch modules: flat tensors in, flat tensors out, in the order of the contract.

Names and shapes are the runtime's (`mammut_runtime.manifest.graph_contract`); the computing is the core's. What stands
here is only the bridge: which graph a task needs, and how a list of tensors becomes the core's arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mammut.model import Mammut
from mammut.transformer import KeysValues
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import GraphInfo

Task = Literal["caption", "ask", "match", "search"]
TASKS: tuple[Task, ...] = get_args(Task)
GRAPHS_OF_TASK: dict[Task, tuple[str, ...]] = {
    "caption": ("vision", "memory", "decoder"),
    "ask": ("vision", "memory", "decoder"),
    "match": ("vision", "text"),
    "search": ("vision", "text"),
}
GRAPHS = ("vision", "text", "memory", "decoder")
"""In the order in which they are made and listed."""

TRACED_SIZES = {"batch": 2, "beams": 3, "past": 5, "new": 4, "length": 6}
"""Sizes of the traced example. All different and none 0 or 1, so that no two of them can be taken for one another, and
the exporter cannot take one for a constant. Other sizes are checked after the export (parity.py)."""


def graphs_for(tasks: Sequence[str]) -> tuple[str, ...]:
    """Names of the graphs that tasks need. Raises InputError for an unknown task, or none."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        got = repr(unknown[0]) if unknown else "none"
        raise InputError(f"tasks: expected one or more of {', '.join(TASKS)}, got {got}")
    needed = {graph for task in TASKS if task in tasks for graph in GRAPHS_OF_TASK[task]}
    return tuple(graph for graph in GRAPHS if graph in needed)


class VisionGraph(nn.Module):
    """pixels float32[B, 3, S, S] -> tokens float32[B, N, Wv], embedding float32[B, E], norm float32[B]."""

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tokens, raw = self.model.encode_image(pixels, normalize=False)
        return tokens, *unit_and_norm(raw)


class TextGraph(nn.Module):
    """ids int64[B, L] -> embedding float32[B, E], norm float32[B]."""

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return unit_and_norm(self.model.encode_text(ids, normalize=False))


class MemoryGraph(nn.Module):
    """tokens float32[B, N, Wv] -> cross_k.J, cross_v.J float32[B, H, N, d] of each cross block, k before v."""

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return flatten_pairs(self.model.memory(tokens))


class DecoderGraph(nn.Module):
    """ids int64[B, K, T], past_k.I, past_v.I float32[B, K, H, P, d], cross_k.J, cross_v.J float32[B, H, N, d]
    -> logits float32[B, K, V] of the last position, present_k.I, present_v.I float32[B, K, H, P + T, d]."""

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        past = 2 * self.model.config.text.layers
        logits, present = self.model.decode_step(ids, pairs(caches[:past]), pairs(caches[past:]))
        return logits, *flatten_pairs(present)


_MODULES: dict[str, type[nn.Module]] = {
    "vision": VisionGraph,
    "text": TextGraph,
    "memory": MemoryGraph,
    "decoder": DecoderGraph,
}


@dataclass(frozen=True)
class TraceableGraph:
    """What an exporter needs to trace one graph."""

    name: str
    module: nn.Module
    """In eval mode. Takes the inputs of `info` as positional arguments, returns its outputs as a tuple."""
    info: GraphInfo
    """The contract: names, dtypes, shapes."""
    context_length: int
    """Positions of the text decoder; the example must fit."""

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of TRACED_SIZES, filled with zeros."""
        return tuple(
            torch.zeros(
                [size if isinstance(size, int) else self._traced_size(size) for size in tensor.shape],
                dtype=getattr(torch, tensor.dtype),
            )
            for tensor in self.info.inputs
        )

    def _traced_size(self, dimension: str) -> int:
        """Smaller than usual for a model with few positions, where the usual example would not fit."""
        usual = TRACED_SIZES[dimension]
        return min(usual, max(2, self.context_length // 2)) if dimension in ("past", "new", "length") else usual


def traceable(name: str, model: Mammut, info: GraphInfo) -> TraceableGraph:
    """The graph `name` (of GRAPHS) of a model in eval mode; info: its entry in the contract."""
    return TraceableGraph(name, _MODULES[name](model).eval(), info, model.config.text.context_length)


def unit_and_norm(raw: Tensor) -> tuple[Tensor, Tensor]:
    """float32[B, E] to unit vectors float32[B, E] (as F.normalize gives them) and the lengths before, float32[B]."""
    norm = torch.linalg.vector_norm(raw, dim=-1)
    return raw / norm.clamp_min(1e-12)[:, None], norm


def pairs(flat: Sequence[Tensor]) -> list[KeysValues]:
    """k.0, v.0, k.1, v.1, ... to [(k, v), ...]."""
    return list(zip(flat[0::2], flat[1::2], strict=True))


def flatten_pairs(nested: Sequence[KeysValues]) -> tuple[Tensor, ...]:
    """The inverse of `pairs`."""
    return tuple(tensor for pair in nested for tensor in pair)
