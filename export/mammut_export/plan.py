"""What an export will give, from the configuration alone: parameters, bytes, memory, operations. Nothing is traced.

`mammut-export --dry-run` prints it; the export itself takes its sizes for the report from here. Works for a model on
PyTorch's meta device, so also for one that does not fit into memory.

Symbols: N image tokens, L tokens, C tokens looked at, W width, M MLP width. A multiply-add counts as two operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mammut.config import MammutConfig, TextConfig
from mammut.detection.config import DetectorConfig
from mammut.detection.detector import Detector
from mammut.model import Mammut
from mammut_export.precisions import precision_name
from mammut_runtime.manifest import Scheme

BYTES: dict[Scheme, float] = {"fp32": 4, "fp16": 2, "int8": 1, "int8-dynamic": 1, "int4": 0.5 + 4 / 64}
"""Precision → stored bytes of a matrix element (int4: with the scale that 64 of them share). Vectors (biases, norms,
scales of channels) stay float32; they are below 1 %."""
TABLE_BYTES: dict[Scheme, float] = {**BYTES, "int4": 1}
"""The same for the token embedding, whose rows are taken one by one."""
CACHE_BYTES = 4
"""Keys and values are float32 in every precision."""
CLIP_POSITIONS = "tubes.positions"
"""The positions of a clip's tokens: no parameter, but a constant of the video graph that is made of some."""
DETECTOR = "detector."
"""Before the names of the detector's own parameters."""
PROCESS_BYTES = 100_000_000
"""Python, the runtime's libraries, an engine and its buffers, without weights. Measured with ONNX Runtime 1.32 and two
threads: the demo takes 134 MB in all, openMaMMUT B-32 895 MB, where this estimate says 137 and 834."""


@dataclass(frozen=True)
class GraphPlan:
    """One graph."""

    name: str
    parameters: int
    """That the graph uses; some are used by several graphs."""
    weight_bytes: int
    """Of these parameters, as stored."""
    packed_bytes: int
    """What an engine keeps of them in memory: matrices in an order of its own, of fp16 in float32."""
    operations: int
    """Per run: one picture, one clip, one text of `Plan.text_tokens` tokens, or one new token after
    `Plan.past_tokens`."""
    per: str
    """What a run is, in words: "a picture"."""
    scheme: Scheme


