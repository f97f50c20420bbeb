"""Detection in clips: some frames a second, each thing with a number that stays; and the clip with the boxes drawn."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.detection.boxes import Detections
from mammut_runtime.detection.copies import CLIP_COPIES, refuse_existing
from mammut_runtime.detection.drawing import draw_detections
from mammut_runtime.detection.tracker import Tracked, Tracker, TrackRule
from mammut_runtime.detection.vocabulary import Vocabulary
from mammut_runtime.errors import InputError
from mammut_runtime.video.decode import Clip

if TYPE_CHECKING:
    from mammut_runtime.model import Model

_USUAL_FPS = 25.0
_EARLY = 0.05
"""A frame may come this share of the step early: timestamps are rounded to milliseconds."""
_ROUNDING = 1e-6
"""Of a frame that comes exactly when it is wanted."""
_CODECS = tuple(zip(("mp4v", "MJPG"), CLIP_COPIES, strict=True))
"""Tried in this order: which are there depends on the OpenCV."""


@dataclass(frozen=True, eq=False)
class FrameDetections:
    """What was found in one frame of a clip."""

    index: int
    """Counted from 0 in the clip."""
    time_s: float
    """From the start of the clip."""
    things: tuple[Tracked, ...]
    """Best first, each with its number."""
    detections: Detections
    """The same without numbers, and the frame's size."""
    bgr: NDArray[np.uint8] = field(repr=False)
    """The frame, uint8[H, W, 3], upright."""

    def to_dict(self) -> dict[str, Any]:
        """Without the pixels."""
        plain = self.detections.to_dict()
        things = [each.to_dict() for each in self.things]
        return {"frame": self.index, "time_s": round(self.time_s, 3), **plain, "detections": things}


def detect_clip(
    model: Model,
    clip: Clip,
    vocabulary: Vocabulary,
    fps: float | None,
    threshold: float | None = None,
    max_per_class: int | None = None,
    rule: TrackRule | None = None,
) -> Iterator[FrameDetections]:
    """Go through an open clip; see Model.detect_video. Raises InputError."""
    if fps is not None and not fps > 0:
        raise InputError(f"fps: expected frames a second above 0, got {fps}")
    tracker = Tracker(rule)
    due_s = -np.inf
    while (tick := clip.advance()) is not None:
        if tick.time_s < due_s:
            continue
        if fps is not None:
            due_s = next_due_s(tick.time_s, fps)
        pixels = clip.bgr()
        found = model.detect(pixels, vocabulary, threshold, max_per_class, color="bgr")
        yield FrameDetections(tick.index, tick.time_s, tracker.update(tick.time_s, found), found, pixels)


def next_due_s(time_s: float, fps: float) -> float:
    """When the next frame is wanted after one at `time_s`: on the grid of 1 / fps, so that the mean rate is fps."""
    return (math.floor(time_s * fps + _EARLY + _ROUNDING) + 1 - _EARLY) / fps


def drawn_fps(clip: Clip, fps: float | None) -> float:
    """Frames a second of an annotated copy: those that are looked at."""
    own = clip.info.fps or _USUAL_FPS
    return own if fps is None else min(fps, own)


class DrawnClip:
    """An annotated copy of a clip, written frame by frame; it gets its name when it is whole.

    MP4 (MPEG-4 part 2), or AVI (Motion JPEG) where OpenCV has no encoder for it.
    """

    def __init__(self, folder: Path, stem: str, fps: float, *, replace: bool = True) -> None:
        """The file is folder/stem.mp4, or .avi. Nothing is written before the first frame.

        replace: False refuses a file that is there already.
        """
        self._replace = replace
        self._folder, self._stem, self._fps = folder, stem, fps
        self._writer: Any = None
        self._part, self.path = Path(), Path()

    def add(self, frame: FrameDetections) -> None:
        """Raises InputError where it cannot be written, and for a frame of another size."""
        drawn = draw_detections(np.ascontiguousarray(frame.bgr[:, :, ::-1]), frame.things)
        drawn = drawn[: drawn.shape[0] // 2 * 2 or None, : drawn.shape[1] // 2 * 2 or None]  # encoders want even sides
        if self._writer is None:
            self._open(drawn.shape[1], drawn.shape[0])
        if drawn.shape[:2] != self._size:
            raise InputError(f"{self.path}: the clip's frames change their size; expected one size")
        self._writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))

    def _open(self, width: int, height: int) -> None:
        self._size = (height, width)
        for codec, suffix in _CODECS:
            self.path = self._folder / f"{self._stem}{suffix}"
            self._check_free()
            self._part = self._folder / f".{self._stem}.{secrets.token_hex(4)}{suffix}"
            code = cv2.VideoWriter.fourcc(*codec)
            self._writer = cv2.VideoWriter(str(self._part.absolute()), code, self._fps, (width, height))
            if self._writer.isOpened():
                return
        raise InputError(f"--annotate: {self.path}: cannot be written, or this OpenCV has no encoder for clips")

    def _check_free(self) -> None:
        if not self._replace:
            refuse_existing(self.path)

    def __enter__(self) -> DrawnClip:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writer is None:
            return
        self._writer.release()
        try:
            if kind is None:
                self._check_free()
                self._part.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                self._part.unlink()
