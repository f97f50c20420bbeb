"""Frames of training clips, decoded by the runtime and spread over the clip as it spreads them."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mammut_runtime.errors import InputError
from mammut_runtime.video.decode import Clip, ClipLimits
from mammut_runtime.video.encode import evenly
from mammut_runtime.video.sampler import SpreadSampler

Bytes = npt.NDArray[np.uint8]
CHOICES = 3
"""Frames held for each that is taken, where one of them is drawn."""


@dataclass(frozen=True)
class ClipPart:
    """A clip, or a part of it."""

    path: Path
    start_s: float = 0.0
    end_s: float = math.inf

    @classmethod
    def of_row(cls, folder: Path, row: dict[str, Any]) -> ClipPart:
        """From the keys "clip" (a path inside the folder), "start_s" and "end_s" of a row.

        Raises:
            InputError: no such key, a file that is not there or not in the folder, or times that are none.
        """
        name = row.get("clip")
        if not isinstance(name, str) or not name:
            raise InputError('expected the key "clip" with the path of a clip')
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{name!r} leaves the folder of the list")
        times = [row.get("start_s"), row.get("end_s")]
        for key, time in zip(("start_s", "end_s"), times, strict=True):
            if time is not None and (isinstance(time, bool) or not isinstance(time, int | float) or not time >= 0):
                raise InputError(f"{key}: expected seconds, got {str(time)[:40]!r}")
        start_s, end_s = times[0] or 0.0, math.inf if times[1] is None else times[1]
        if not start_s < end_s:
            raise InputError(f"expected start_s before end_s, got {start_s} and {end_s}")
        found = False
        with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be entered
            found = (folder / name).is_file()
        if not found:
            raise InputError(f"{name[:100]}: no such file")
        return cls(folder / name, start_s, end_s)


def read_frames(
    part: ClipPart,
    count: int,
    side: int,
    *,
    squash: bool = False,
    enlarge: bool = True,
    rng: np.random.Generator | None = None,
) -> list[Bytes]:
    """Frames spread evenly over a part of a clip, resized as they are decoded: memory does not grow with its length.

    Args:
        count: frames. Where the part has fewer, some are repeated, as the runtime does.
        side: of the picture's shorter side, or of both with `squash`, pixels.
        enlarge: also make smaller frames so large.
        rng: draws each frame from its share of the clip; None takes the middle.

    Returns:
        `count` of uint8[H, W, 3] RGB, of one size.

    Raises:
        InputError: not a clip, or no frame in this part.
    """
    sampler = SpreadSampler[Bytes](count * (1 if rng is None else CHOICES))
    size_wh: tuple[int, int] | None = None
    with Clip.open(part.path, ClipLimits(), threads=1) as clip:

        def resized() -> Bytes:
            nonlocal size_wh
            pixels = clip.bgr()
            width, height = pixels.shape[1], pixels.shape[0]
            wanted = side if enlarge else min(side, width, height)
            size_wh = size_wh or _size(width, height, wanted, squash)
            shrinks = size_wh[0] * size_wh[1] < pixels.shape[0] * pixels.shape[1]
            small = cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
            return np.ascontiguousarray(small[:, :, ::-1])

        while (tick := clip.advance()) is not None and tick.time_s < part.end_s:
            if tick.time_s >= part.start_s:
                sampler.offer(tick.time_s, resized)
        end_s = clip.end_s
    found = sampler.chosen()
    if not found:
        raise InputError(f"{part.path.name}: no frames from {part.start_s:g} s on; the clip ends at {end_s:.1f} s")
    if rng is None or len(found) < 2 * count:
        return evenly(found, count)
    edges = [len(found) * index // count for index in range(count + 1)]
    return [found[int(rng.integers(low, high))] for low, high in itertools.pairwise(edges)]


def cropped(frames: list[Bytes], size: int, rng: np.random.Generator) -> Bytes:
    """uint8[F, size, size, 3]: one place for all frames, drawn at random. They are at least as large."""
    height, width = frames[0].shape[:2]
    top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
    return np.stack([frame[top : top + size, left : left + size] for frame in frames])


def _size(width: int, height: int, side: int, squash: bool) -> tuple[int, int]:
    if squash:
        return side, side
    factor = side / min(width, height)
    return max(side, round(width * factor)), max(side, round(height * factor))
