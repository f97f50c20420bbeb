"""A short clip drawn by code, in which what happens is known: drawings that move over painted landscapes.

It is no film, and says nothing about how a model does on real clips; give it your own for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import drawings
import numpy as np
from drawings import RGB, Canvas, cut_out

from mammut_runtime import InputError

SIDE, FPS, SHOT_S = 256, 15, 3
_CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))
"""Tried in this order: which are there depends on the OpenCV."""
Spot = tuple[float, float]


@dataclass(frozen=True)
class Actor:
    """A drawing on its way."""

    pixels: Canvas
    """uint8[H, W, 4], RGBA."""
    side: float
    """Its longer one, as a share of the picture's."""
    start: Spot
    """Of its middle, as shares of the picture's sides from the left and from the top."""
    end: Spot | None = None
    """None: it stays."""
    sets_out_at: float = 0.0
    """After this share of the shot; it arrives with its end."""
    appears_at: float = 0.0


@dataclass(frozen=True)
class Shot:
    """Three seconds, and what can be said about them."""

    sky: RGB
    meadow: RGB
    actors: tuple[Actor, ...]
    """From back to front."""
    words: tuple[str, ...]
    """A right caption has all of them."""
    question: str
    answer: str


def shots() -> list[Shot]:
    """What is in the clip."""
    heart, star, sun = cut_out(drawings.red_heart), cut_out(drawings.star), cut_out(drawings.sun)
    tree, cloud = cut_out(drawings.evergreen_tree), cut_out(drawings.cloud)
    return [
        Shot(
            (176, 206, 235), (150, 190, 140),
            (Actor(heart, 0.26, (0.28, 0.5), (0.70, 0.5)),),
            ("red heart", "right"), "which way does the red heart move?", "right",
        ),
        Shot(
            (244, 216, 190), (196, 170, 140),
            (Actor(tree, 0.34, (0.28, 0.6)), Actor(star, 0.30, (0.68, 0.36), appears_at=0.6)),
            ("star", "appears"), "does the star appear or disappear?", "appears",
        ),
        Shot(
            (120, 150, 190), (90, 120, 110),
            (Actor(sun, 0.26, (0.22, 0.45), (0.80, 0.45), sets_out_at=0.4), Actor(cloud, 0.32, (0.52, 0.47))),
            ("sun", "cloud"), "does the sun pass behind or in front of the cloud?", "behind",
        ),
    ]  # fmt: skip


def group() -> Canvas:
    """A picture with several things: uint8[256, 256, 3], RGB."""
    canvas = _landscape((176, 206, 235), (150, 190, 140))
    for draw, side, spot in (
        (drawings.evergreen_tree, 0.36, (0.24, 0.66)), (drawings.red_heart, 0.24, (0.70, 0.72)),
        (drawings.sun, 0.28, (0.74, 0.22)), (drawings.cloud, 0.28, (0.26, 0.22)),
    ):  # fmt: skip
        _lay(canvas, Actor(cut_out(draw), side, spot), 0.0)
    return canvas


def write_clip(folder: Path) -> Path:
    """The clip as folder/drawn.mp4, or .avi where OpenCV has no encoder for that. Raises InputError for neither."""
    for codec, suffix in _CODECS:
        path = folder / f"drawn{suffix}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), FPS, (SIDE, SIDE))
        if not writer.isOpened():
            continue
        for shot in shots():
            for frame in frames(shot):
                writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
        writer.release()
        return path
    raise InputError(f"{folder}: a clip cannot be written here, or this OpenCV has no encoder for clips")


def frames(shot: Shot) -> Iterator[Canvas]:
    """Its frames, uint8[256, 256, 3], RGB."""
    behind = _landscape(shot.sky, shot.meadow)
    count = FPS * SHOT_S
    for number in range(count):
        canvas, share = behind.copy(), number / (count - 1)
        for actor in shot.actors:
            if share >= actor.appears_at:
                _lay(canvas, actor, share)
        yield canvas


def _landscape(sky: RGB, meadow: RGB) -> Canvas:
    """A sky that is paler below, above a meadow, with a little grain."""
    depth = np.linspace(0, 1, SIDE)[:, None, None]
    colours = np.where(depth < 0.7, np.array(sky) + 30 * depth, np.array(meadow) + 20 * (1 - depth))
    grain = np.random.default_rng(0).integers(-4, 5, (SIDE, SIDE, 1))
    return np.clip(np.broadcast_to(colours, (SIDE, SIDE, 3)) + grain, 0, 255).astype(np.uint8)


def _lay(canvas: Canvas, actor: Actor, share: float) -> None:
    height, width = actor.pixels.shape[:2]
    scale = actor.side * SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawn = cv2.resize(actor.pixels, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    way = max(0.0, share - actor.sets_out_at) / (1 - actor.sets_out_at)
    ends = zip(actor.start, actor.end or actor.start, strict=True)
    middle = [one + (other - one) * way for one, other in ends]
    left, top = (round(part * SIDE - length / 2) for part, length in zip(middle, size, strict=True))
    under = canvas[top : top + size[1], left : left + size[0]]
    alpha = drawn[:, :, 3:] / 255
    under[:] = np.rint(drawn[:, :, :3] * alpha + under * (1 - alpha)).astype(np.uint8)
