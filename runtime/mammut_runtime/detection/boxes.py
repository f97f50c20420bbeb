"""Boxes and what was found in them: frozen, plain with `to_dict`.

A box is given by its corners in continuous pixel coordinates: (0, 0) is the outer corner of the first pixel and (width,
height) that of the last. The picture is the upright one: a file is turned by its EXIF orientation before anything looks
at it, so boxes fit what a viewer shows. Arrays are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.strict import to_dict

Floats = NDArray[np.float32]
_DECIMALS = 2
"""Of a pixel, in what is written for people and programs."""


@dataclass(frozen=True)
class Box:
    """A rectangle in the pixels of a picture; x0 <= x1 and y0 <= y1."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        """Pixels."""
        return self.width * self.height

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x0, self.y0, self.x1, self.y1

    @property
    def xywh(self) -> tuple[float, float, float, float]:
        """Left, top, width, height: COCO's order."""
        return self.x0, self.y0, self.width, self.height

    def to_dict(self) -> dict[str, float]:
        """Corners in pixels, rounded to hundredths."""
        return {name: round(value, _DECIMALS) for name, value in zip(("x0", "y0", "x1", "y1"), self.xyxy, strict=True)}


@dataclass(frozen=True)
class Detection:
    """A thing in a picture."""

    name: str
    """As the vocabulary has it."""
    score: float
    """0 to 1. A probability where the vocabulary was calibrated with pictures of the thing; else a measure to compare
    by."""
    box: Box

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "score": round(self.score, 6), "box": self.box.to_dict()}


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first."""

    detections: tuple[Detection, ...]
    width: int
    height: int
    """Of the upright picture, pixels. All boxes are inside."""
    notices: tuple[str, ...] = ()
    """What was done otherwise than asked, in words; usually nothing."""

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.detections)

    def __len__(self) -> int:
        return len(self.detections)

    def to_dict(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "height": self.height,
            "detections": [each.to_dict() for each in self.detections],
            "notices": to_dict(self.notices),
        }


def clipped(boxes: Floats, height: int, width: int) -> Floats:
    """Boxes float32[..., 4] xyxy cut at the edges of the picture; those wholly outside get no area."""
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype)).astype(boxes.dtype)


def areas(boxes: Floats) -> Floats:
    """float32[..., 4] xyxy -> float32[...]; 0 for corners in the wrong order."""
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    product: Floats = sides[..., 0] * sides[..., 1]
    return product


def iou_matrix(first: Floats, second: Floats) -> Floats:
    """Intersection over union of every pair: float32[N, 4], float32[M, 4] xyxy -> float32[N, M].

    0 where both have no area.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = np.maximum(high - low, 0)
    common = sides[..., 0] * sides[..., 1]
    union = areas(first)[:, None] + areas(second)[None] - common
    ratio: Floats = np.where(union > 0, common / np.maximum(union, np.finfo(common.dtype).tiny), 0)
    return ratio.astype(first.dtype)
