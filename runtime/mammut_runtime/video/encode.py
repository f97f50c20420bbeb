"""A clip, or frames of one, to what the model reads: `Model.encode_video`.

A bundle with a `video` graph sees all frames at once, and so how things move. It takes a fixed number of frames F;
from other numbers the nearest in time are taken, so a short clip's frames are repeated.

Without that graph, this is the still-picture way: each sampled frame is encoded like a photo. The embedding is the
normalised mean of theirs; the tokens, which captions and answers come from, are those of the most central frame, the
one whose embedding is nearest to that mean. Movement is therefore not seen, only what is there. docs/video.md has the
measurement that this choice rests on.

`look_at` is the one place that turns frames into tokens and an embedding, and chooses between the two ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.model import ChannelOrder, Model, Seen
from mammut_runtime.video.decode import Clip, ClipHealth
from mammut_runtime.video.sampler import MAX_FRAMES, Budget, FrameRef, Sampling, SpreadSampler
from mammut_runtime.video.scenes import halved

T = TypeVar("T")
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Frames = Sequence[Bytes]
"""uint8[H, W, 3] each; they may differ in size."""


Way = Literal["video", "pictures"]
"""video: all frames went through the `video` graph together. pictures: each was encoded by itself."""
USUAL_FRAMES = 8
"""Of a clip that is seen as pictures."""


@dataclass(frozen=True, eq=False)
class Look:
    """What the model made of some frames."""

    tokens: Floats
    """float32[N, Wv], for the decoder; [Nv, Wv] from the video graph."""
    embedding: Floats
    """float32[E], unit length."""
    central: int
    """The frame the tokens come from, counted from 0; the middle one if they come from all of them."""
    way: Way


class SeenClip(Seen):
    """A clip the model has looked at: caption, ask and match as for a picture."""

    def __init__(self, model: Model, look: Look, sampling: Sampling, health: ClipHealth | None) -> None:
        """Made by Model.encode_video."""
        super().__init__(model, look.tokens, look.embedding)
        self.sampling = sampling
        """Which frames were used."""
        self.health = health
        """What of the file could be decoded; None for frames in memory."""
        self.way = look.way
        """How it was seen: whether movement was."""


def look_at(model: Model, frames: Frames, color: ChannelOrder = "bgr") -> Look:
    """Encode frames of one clip together. Raises InputError for none, and for arrays that are no pictures."""
    if not len(frames):
        raise InputError("a clip needs at least one frame, got none")
    if model.watches:
        clip = model.encode_frames(evenly(frames, model.manifest.model.video_frames), color)
        return Look(clip.tokens, clip.embedding, len(frames) // 2, "video")
    seen = model.encode_batch(list(frames), color)
    embeddings = np.stack([each.embedding for each in seen]).astype(np.float64)
    mean = embeddings.mean(axis=0)
    length = float(np.linalg.norm(mean))
    mean = mean / length if length > 1e-6 else embeddings[0]  # opposite embeddings cancel; any frame is as good then
    # Rounded, so that frames that are alike up to arithmetic noise give the same choice with every engine.
    central = int(np.argmax(np.round(embeddings @ mean, 6)))
    return Look(seen[central].tokens, mean.astype(np.float32), central, "pictures")


def evenly(frames: Sequence[T], count: int) -> list[T]:
    """`count` of the frames, from the middles of as many equal parts, in order; of fewer frames, some repeated.

    frames: at least one.
    """
    return [frames[(2 * part + 1) * len(frames) // (2 * count)] for part in range(count)]


def frames_wanted(model: Model, budget: Budget | None = None) -> int:
    """How many frames of a clip to look at: what the video graph takes, or the usual number, within the budget.

    Raises InputError for a budget of fewer tokens than one look costs.
    """
    info = model.manifest.model
    if not model.watches:
        return (budget or Budget(USUAL_FRAMES)).most_frames(info.image_tokens)
    if budget is None:
        return info.video_frames
    if budget.tokens is not None and budget.tokens < info.video_tokens:
        raise InputError(f"a budget of {budget.tokens} tokens; a clip has {info.video_tokens} with this bundle")
    return min(budget.frames, info.video_frames)


def held_side(model: Model) -> int | None:
    """From which side on frames are halved as they come (see scenes.halved): where a model looks at many frames at
    once, whole ones would take gigabytes. None where it looks at a few, each like a photo."""
    return 4 * model.manifest.preprocess.size if model.watches else None


def encode_video(
    model: Model,
    source: str | Path | Frames,
    start_s: float = 0.0,
    end_s: float | None = None,
    budget: Budget | None = None,
    color: ChannelOrder = "rgb",
    fps: float | None = None,
) -> SeenClip:
    """See `Model.encode_video`."""
    if not 0 <= start_s < (math.inf if end_s is None else end_s):
        raise InputError(f"expected 0 <= start_s < end_s, got {start_s} and {end_s}")
    most = frames_wanted(model, budget)
    last_s = math.inf if end_s is None else end_s
    stop_s = last_s if budget is None or budget.seconds is None else min(last_s, start_s + budget.seconds)
    if isinstance(source, str | Path):
        if fps is not None:
            raise InputError("fps is for frames in memory; a file has its own times")
        part = _from_file(Path(source), start_s, stop_s, most, held_side(model))
        color = "bgr"
    else:
        part = _from_memory(source, start_s, stop_s, most, fps)
    look = look_at(model, part.pixels, color)
    cut = stop_s < last_s and part.more
    tokens = len(look.tokens) * (1 if look.way == "video" else len(part.refs))
    sampling = Sampling(part.refs, look.central, start_s, part.end_s, part.of_frames, tokens, cut)
    return SeenClip(model, look, sampling, part.health)


@dataclass(frozen=True, eq=False)
class _Part:
    refs: tuple[FrameRef, ...]
    pixels: tuple[Bytes, ...]
    end_s: float
    of_frames: int
    more: bool
    """Whether there are frames behind it."""
    health: ClipHealth | None


def _from_file(path: Path, start_s: float, stop_s: float, most: int, most_side: int | None) -> _Part:
    sampler = SpreadSampler[tuple[FrameRef, Bytes]](most)
    count, end_s, more = 0, start_s, False
    with Clip.open(path) as clip:

        def held(ref: FrameRef) -> tuple[FrameRef, Bytes]:
            return ref, clip.bgr() if most_side is None else halved(clip.bgr(), most_side)

        while (tick := clip.advance()) is not None:
            if tick.time_s >= stop_s:
                more = True
                break
            if tick.time_s >= start_s:
                ref = FrameRef(tick.index, tick.time_s)
                sampler.offer(tick.time_s, partial(held, ref))
                count, end_s = count + 1, clip.end_s
        chosen = sampler.chosen()
        if not chosen:
            raise InputError(f"{path}: no frames from {start_s:g} s on; the clip ends at {clip.end_s:.1f} s")
        refs, pixels = tuple(ref for ref, _ in chosen), tuple(each for _, each in chosen)
        return _Part(refs, pixels, min(end_s, stop_s), count, more, clip.health)


def _from_memory(frames: Frames, start_s: float, stop_s: float, most: int, fps: float | None) -> _Part:
    rate = 25.0 if fps is None else fps
    if not 0 < rate <= 1000:
        raise InputError(f"fps must be above 0 and at most 1000, got {fps}")
    inside = [index for index in range(len(frames)) if start_s <= index / rate < stop_s]
    if not inside:
        raise InputError(f"no frames from {start_s:g} s on; {len(frames)} frames were given, {rate:g} a second")
    refs = tuple(FrameRef(index, index / rate) for index in evenly(inside, min(most, len(inside))))
    end_s = (inside[-1] + 1) / rate
    return _Part(refs, tuple(frames[ref.index] for ref in refs), end_s, len(inside), inside[-1] + 1 < len(frames), None)


__all__ = ["MAX_FRAMES", "Look", "SeenClip", "Way", "encode_video", "evenly", "frames_wanted", "held_side", "look_at"]
