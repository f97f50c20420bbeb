"""Sample pictures drawn by code, so that the examples need no downloads: plain shapes, and a few emoji-like things.

They are drawings, not photographs, and say nothing about how a model does on real pictures; give it your own for that.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 256
"""Pixels of a picture's side."""
_FINE = 4
"""Drawn this many times larger and shrunk, which gives smooth edges."""

Canvas = NDArray[np.uint8]
Point = tuple[float, float]
RGB = tuple[int, int, int]

RED, ORANGE, YELLOW, GREEN, BLUE = (222, 46, 40), (245, 150, 30), (252, 205, 50), (40, 140, 70), (20, 90, 210)
BROWN, DARK, WHITE = (140, 60, 45), (60, 50, 45), (255, 255, 255)


def blue_triangle() -> Canvas:
    return _shape((233, 240, 228), lambda canvas: _polygon(canvas, [(0.5, 0.3), (0.72, 0.7), (0.28, 0.7)], (0, 0, 255)))


def red_circle() -> Canvas:
    return _shape((240, 238, 250), lambda canvas: _disc(canvas, (0.45, 0.5), 0.24, (255, 0, 0)))


def yellow_rectangle() -> Canvas:
    box = [(0.25, 0.35), (0.75, 0.35), (0.75, 0.62), (0.25, 0.62)]
    return _shape((226, 240, 250), lambda canvas: _polygon(canvas, box, (255, 255, 0)))


def green_triangle() -> Canvas:
    return _shape((250, 240, 230), lambda canvas: _polygon(canvas, [(0.6, 0.2), (0.85, 0.6), (0.35, 0.6)], (0, 128, 0)))


def black_rectangle() -> Canvas:
    box = [(0.2, 0.5), (0.45, 0.5), (0.45, 0.85), (0.2, 0.85)]
    return _shape((240, 250, 245), lambda canvas: _polygon(canvas, box, (0, 0, 0)))


def red_heart(paper: RGB = WHITE) -> Canvas:
    return _shape(paper, lambda canvas: _heart(canvas, RED))


def blue_heart(paper: RGB = WHITE) -> Canvas:
    return _shape(paper, lambda canvas: _heart(canvas, BLUE))


def star(paper: RGB = WHITE) -> Canvas:
    corners = [_around(0.53, radius, -90 + 36 * i) for i, radius in enumerate([0.47, 0.2] * 5)]
    return _shape(paper, lambda canvas: _polygon(canvas, corners, YELLOW))


def sun(paper: RGB = WHITE) -> Canvas:
    def draw(canvas: Canvas) -> None:
        for angle in range(0, 360, 45):
            corners = [_around(0.5, 0.48, angle), _around(0.5, 0.32, angle - 14), _around(0.5, 0.32, angle + 14)]
            _polygon(canvas, corners, ORANGE)
        _disc(canvas, (0.5, 0.5), 0.27, YELLOW)

    return _shape(paper, draw)


def smiling_face(paper: RGB = WHITE) -> Canvas:
    def draw(canvas: Canvas) -> None:
        _disc(canvas, (0.5, 0.5), 0.46, YELLOW)
        for x in (0.34, 0.66):
            _disc(canvas, (x, 0.42), 0.05, DARK)
        centre, size = _pixels((0.5, 0.54)), (round(0.24 * SIDE * _FINE), round(0.2 * SIDE * _FINE))
        cv2.ellipse(canvas, centre, size, 0, 20, 160, DARK, round(0.04 * SIDE * _FINE), cv2.LINE_8)

    return _shape(paper, draw)


def evergreen_tree(paper: RGB = WHITE) -> Canvas:
    def draw(canvas: Canvas) -> None:
        _polygon(canvas, [(0.44, 0.8), (0.56, 0.8), (0.56, 0.97), (0.44, 0.97)], BROWN)
        for top, bottom, half in ((0.36, 0.84, 0.38), (0.2, 0.62, 0.31), (0.04, 0.4, 0.23)):
            _polygon(canvas, [(0.5, top), (0.5 + half, bottom), (0.5 - half, bottom)], GREEN)

    return _shape(paper, draw)


def cloud(paper: RGB = WHITE) -> Canvas:
    def draw(canvas: Canvas) -> None:
        grey = (205, 215, 225)
        for centre, radius in (((0.27, 0.6), 0.17), ((0.48, 0.45), 0.23), ((0.72, 0.58), 0.19)):
            _disc(canvas, centre, radius, grey)
        _polygon(canvas, [(0.25, 0.55), (0.75, 0.55), (0.75, 0.77), (0.27, 0.77)], grey)

    return _shape(paper, draw)


DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "blue triangle": blue_triangle,
    "red circle": red_circle,
    "yellow rectangle": yellow_rectangle,
    "green triangle": green_triangle,
    "black rectangle": black_rectangle,
    "red heart": red_heart,
    "blue heart": blue_heart,
    "star": star,
    "sun": sun,
    "smiling face": smiling_face,
    "evergreen tree": evergreen_tree,
    "cloud": cloud,
}
"""What a drawing shows → a function that makes it: uint8[256, 256, 3], RGB."""


def cut_out(draw: Callable[[RGB], Canvas]) -> Canvas:
    """A drawing without its paper, cropped to what is drawn: uint8[H, W, 4], RGBA.

    draw: makes the drawing on paper of a colour. On white and on black it differs by how much of the paper is seen.
    """
    light, dark = (draw(paper).astype(np.int32) for paper in (WHITE, (0, 0, 0)))
    alpha = np.clip(255 - (light - dark).max(axis=2), 0, 255)
    colours = np.clip(dark * 255 // np.maximum(alpha, 1)[:, :, None], 0, 255)
    rows, columns = (np.flatnonzero((alpha > 0).any(axis=axis)) for axis in (1, 0))
    whole = np.dstack([colours, alpha]).astype(np.uint8)
    return whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _shape(background: RGB, draw: Callable[[Canvas], None]) -> Canvas:
    canvas: Canvas = np.full((SIDE * _FINE, SIDE * _FINE, 3), background, np.uint8)
    draw(canvas)
    return np.asarray(cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def _heart(canvas: Canvas, colour: RGB) -> None:
    angles = np.linspace(0, 2 * np.pi, 200)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    _polygon(canvas, [(0.5 + a / 36, 0.46 - b / 36) for a, b in zip(x, y, strict=True)], colour)


def _polygon(canvas: Canvas, corners: list[Point], colour: RGB) -> None:
    cv2.fillPoly(canvas, [np.array([_pixels(corner) for corner in corners], np.int32)], colour)


def _disc(canvas: Canvas, centre: Point, radius: float, colour: RGB) -> None:
    cv2.circle(canvas, _pixels(centre), round(radius * SIDE * _FINE), colour, cv2.FILLED)


def _around(centre: float, radius: float, degrees: float) -> Point:
    angle = np.deg2rad(degrees)
    return 0.5 + radius * float(np.cos(angle)), centre + radius * float(np.sin(angle))


def _pixels(point: Point) -> tuple[int, int]:
    return round(point[0] * SIDE * _FINE), round(point[1] * SIDE * _FINE)
