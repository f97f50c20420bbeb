"""The graphs of a bundle as PyTorch modules: flat tensors in, flat tensors out, in the order of the contract.

Names and shapes are the runtime's (`mammut_runtime.manifest.graph_contract`); the computing is the core's. What stands
here is only the bridge: which graph a task needs, and how a list of tensors becomes the core's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mammut.checkpoint import Checkpoint
from mammut.detection.detector import Detector
from mammut.model import Mammut
from mammut.transformer import KeysValues
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import GraphInfo

Task = Literal["caption", "ask", "match", "search", "watch", "detect"]
TASKS: tuple[Task, ...] = get_args(Task)
GRAPHS_OF_TASK: dict[Task, tuple[str, ...]] = {
    "caption": ("vision", "memory", "decoder"),
    "ask": ("vision", "memory", "decoder"),
    "match": ("vision", "text"),
    "search": ("vision", "text"),
    "watch": ("vision", "video"),
    "detect": ("vision", "detector", "text"),
}
"""watch: whatever the other tasks do with pictures, also with clips, and seeing how things move. detect: `vision` is
for things that are shown in a picture instead of named."""
GRAPHS = ("vision", "video", "detector", "text", "memory", "decoder")
"""In the order in which they are made and listed."""
PICTURE_GRAPHS = ("vision", "text", "memory", "decoder")
"""Those that can be made of every checkpoint."""

_CAPABLE: dict[Task, tuple[Callable[[Checkpoint], bool], str]] = {
    "watch": (
        lambda checkpoint: checkpoint.model.config.video is not None,
        "the checkpoint has no tubes; train it on clips first",
    ),
    "detect": (
        lambda checkpoint: checkpoint.detector is not None,
        "the checkpoint has no detector; train one first (mammut-train detect)",
    ),
}
"""Task that not every checkpoint can do -> whether this one can, and what to say where it cannot."""

TRACED_SIZES = {"batch": 2, "beams": 3, "past": 5, "new": 4, "length": 6, "seen": 7, "classes": 8}
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


def tasks_for(checkpoint: Checkpoint, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks that were asked for; None: all that the checkpoint can do.

    Raises InputError for a task that it cannot do.
    """
    able = {task: task not in _CAPABLE or _CAPABLE[task][0](checkpoint) for task in TASKS}
    if asked is None:
        return tuple(task for task in TASKS if able[task])
    for task in TASKS:
        if task in asked and not able[task]:
            raise InputError(f"tasks: {task!r} cannot be exported: {_CAPABLE[task][1]}, or leave {task!r} out")
    return tuple(asked)


class VisionGraph(nn.Module):
    """pixels float32[B, 3, S, S] -> tokens float32[B, N, Wv], embedding float32[B, E], norm float32[B]."""

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tokens, raw = self.model.encode_image(pixels, normalize=False)
        return tokens, *unit_and_norm(raw)


class VideoGraph(nn.Module):
    """frames float32[B, F, 3, S, S] -> tokens float32[B, Nv, Wv], embedding float32[B, E], norm float32[B].

    The picture encoder's own weights, the tubes' matrices, and the positions of all tokens as one constant.
    """

    positions: Tensor

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            self.register_buffer("positions", model.video_positions())

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        tokens, raw = self.model.encode_video(frames, normalize=False, positions=self.positions)
        return tokens, *unit_and_norm(raw)


class TextGraph(nn.Module):
    """ids int64[B, L] -> embedding float32[B, E], norm float32[B]."""

    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return unit_and_norm(self.model.encode_text(ids, normalize=False))


class MemoryGraph(nn.Module):
    """tokens float32[B, N, Wv] -> cross_k.J, cross_v.J float32[B, H, N, d] of each cross block, k before v.

    N: of a picture; in a bundle with a video graph, also of a clip.
    """

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


class DetectorGraph(nn.Module):
    """pixels float32[B, 3, D, D], classes float32[C, E], novel float32[C] -> boxes float32[B, P, 4], scores float32[B,
    P, C]: see mammut.detection.detector.Detector."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pixels: Tensor, *names: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.detector(pixels, *names)
        return boxes, scores


_MODULES: dict[str, Callable[[Mammut], nn.Module]] = {
    "vision": VisionGraph,
    "video": VideoGraph,
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


def traceable(name: str, checkpoint: Checkpoint, info: GraphInfo) -> TraceableGraph:
    """The graph `name` (of GRAPHS) of a model in eval mode; info: its entry in the contract.

    Raises InputError for a detector that the checkpoint does not have.
    """
    model = checkpoint.model
    if name != "detector":
        module = _MODULES[name](model)
    elif checkpoint.detector is not None:
        module = DetectorGraph(checkpoint.detector)
    else:
        raise InputError(_CAPABLE["detect"][1])
    return TraceableGraph(name, module.eval(), info, model.config.text.context_length)


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
