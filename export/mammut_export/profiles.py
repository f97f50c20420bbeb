"""Optimization profiles: the sizes that a TensorRT engine is built for, from a bundle's own numbers.

An engine built ahead of time takes shapes between a minimum and a maximum and is tuned for an optimum. A camera looks
at one picture at a time and adds one token at a time, so that is the optimum everywhere; the maxima leave room for
batches, beams and prompts. What a larger maximum costs is memory, whether it is used or not: `activation_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mammut_runtime.errors import InputError
from mammut_runtime.manifest import GraphInfo, InputProfile, Manifest

Limits = tuple[int, int, int]
"""Minimum, optimum, maximum of one size."""


@dataclass(frozen=True)
class ProfileLimits:
    """The largest sizes to build for. Raises InputError for less than 1 of anything."""

    pictures: int = 8
    """In one call of `vision`, `memory` and `decoder`: the runtime's own batch size."""
    texts: int = 8
    """In one call of `text`: the runtime's own batch size."""
    beams: int = 8
    """Sequences that share a picture. Beam search uses 3 unless told otherwise; answers to be scored count as beams."""
    clips: int = 1
    """In one call of `video`: the runtime looks at one clip at a time."""
    names: int = 1203
    """In a vocabulary for `detector`. 1,203 are LVIS's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")


def profiles_for(manifest: Manifest, limits: ProfileLimits | None = None) -> dict[str, dict[str, InputProfile]]:
    """Manifest.profiles: graph -> input -> the sizes to build for. Inputs without free sizes are left out."""
    limits = limits or ProfileLimits()
    return {name: _of_graph(name, graph, manifest, limits) for name, graph in manifest.graphs.items()}


def activation_bytes(graph: GraphInfo, profiles: Mapping[str, InputProfile]) -> int:
    """Bytes of the graph's inputs at their largest: what an application holds beside the engine's own scratch memory.

    The scratch memory grows in proportion: at the maximum an engine needs about (maximum / optimum) times what it needs
    at the optimum, and reserves it when it is opened.
    """
    widths = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "bool": 1, "uint8": 1, "int8": 1}
    total = 0
    for tensor in graph.inputs:
        count = 1
        profile = profiles.get(tensor.name)
        for size in profile.maximum if profile else (size for size in tensor.shape if isinstance(size, int)):
            count *= size
        total += count * widths[tensor.dtype]
    return total


def _of_graph(name: str, graph: GraphInfo, manifest: Manifest, limits: ProfileLimits) -> dict[str, InputProfile]:
    sizes = _free_sizes(name, manifest, limits)
    found = {}
    for tensor in graph.inputs:
        if not any(isinstance(size, str) for size in tensor.shape):
            continue
        each = [(size, size, size) if isinstance(size, int) else sizes[size] for size in tensor.shape]
        minimum, optimum, maximum = (tuple(limit[index] for limit in each) for index in range(3))
        found[tensor.name] = InputProfile(minimum, optimum, maximum)
    return found


def _free_sizes(name: str, manifest: Manifest, limits: ProfileLimits) -> dict[str, Limits]:
    """Name of a free size -> its limits."""
    rule, counts = manifest.text, manifest.model.token_counts
    length = rule.text_length
    texts = (length, length, length) if length else (2, max(2, rule.context_length // 2), rule.context_length)
    batch = {"text": limits.texts, "video": limits.clips}.get(name, limits.pictures)
    return {
        "batch": (1, 1, batch),
        "beams": (1, 1, limits.beams),
        # The first call has no past and brings the whole prompt; every later one brings a token.
        "past": (0, max(1, rule.max_tokens // 2), rule.context_length - 1),
        "new": (1, 1, rule.context_length),
        "length": texts,
        "classes": (1, min(20, limits.names), limits.names),
        "seen": (min(counts), counts[0], max(counts)),
    }