@dataclass(frozen=True)
class Plan:
    """A bundle before it is made."""

    name: str
    precision: str
    image_size: int
    """Pixels."""
    max_tokens: int
    graphs: tuple[GraphPlan, ...]
    parameters: int
    """Of all graphs together, each once."""
    unique_weight_bytes: int
    """Of these, as stored: weights.bin, apart from gaps for alignment."""
    cross_bytes: int
    """The decoder's keys and values of one picture."""
    cache_bytes_per_token: int
    """What one more token adds to the cache of one sequence (one beam)."""
    clip_cross_bytes: int
    """The same of one clip; 0 without the video graph."""
    text_tokens: int
    past_tokens: int

    @property
    def cache_bytes(self) -> int:
        """Cache of one sequence of `max_tokens`."""
        return self.cache_bytes_per_token * self.max_tokens

    @property
    def separate_weight_bytes(self) -> int:
        """If every graph had its own file of weights."""
        return sum(graph.weight_bytes for graph in self.graphs)

    @property
    def resident_bytes(self) -> int:
        """Expected memory of a process with all graphs open: packed weights, one picture, one beam.

        Tables that rows are taken from are mapped from the file and count as far as rows were used, so not at all.
        """
        packed = sum(graph.packed_bytes for graph in self.graphs)
        return packed + self.cross_bytes + self.cache_bytes + PROCESS_BYTES

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Graph → its precision."""
        return {graph.name: graph.scheme for graph in self.graphs}

    def graph(self, name: str) -> GraphPlan:
        return next(graph for graph in self.graphs if graph.name == name)


def make_plan(
    config: MammutConfig, schemes: Mapping[str, Scheme], max_tokens: int, detection: DetectorConfig | None = None
) -> Plan:
    """The plan of a bundle. schemes: graph → its precision."""
    with torch.device("meta"):
        state = {name: value.shape for name, value in Mammut(config).state_dict().items()}
    if config.video is not None:
        state[CLIP_POSITIONS] = torch.Size([config.video_tokens, config.vision.width])
    detector_runs = 0
    if detection is not None and "detector" in schemes:
        shapes, detector_runs = _detector(config, detection)
        state |= shapes
    text = config.text
    past = min(max_tokens, text.context_length)
    used = {graph: {name: state[name] for name in state if uses(graph, name, config)} for graph in schemes}
    union = {name: shape for shapes in used.values() for name, shape in shapes.items()}
    stored = {
        (name, scheme): _stored_bytes({name: state[name]}, scheme)
        for graph, scheme in schemes.items()
        for name in used[graph]
    }
    runs: dict[str, Callable[[], tuple[int, str]]] = {
        "vision": lambda: (vision_operations(config), "a picture"),
        "video": lambda: (video_operations(config), f"a clip of {config.video.frames if config.video else 0} frames"),
        "detector": lambda: (detector_runs, f"a picture of {detection.image_size if detection else 0} pixels"),
        "text": lambda: (text_operations(text, text.context_length), f"a text of {text.context_length} tokens"),
        "memory": lambda: (memory_operations(config), "a picture"),
        "decoder": lambda: (step_operations(config, past), f"the next token after {past}"),
    }
    return Plan(
        name=config.name,
        precision=precision_name(schemes),
        image_size=config.vision.image_size,
        max_tokens=max_tokens,
        graphs=tuple(
            GraphPlan(
                graph,
                sum(shape.numel() for shape in shapes.values()),
                _stored_bytes(shapes, schemes[graph]),
                _packed_bytes(graph, shapes, text, schemes[graph]),
                *runs[graph](),
                schemes[graph],
            )
            for graph, shapes in used.items()
        ),
        parameters=sum(shape.numel() for shape in union.values()),
        unique_weight_bytes=sum(stored.values()),
        cross_bytes=_cross_bytes(text, config.vision.tokens),
        clip_cross_bytes=_cross_bytes(text, config.video_tokens) if "video" in schemes else 0,
        cache_bytes_per_token=2 * text.layers * text.width * CACHE_BYTES,
        text_tokens=text.context_length,
        past_tokens=past,
    )


def _cross_bytes(text: TextConfig, tokens: int) -> int:
    return 2 * len(text.cross_after) * tokens * text.width * CACHE_BYTES


def describe(plan: Plan) -> list[str]:
    """The plan as lines for a terminal."""
    lines = [
        f"{plan.name}: {_count(plan.parameters)} parameters, {plan.precision}, pictures of {plan.image_size} pixels",
        f"{'graph':<10}{'parameters':>12}{'weights':>12}{'operations':>14}",
    ]
    for graph in plan.graphs:
        lines.append(
            f"{graph.name:<10}{_count(graph.parameters):>12}{megabytes(graph.weight_bytes):>12}"
            f"{_count(graph.operations):>14} for {graph.per}"
        )
    shared = plan.separate_weight_bytes / max(plan.unique_weight_bytes, 1)
    lines += [
        f"weights.bin      {megabytes(plan.unique_weight_bytes)}, shared by all graphs (one each: {shared:.2f} x)",
        f"memory           about {megabytes(plan.resident_bytes)} with all graphs open",
    ]
    if any(graph.name == "decoder" for graph in plan.graphs):
        lines.append(
            f"decoder's cache  {megabytes(plan.cross_bytes)} per picture, "
            + (f"{megabytes(plan.clip_cross_bytes)} per clip, " if plan.clip_cross_bytes else "")
            + f"{megabytes(plan.cache_bytes)} per beam of "
            f"{plan.max_tokens} tokens"
        )
    return lines


def megabytes(size_bytes: int) -> str:
    """For people, e.g. "12.3 MB"."""
    return f"{size_bytes / 1e6:.{1 if size_bytes < 1e8 else 0}f} MB"


# --- parameters -----------------------------------------------------------------------------------------------------


def _detector(config: MammutConfig, detection: DetectorConfig) -> tuple[dict[str, torch.Size], int]:
    """Shapes of the detector's own weights and constants, and the operations of one picture with 20 names."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        detector = Detector(detection, Mammut(config))
        side = detection.image_size
        detector(torch.empty(1, 3, side, side), torch.empty(20, config.embed_dim), torch.empty(20))
    own = {**detector.own_state(), "positions": detector.positions}
    return {DETECTOR + name: value.shape for name, value in own.items()}, int(counter.get_total_flops())


