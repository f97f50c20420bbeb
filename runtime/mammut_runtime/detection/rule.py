"""What a bundle says about its detector: how pictures go in, which prompts make names, and what comes out.

The manifest holds it under `detection`. Everything the device needs and the graph does not do itself is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mammut_runtime.strict import Between, Length, Matching

Name = Annotated[
    str,
    Matching(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*", "a text without control characters"),
    Length(1, 300),
]
Share = Annotated[float, Between(0, 1)]
MAX_NAMES = 10_000
"""Of a vocabulary: with 300 proposals its scores are then 12 MB."""


@dataclass(frozen=True)
class DetectionRule:
    """How the `detector` graph is fed, and what is done with what it gives."""

    size: Annotated[int, Between(1, 4096)]
    """D: side of the square that pictures are letterboxed into (detection/letterbox.py), pixels."""
    mean: tuple[float, float, float]
    """Subtracted from R, G, B in [0, 1]."""
    std: tuple[
        Annotated[float, Between(1e-6, 1e6)], Annotated[float, Between(1e-6, 1e6)], Annotated[float, Between(1e-6, 1e6)]
    ]
    """Divides R, G, B after the mean is taken off."""
    fill: Annotated[int, Between(0, 255)]
    """Grey of the padding, before mean and std."""
    proposals: Annotated[int, Between(1, 4096)]
    """P: boxes that leave the graph, whatever the picture."""
    nms_iou: Share
    """A box that overlaps a better one of its name by more than this is left out."""
    threshold: Share
    """Lowest score that counts, for names without one of their own."""
    templates: Annotated[tuple[Annotated[str, Length(2, 1000)], ...], Length(1, 1000)]
    """Prompts for names, each with {} once; a name's embedding is the mean over them, of unit length."""
    base_names: Annotated[tuple[Name, ...], Length(0, MAX_NAMES)]
    """Names that had boxes in training; all others are new to the detector, and scored with `weight_novel`."""
    weight_base: Share
    """How much of the score of a base name is the picture encoder's own opinion (an exponent); the rest is the
    detector's. In the graph; here for people."""
    weight_novel: Share
    """The same for new names."""
    objectness_power: Annotated[float, Between(0, 100)]
    """Exponent of the proposal's own score in the whole. In the graph; here for people."""

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ValueError(f"templates: expected {{}} once and no other braces, got {template[:80]!r}")
        if len(set(self.base_names)) != len(self.base_names):
            raise ValueError("base_names: a name is there twice")
