"""A clip as frames, one after the other, with the container's own times: memory does not grow with length.

    with Clip.open(Path("day.mp4")) as clip:
        while (tick := clip.advance()) is not None:
            pixels = clip.bgr()                     # only of the frames that are wanted: this costs a conversion

Frames are turned upright by the container's rotation. Times are the container's timestamps, not number / rate, so clips
of varying rate are right. A damaged packet is passed over and counted (`Clip.health`); a timestamp that does not follow
the last one is replaced and counted. What is not a video, has no frame, or is beyond the limits is an InputError.

OpenCV decodes, through the FFmpeg inside its wheel. There is no seeking: positions by time are not exact in every
format, and decoding is fast next to everything else (see docs/video.md).
"""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError

CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp", ".flv", ".wmv")
QUIET_VARIABLE = "OPENCV_FFMPEG_LOGLEVEL"
"""FFmpeg writes every damaged packet to stderr unless this is -8; the commands set it, a library must not."""
_EXACT_COUNTS = ("mp4", "avi")
"""Containers that store how many frames they have; the others' counts are their length times a mean rate."""
_MOST_FAILURES = 256
"""Failed reads in a row after which a clip has ended. Behind a damaged packet there are usually readable ones."""
_LONGEST_GAP_S = 3600.0
"""A timestamp further ahead than this is damaged, not a pause."""
_USUAL_FPS = 25.0
_REMEMBERED_STEPS = 9
"""Steps that the usual one is the median of: one pause, or one damaged timestamp, does not change it."""


@dataclass(frozen=True)
class ClipLimits:
    """What is refused before it can hurt."""

    max_side: int = 16_384
    """Pixels."""
    max_pixels: int = 40_000_000
    """Of one frame; 8K has 33 million."""
    max_duration_s: float = 24 * 3600.0
    max_fps: float = 1000.0
    """With the duration it bounds the number of frames; a rate above it, or none, counts as unknown."""


@dataclass(frozen=True)
class ClipInfo:
    """What the container says about a clip; it may be wrong."""

    path: Path
    container: str
    """mp4 (and mov), mkv (and webm), avi, ts, mpeg, flv, asf or ogg."""
    codec: str
    """Four letters, as FFmpeg names it."""
    width: int
    """Pixels, after turning."""
    height: int
    rotation_degrees: int
    """0, 90, 180 or 270, as stored; the frames are turned already."""
    fps: float | None
    """Mean frames per second; None if the container gives no usable one."""
    frames: int | None
    """Announced; estimated in all containers but mp4 and avi."""
    duration_s: float | None
    """Announced."""


@dataclass(frozen=True)
class ClipHealth:
    """What went well and what did not, up to now."""

    frames: int
    """Decoded."""
    unreadable: int
    """Reads that failed with readable frames behind them: damaged packets."""
    repaired_times: int
    """Timestamps that were missing, not later than the one before, or absurdly late."""
    missing: int
    """Frames that were announced and never came; 0 while the clip goes on, and where the count is an estimate."""
    short_s: float
    """Seconds that the clip ended before its announced end, if that is more than a rounding; 0 while it goes on."""

    @property
    def whole(self) -> bool:
        """Whether nothing is known to be lost."""
        return not (self.unreadable or self.missing or self.short_s)

    def summary(self) -> str:
        """What is wrong, for people; empty if nothing is."""
        found = [
            (self.unreadable, f"{self.unreadable} unreadable packets"),
            (self.missing, f"{self.missing} frames missing"),
            (self.short_s, f"ends {self.short_s:.1f} s early"),
            (self.repaired_times, f"{self.repaired_times} timestamps repaired"),
        ]
        return ", ".join(text for count, text in found if count)


@dataclass(frozen=True)
class Tick:
    """A frame's place in its clip."""

    index: int
    """Counted from 0, of the frames that could be decoded."""
    time_s: float
    """From the start of the clip; strictly increasing."""


