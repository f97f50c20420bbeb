"""Cuts a clip into scenes as it is decoded: at hard cuts, and where a scene has lasted long enough.

The rule is small and was measured (docs/video.md): each frame becomes a colour thumbnail, and a cut is where it differs
from the one before by much more than usual, both in absolute terms and compared with the last few differences. A fade
is no cut by this rule; the longest scene bounds what that can cost.

A scene's boundaries are whole milliseconds. The next scene begins where one ends, so they can never overlap.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.video.decode import Clip, Tick
from mammut_runtime.video.sampler import FrameRef, SpreadSampler

Bytes = NDArray[np.uint8]

_THUMBNAIL = 32
_SAMPLED_SIDE = 64
"""Pixels are picked down to about this many on the shorter side before they are averaged: averaging all of a large
frame takes longer than decoding it."""
_PIXEL = np.dtype("V3")
_REMEMBERED = 8
"""Differences that "usual" is the mean of."""


@dataclass(frozen=True)
class SceneRule:
    """Where scenes begin and end. Raises InputError for values out of range."""

    difference: float = 24.0
    """Mean difference of two neighbouring thumbnails, 0 to 255, from which on there may be a cut."""
    ratio: float = 2.0
    """A cut differs so many times more than the frames just before it differed from each other."""
    shortest_s: float = 0.5
    """A cut sooner after the last one is passed over."""
    longest_s: float = 10.0
    """A scene that lasts this long is divided: something may have happened without a cut."""
    looks_per_s: float = 30.0
    """Frames that are compared, at most; a faster clip is thinned to this rate."""

    def __post_init__(self) -> None:
        if not (0 < self.difference <= 255 and 1 <= self.ratio <= 1000):
            raise InputError(
                f"difference must be above 0 and at most 255, ratio 1 to 1000, got {self.difference}, {self.ratio}"
            )
        if not 0.1 <= self.shortest_s <= self.longest_s <= 3600:
            raise InputError(
                f"scenes must last from 0.1 to 3600 s, the shortest not more than the longest, got {self.shortest_s} "
                f"and {self.longest_s}"
            )
        if not 0.1 <= self.looks_per_s <= 1000:
            raise InputError(f"looks_per_s must be from 0.1 to 1000, got {self.looks_per_s}")


@dataclass(frozen=True, eq=False)
class Scene:
    """A part of a clip, with some of its frames."""

    start_ms: int
    end_ms: int
    """Where the next one begins."""
    frames: tuple[FrameRef, ...]
    """The frames that are kept, evenly spread."""
    pixels: tuple[Bytes, ...]
    """Theirs: uint8[H, W, 3], BGR."""
    of_frames: int
    """How many frames the scene has."""


class Cutter:
    """Says at which frames a new scene begins."""

    def __init__(self, rule: SceneRule) -> None:
        self._rule = rule
        self._last: NDArray[np.int16] | None = None
        self._last_s = self._start_s = 0.0
        self._differences: deque[float] = deque(maxlen=_REMEMBERED)

    def wants(self, time_s: float) -> bool:
        """Whether the frame at this time is to be looked at; the others belong to the scene as it is."""
        return self._last is None or (time_s - self._last_s) * self._rule.looks_per_s > 0.999

    def begins(self, time_s: float, pixels: Bytes) -> bool:
        """Look at a frame, uint8[H, W, 3]: does a scene begin with it? The first one always begins one."""
        small = thumbnail(pixels)
        last, self._last, self._last_s = self._last, small, time_s
        if last is None:
            self._start_s = time_s
            return True
        difference = float(np.abs(small - last).mean())
        cut = self._is_cut(difference) and time_s - self._start_s >= self._rule.shortest_s
        self._differences.append(difference)
        if cut or time_s - self._start_s >= self._rule.longest_s:
            self._start_s = time_s
            if cut:
                self._differences.clear()
            return True
        return False

    def _is_cut(self, difference: float) -> bool:
        usual = sum(self._differences) / len(self._differences) if self._differences else 0.0
        return difference >= self._rule.difference and difference >= self._rule.ratio * usual


def thumbnail(pixels: Bytes) -> NDArray[np.int16]:
    """uint8[H, W, 3] to int16[32, 32, 3]; a few pixels of each place, averaged."""
    step = max(1, min(pixels.shape[:2]) // _SAMPLED_SIDE)
    whole = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(_PIXEL)  # copied by the pixel, not by the byte
    picked = whole[step // 2 :: step, step // 2 :: step].copy()
    picked = picked.view(np.uint8).reshape(*picked.shape, 3)
    return np.asarray(cv2.resize(picked, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA), np.int16)


def halved(pixels: Bytes, most_side: int) -> Bytes:
    """Blocks of 2 x 2 averaged while both sides are at least `most_side`: uint8[H, W, 3] to uint8[H', W', 3].

    An odd last row or column is dropped. With four times the model's side it is what preprocessing in mode "fast" does.
    """
    while min(pixels.shape[:2]) >= most_side:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        small = cv2.resize(pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        pixels = np.asarray(small, np.uint8)
    return pixels


def scenes(
    clip: Clip,
    rule: SceneRule | None = None,
    frames_per_scene: int = 3,
    start_s: float = 0.0,
    end_s: float = math.inf,
    most_side: int | None = None,
) -> Iterator[Scene]:
    """The scenes of a clip (of the part from start_s to end_s), each as soon as it is over. At most
    sampler.most_held(frames_per_scene) frames are held at once, whatever the clip's length.

    most_side: frames with both sides at least so long are halved until they are not (see `halved`); None: never.
    """
    rule = rule or SceneRule()
    open_scene: _OpenScene | None = None
    cutter = Cutter(rule)
    end_ms = 0
    while (tick := clip.advance()) is not None and tick.time_s < end_s:
        if tick.time_s < start_s:
            continue
        lazy = _Lazy(clip)
        if cutter.wants(tick.time_s) and cutter.begins(tick.time_s, lazy.pixels()):
            begin_ms = round(tick.time_s * 1000)
            if open_scene is not None:
                yield open_scene.closed(begin_ms)
            open_scene = _OpenScene(begin_ms, frames_per_scene, most_side)
        if open_scene is not None:
            open_scene.add(tick, lazy)
        end_ms = round(clip.end_s * 1000)
    if open_scene is not None:
        yield open_scene.closed(max(end_ms, open_scene.start_ms + 1))


class _OpenScene:
    def __init__(self, start_ms: int, frames: int, most_side: int | None) -> None:
        self.start_ms, self._most_side = start_ms, most_side
        self._sampler = SpreadSampler[tuple[FrameRef, Bytes]](frames)
        self._count = 0

    def add(self, tick: Tick, lazy: _Lazy) -> None:
        self._count += 1
        self._sampler.offer(tick.time_s, lambda: (FrameRef(tick.index, tick.time_s), self._held(lazy.pixels())))

    def _held(self, pixels: Bytes) -> Bytes:
        return pixels if self._most_side is None else halved(pixels, self._most_side)

    def closed(self, end_ms: int) -> Scene:
        chosen = self._sampler.chosen()
        refs, pixels = tuple(ref for ref, _ in chosen), tuple(each for _, each in chosen)
        return Scene(self.start_ms, end_ms, refs, pixels, self._count)


class _Lazy:
    """A frame's pixels, converted at most once."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._pixels: Bytes | None = None

    def pixels(self) -> Bytes:
        if self._pixels is None:
            self._pixels = self._clip.bgr()
        return self._pixels
