"""Boxes on a small picture for the page: what was to be found, what was found, and what was wrong."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut.evaluation.outcome import DrawnBox
from mammut_runtime.annotate import FONT, drawable

_COLOURS = {"truth": (255, 255, 255), "right": (46, 190, 70), "wrong": (235, 40, 60)}
"""RGB."""


def draw_boxes(pixels: NDArray[np.uint8], boxes: Sequence[DrawnBox], scale: float) -> NDArray[np.uint8]:
    """A copy of uint8[H, W, 3] RGB with the boxes. scale: pixels of this picture for one that the boxes mean."""
    canvas = np.ascontiguousarray(pixels).copy()
    for box in boxes:
        left, top, right, bottom = (round(each * scale) for each in box.xyxy)
        colour = _COLOURS[box.kind]
        if box.kind == "truth":  # dark below light: seen on any ground
            cv2.rectangle(canvas, (left, top), (right, bottom), (0, 0, 0), 3)
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, 1)
        if box.text:
            corner = (left + 2, top + 11 if top < 12 else top - 3)
            cv2.putText(canvas, drawable(box.text), corner, FONT, 0.36, (0, 0, 0), 3, cv2.LINE_AA)
            cv2.putText(canvas, drawable(box.text), corner, FONT, 0.36, colour, 1, cv2.LINE_AA)
    return canvas
