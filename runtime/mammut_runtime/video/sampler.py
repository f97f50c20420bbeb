"""Which frames of a clip are looked at: spread evenly over its time, within a budget, without knowing its end before.

A container's announced length may be wrong, so it is not used: frames are kept as they come, and whenever there are too
many, every second one is let go and the distance doubled. At most three times the wanted frames, or 8, are held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict

T = TypeVar("T")

MAX_FRAMES = 64
"""That one look may take: they are held and encoded together."""


@dataclass(frozen=True)
class Budget:
    """What one look at a clip may cost. Raises InputError for values out of range."""

    frames: int = 8
    """Most frames that are encoded: this is the time it takes."""
    tokens: int | None = None
    """Most image tokens that are encoded, over all frames; None: as many as the frames have."""
    seconds: float | None = None
    """Most seconds of the clip that are looked at, from the start; None: to its end."""

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MAX_FRAMES:
            raise InputError(f"frames must be from 1 to {MAX_FRAMES}, got {self.frames}")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens must be at least 1, got {self.tokens}")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds must be above 0, got {self.seconds}")

    def most_frames(self, tokens_per_frame: int) -> int:
        """Frames that may be encoded. Raises InputError if the tokens are not enough for one."""
        if self.tokens is None:
            return self.frames
        if self.tokens < tokens_per_frame:
            raise InputError(f"a budget of {self.tokens} tokens; one frame has {tokens_per_frame} with this bundle")
        return min(self.frames, self.tokens // tokens_per_frame)


@dataclass(frozen=True)
class FrameRef:
    """Which frame was used."""

    index: int
    """Counted from 0 in the clip."""
    time_s: float
    """From the start of the clip."""

    def to_dict(self) -> dict[str, Any]:
        return {"index": self.index, "time_s": round(self.time_s, 3)}


@dataclass(frozen=True)
class Sampling:
    """What was looked at."""

    frames: tuple[FrameRef, ...]
    """The frames that were encoded, in order."""
    central: int
    """Which of them the decoder reads, counted from 0."""
    start_s: float
    end_s: float
    """The part of the clip that was gone through."""
    of_frames: int
    """Frames in that part."""
    tokens: int
    """Image tokens that were encoded."""
    cut: bool
    """Whether the budget's seconds ended before the asked part did."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return {**plain, "frames": [each.to_dict() for each in self.frames]}


class SpreadSampler(Generic[T]):
    """Keeps some of a stream, evenly spread over its time."""

    def __init__(self, count: int) -> None:
        """count: how many are wanted in the end; at most max(3 * count, 8) are held."""
        self._count = count
        self._most = most_held(count)
        self._kept: list[tuple[float, T]] = []
        self._distance_s = 0.0

    def offer(self, time_s: float, make: Callable[[], T]) -> None:
        """An item of the stream; `make` is called only if it is kept. Times must increase."""
        if self._kept and time_s - self._kept[-1][0] < self._distance_s:
            return
        if len(self._kept) == self._most:
            self._kept = self._kept[::2]
            usual_s = (time_s - self._kept[0][0]) / len(self._kept)
            self._distance_s = max(2 * self._distance_s, 0.999 * usual_s)  # a frame may come a little early
            if time_s - self._kept[-1][0] < self._distance_s:
                return
        self._kept.append((time_s, make()))

    def chosen(self) -> list[T]:
        """At most `count` items, in order, near the middles of as many equal parts; fewer only if the stream had."""
        held = len(self._kept)
        if held <= self._count:
            return [item for _, item in self._kept]
        first_s, last_s = self._kept[0][0], self._kept[-1][0]
        found: list[T] = []
        at = 0
        for k in range(self._count):
            target_s = first_s + (k + 0.5) * (last_s - first_s) / self._count
            last_allowed = held - (self._count - k)  # leaves one for each that follows
            while at < last_allowed and abs(self._kept[at + 1][0] - target_s) < abs(self._kept[at][0] - target_s):
                at += 1
            found.append(self._kept[at][1])
            at += 1
        return found

    @property
    def held(self) -> int:
        """Items held now."""
        return len(self._kept)


def most_held(count: int) -> int:
    """Items that a sampler for `count` holds at most."""
    return max(3 * count, 8)