def uses(graph: str, name: str, config: MammutConfig) -> bool:
    """Whether a graph computes with the core's parameter `name`."""
    shared_projection = config.vision.embedding == "memory_projection"
    if graph == "vision":
        return name.startswith(("vision.", "image_projection.")) or (
            shared_projection and name.startswith("memory_projection.")
        )
    if graph == "video":
        # Of the picture's positions the graph has only what was made of them.
        encodes = name.startswith(("vision.", "tubes.projections.")) and name != "vision.positions"
        return encodes or name == CLIP_POSITIONS or (uses("vision", name, config) and not name.startswith("vision."))
    if graph == "detector":
        encodes = name.startswith("vision.") and name != "vision.positions"
        projects = uses("vision", name, config) and not name.startswith("vision.")
        return name.startswith(DETECTOR) or encodes or projects
    if graph == "memory":
        return name.startswith("memory_projection.") or _makes_memory(name)
    if graph == "text":
        return name.startswith(("text.token_embedding.", "text.positions", "text.self_blocks.", "text.final_norm."))
    return name.startswith("text.") and not _makes_memory(name)


def _makes_memory(name: str) -> bool:
    return name.startswith("text.cross_blocks.") and (".key_value." in name or ".norm_memory." in name)


def _stored_bytes(shapes: dict[str, torch.Size], scheme: Scheme) -> int:
    sizes = (_element_bytes(name, shape, scheme) * shape.numel() for name, shape in shapes.items())
    return round(sum(sizes))


def _element_bytes(name: str, shape: torch.Size, scheme: Scheme) -> float:
    if len(shape) < 2:
        return 4
    return TABLE_BYTES[scheme] if name.startswith("text.token_embedding.") else BYTES[scheme]


def _packed_bytes(graph: str, shapes: dict[str, torch.Size], text: TextConfig, scheme: Scheme) -> int:
    """Matrices that are multiplied with. The embedding table is one only where it is the tied head."""
    multiplied_table = graph == "decoder" and text.tied_head
    element = 4 if scheme in ("fp32", "fp16") else BYTES[scheme]
    return round(
        sum(
            shape.numel() * element
            for name, shape in shapes.items()
            if len(shape) > 1 and (multiplied_table or not name.startswith("text.token_embedding."))
        )
    )


# --- operations -----------------------------------------------------------------------------------------------------


def vision_operations(config: MammutConfig) -> int:
    """One picture through the encoder and the projection of its embedding."""
    vision = config.vision
    patches = 2 * vision.grid**2 * 3 * vision.patch_size**2 * vision.width
    return patches + _encoder_operations(config, vision.tokens)


def video_operations(config: MammutConfig) -> int:
    """One clip through the tubes, the picture's encoder and the projection of its embedding; 0 without tubes."""
    vision, video = config.vision, config.video
    if video is None:
        return 0
    boxes = [
        # A token that is made of several boxes gives each of them its share of the channels: the same operations.
        math.prod(tube.counts(video.frames, vision.image_size)) * math.prod(tube.kernel)
        for tube in video.tubes
    ]
    return 2 * 3 * sum(boxes) * vision.width + _encoder_operations(config, config.video_tokens)


def _encoder_operations(config: MammutConfig, tokens: int) -> int:
    vision = config.vision
    block = _self_attention(tokens, tokens, vision.width) + _mlp(tokens, vision.width, vision.mlp_width)
    return vision.layers * block + 2 * vision.width * config.embed_dim


def text_operations(text: TextConfig, length: int) -> int:
    """One text of `length` tokens through the text tower."""
    return sum(
        _self_attention(length, length, text.width) + _own_mlp(text, index, length) for index in range(text.layers)
    )


def memory_operations(config: MammutConfig) -> int:
    """The decoder's keys and values of one picture."""
    text, tokens = config.text, config.vision.tokens
    keys_values = len(text.cross_after) * 2 * tokens * text.width * 2 * text.width
    return 2 * tokens * config.vision.width * text.width + keys_values


def step_operations(config: MammutConfig, past: int) -> int:
    """One new token after `past` cached ones, up to its logits."""
    text = config.text
    own = sum(_self_attention(1, past + 1, text.width) + _own_mlp(text, index, 1) for index in range(text.layers))
    cross = 2 * 2 * text.width**2 + 2 * 2 * config.vision.tokens * text.width + _mlp(1, text.width, text.mlp_width)
    return own + len(text.cross_after) * cross + 2 * text.width * text.vocab_size


def _self_attention(length: int, looked_at: int, width: int) -> int:
    """q, k, v and out, then scores and their use."""
    return 2 * length * 4 * width**2 + 2 * 2 * length * looked_at * width


def _own_mlp(text: TextConfig, index: int, length: int) -> int:
    has_mlp = text.mlp_in_crossed_blocks or index not in text.cross_after
    return _mlp(length, text.width, text.mlp_width) if has_mlp else 0


def _mlp(length: int, width: int, hidden: int) -> int:
    return 2 * 2 * length * width * hidden


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