class Clip:
    """An open clip. Made by `Clip.open`; for one thread at a time."""

    def __init__(self, capture: Any, info: ClipInfo, limits: ClipLimits) -> None:
        """capture: a cv2.VideoCapture, or what behaves like one (tests)."""
        self.info = info
        self._capture, self._limits = capture, limits
        self._frames = self._unreadable = self._repaired = 0
        self._time_s = -1.0
        self._steps_s = deque([1 / (info.fps or _USUAL_FPS)], maxlen=_REMEMBERED_STEPS)
        self._ended = False

    @classmethod
    def open(cls, path: str | Path, limits: ClipLimits | None = None, threads: int = 0) -> Clip:
        """Open a clip. threads: of the decoder; 0 lets it choose.

        Raises InputError for what is no video, cannot be decoded, or is beyond the limits.
        """
        limits = limits or ClipLimits()
        path = Path(path)
        container = _container(path)
        # The absolute path: a name such as "concat:..." would be a command to FFmpeg.
        capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
        try:
            if not capture.isOpened():
                raise InputError(
                    f"{path}: {container} file without a video that can be read: it has no frames, its header is "
                    f"damaged or cut off, or this OpenCV has no decoder for it; try to convert it to H.264 first"
                )
            capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
            info = _info(path, container, capture, limits)
            _check(info, limits)
        except BaseException:
            capture.release()
            raise
        return cls(capture, info, limits)

    def advance(self) -> Tick | None:
        """Decode the next frame that can be decoded; None at the end of the clip.

        Raises InputError at the end of a clip without any frame, and where it is longer than the limits.
        """
        if self._ended:
            return None
        for failures in range(_MOST_FAILURES):
            if self._capture.grab():
                self._unreadable += failures
                return self._tick()
        self._ended = True
        if not self._frames:
            raise InputError(f"{self.info.path}: not one frame of this clip can be decoded; it is damaged, or empty")
        return None

    def bgr(self) -> NDArray[np.uint8]:
        """The pixels of the frame that `advance` came to: uint8[H, W, 3], BGR, upright, an array of its own.

        Raises InputError if there are none (a frame that was announced but cannot be converted).
        """
        try:
            whole, pixels = self._capture.retrieve()
        except cv2.error as problem:  # no memory for it, for one
            raise InputError(f"{self.info.path}: frame {self._frames - 1} cannot be converted: {problem.err}") from None
        if not whole or pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise InputError(f"{self.info.path}: frame {self._frames - 1} has no pixels that can be used")
        if pixels.shape[0] * pixels.shape[1] > self._limits.max_pixels:
            raise InputError(f"{self.info.path}: grows to {_size(pixels)} pixels on the way; expected one size")
        found: NDArray[np.uint8] = pixels
        return found

    @property
    def health(self) -> ClipHealth:
        """What went well and what did not, up to now."""
        missing, short_s = 0, 0.0
        if self._ended:
            if self.info.frames is not None and self.info.container in _EXACT_COUNTS:
                missing = max(0, self.info.frames - self._frames)
            if self.info.duration_s is not None:
                behind = self.info.duration_s - self.end_s
                short_s = behind if behind > max(0.5, 0.02 * self.info.duration_s) else 0.0
        return ClipHealth(self._frames, self._unreadable, self._repaired, missing, round(short_s, 3))

    @property
    def end_s(self) -> float:
        """When the frame that `advance` came to ends, if it lasts as long as the last few usually did."""
        return max(0.0, self._time_s) + self._usual_step_s()

    def close(self) -> None:
        """Frees the decoder."""
        self._ended = True
        self._capture.release()

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _tick(self) -> Tick:
        time_s = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if self._frames == 0:
            usable = math.isfinite(time_s) and 0 <= time_s < _LONGEST_GAP_S
            self._time_s = time_s if usable else 0.0
        else:
            usable = math.isfinite(time_s) and 0 < time_s - self._time_s < _LONGEST_GAP_S
            step_s = time_s - self._time_s if usable else self._usual_step_s()
            if usable:
                self._steps_s.append(step_s)
            self._time_s += step_s
        self._repaired += not usable
        limits = self._limits
        self._frames += 1
        if self._time_s > limits.max_duration_s or self._frames > limits.max_duration_s * limits.max_fps:
            raise InputError(
                f"{self.info.path}: longer than the limit of {limits.max_duration_s:,.0f} s; cut it into parts"
            )
        return Tick(self._frames - 1, self._time_s)

    def _usual_step_s(self) -> float:
        return sorted(self._steps_s)[(len(self._steps_s) - 1) // 2]


def _container(path: Path) -> str:
    """Which container the file is, by its first bytes. Playlists and scripts, which name other files, are none."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a plain file; expected a clip")
    try:
        with path.open("rb") as file:
            head = file.read(377)
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    if not head:
        raise InputError(f"{path}: an empty file; expected a clip")
    found = _by_first_bytes(head)
    if found is None:
        raise InputError(f"{path}: not a video; expected mp4, mov, mkv, webm, avi, mpeg, ts, flv, wmv or ogg")
    return found


def _by_first_bytes(head: bytes) -> str | None:
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "mp4"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"AVIX"):
        return "avi"
    if head[:1] == b"\x47" and (len(head) < 189 or head[188:189] == b"\x47"):
        return "ts"
    if head[4:5] == b"\x47" and head[196:197] == b"\x47":
        return "ts"  # with 4 bytes of time before each packet, as cameras write
    starts = {
        b"\x1a\x45\xdf\xa3": "mkv",
        b"\x00\x00\x01\xba": "mpeg",
        b"\x00\x00\x01\xb3": "mpeg",
        b"FLV\x01": "flv",
        b"\x30\x26\xb2\x75": "asf",
        b"OggS": "ogg",
    }
    return starts.get(head[:4])


def _info(path: Path, container: str, capture: Any, limits: ClipLimits) -> ClipInfo:
    def number(key: int) -> float:
        value = float(capture.get(key))
        return value if math.isfinite(value) else 0.0

    fps = number(cv2.CAP_PROP_FPS)
    usable_fps = fps if 0 < fps <= limits.max_fps else None
    count = number(cv2.CAP_PROP_FRAME_COUNT)
    frames = int(count) if 1 <= count < 2**53 else None
    codec = int(number(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
    letters = codec.to_bytes(4, "little").decode("latin-1")
    return ClipInfo(
        path,
        container,
        "".join(each if each.isprintable() else "?" for each in letters).strip(),
        int(number(cv2.CAP_PROP_FRAME_WIDTH)),
        int(number(cv2.CAP_PROP_FRAME_HEIGHT)),
        int(number(cv2.CAP_PROP_ORIENTATION_META)) % 360,
        usable_fps,
        frames,
        frames / usable_fps if frames and usable_fps else None,
    )


def _check(info: ClipInfo, limits: ClipLimits) -> None:
    width, height = info.width, info.height
    if width < 1 or height < 1 or max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise InputError(
            f"{info.path}: frames of {width}x{height} pixels; expected 1 to {limits.max_side:,} a side and at most "
            f"{limits.max_pixels:,} pixels"
        )
    if info.duration_s is not None and info.duration_s > limits.max_duration_s:
        raise InputError(
            f"{info.path}: says it lasts {info.duration_s:,.0f} s, the limit is {limits.max_duration_s:,.0f} s; cut it "
            f"into parts, or it is damaged"
        )


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def quiet_decoder() -> None:
    """Keep FFmpeg and OpenCV from writing to stderr: what is wrong is in errors and in `Clip.health`.

    For commands: it sets an environment variable and OpenCV's log level, both of the whole process.
    """
    os.environ.setdefault(QUIET_VARIABLE, "-8")
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
