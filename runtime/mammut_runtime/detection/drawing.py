"""Draws boxes with their names onto pictures and frames. Each name has its own colour, the same in every run."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.annotate import FONT, MIN_WIDTH, drawable
from mammut_runtime.detection.boxes import Detection
from mammut_runtime.detection.tracker import Tracked

U8 = NDArray[np.uint8]
_DARK, _LIGHT = (16, 16, 16), (245, 245, 245)


@dataclass(frozen=True)
class _Style:
    letter: int
    """Height of a capital letter, pixels."""
    scale: float
    line: int
    """Thickness, pixels."""


def draw_detections(pixels: U8, found: Sequence[Detection | Tracked]) -> U8:
    """The picture with its boxes: uint8[H, W, 3] RGB -> uint8[k * H, k * W, 3], a new array.

    k is the smallest whole number that gives at least 320 pixels of width, so that words can be read. Better ones are
    drawn over worse ones.
    """
    factor = -(-MIN_WIDTH // pixels.shape[1]) if pixels.shape[1] < MIN_WIDTH else 1
    canvas: U8 = np.ascontiguousarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    if canvas is pixels or np.shares_memory(canvas, pixels):
        canvas = canvas.copy()
    letter = int(np.clip(min(canvas.shape[:2]) / 32, 8, 22))
    style = _Style(letter, letter / 21, max(1, round(letter / 7)))
    for each in sorted(found, key=lambda one: _detection(one).score):
        _draw(canvas, each, factor, style)
    return canvas


def colour_of(name: str) -> tuple[int, int, int]:
    """Red, green, blue for a name: bright, and the same always."""
    hue = int.from_bytes(hashlib.sha256(name.casefold().encode()).digest()[:2], "big") / 65536
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.55, 0.85))
    return red, green, blue


def label_of(found: Detection | Tracked) -> str:
    """What stands at a box: `car 0.87`, and in clips `#3 car 0.87`."""
    detection = _detection(found)
    number = f"#{found.number} " if isinstance(found, Tracked) else ""
    return f"{number}{detection.name} {detection.score:.2f}"


def _detection(found: Detection | Tracked) -> Detection:
    return found.detection if isinstance(found, Tracked) else found


def _draw(canvas: Any, found: Detection | Tracked, factor: int, style: _Style) -> None:
    detection = _detection(found)
    height, width = canvas.shape[:2]
    colour = colour_of(detection.name)
    left, top, right, bottom = (round(value * factor) for value in detection.box.xyxy)
    right, bottom = max(left, min(right, width) - 1), max(top, min(bottom, height) - 1)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, style.line)
    text = drawable(label_of(found))
    size: Any = cv2.getTextSize(text, FONT, style.scale, 1)
    text_width, margin = int(size[0][0]), style.letter // 3
    band = style.letter + 2 * margin
    x = int(np.clip(left, 0, max(0, width - text_width - 2 * margin)))
    y = top - band if top >= band else min(top, max(0, height - band))  # above the box; in it where there is no room
    cv2.rectangle(canvas, (x, y), (min(x + text_width + 2 * margin, width) - 1, y + band - 1), colour, cv2.FILLED)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    origin = (x + margin, y + band - margin)
    cv2.putText(canvas, text, origin, FONT, style.scale, _DARK if bright else _LIGHT, 1, cv2.LINE_AA)
