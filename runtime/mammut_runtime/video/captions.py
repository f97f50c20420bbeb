"""Scenes to cues: the loop behind `Model.caption_video`, streamed, with memory that does not grow with the clip.

While one scene is described, the next one is already being decoded, in a thread of its own. The result does not depend
on that: scenes come in order, and each is encoded on its own.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.video.cues import Cue, MergeRule, merged
from mammut_runtime.video.decode import Clip
from mammut_runtime.video.encode import held_side, look_at
from mammut_runtime.video.sampler import MAX_FRAMES
from mammut_runtime.video.scenes import Scene, SceneRule, scenes

T = TypeVar("T")

_SCENES_AHEAD = 2
_FRAMES_AS_PICTURES = 3


@dataclass(frozen=True)
class VideoCaptionOptions:
    """How a clip is captioned. Raises InputError for values out of range."""

    scenes: SceneRule = field(default_factory=SceneRule)
    frames_per_scene: int | None = None
    """Frames of a scene that are looked at, spread evenly. None: as many as the bundle's `video` graph takes; without
    that graph 3, of which the most central one is described."""
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    merge: MergeRule = field(default_factory=MergeRule)

    def __post_init__(self) -> None:
        if self.frames_per_scene is not None and not 1 <= self.frames_per_scene <= MAX_FRAMES:
            raise InputError(f"frames_per_scene must be from 1 to {MAX_FRAMES}, got {self.frames_per_scene}")


def caption_video(
    model: Model,
    path: str | Path,
    options: VideoCaptionOptions | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> Iterator[Cue]:
    """See `Model.caption_video`."""
    options = options or VideoCaptionOptions()
    last_s = math.inf if end_s is None else end_s
    if not 0 <= start_s < last_s:
        raise InputError(f"expected 0 <= start_s < end_s, got {start_s} and {end_s}")
    with Clip.open(path) as clip:
        cue = None
        for cue in merged(caption_scenes(model, clip, options, (), start_s, last_s), options.merge):
            yield cue
        if cue is None:
            raise InputError(f"{path}: no frames from {start_s:g} s on; the clip ends at {clip.end_s:.1f} s")


def caption_scenes(
    model: Model,
    clip: Clip,
    options: VideoCaptionOptions,
    known: Sequence[Cue] = (),
    start_s: float = 0.0,
    end_s: float = math.inf,
) -> Iterator[Cue]:
    """A cue for each scene, in order.

    known: cues of the first scenes, made before with the same clip, bundle and options; they are not computed again.
    Raises InputError if they are of other scenes.
    """
    count = frames_per_scene(model, options)
    found = scenes(clip, options.scenes, count, start_s, end_s, most_side=held_side(model))
    other = InputError(
        f"{clip.info.path}: its scenes are not those that were captioned before; begin anew with --overwrite"
    )
    count = 0
    for number, scene in enumerate(ahead(found, _SCENES_AHEAD)):
        count += 1
        if number >= len(known):
            yield describe(model, scene, options.caption)
        elif (known[number].start_ms, known[number].end_ms, known[number].frames) == _place(scene):
            yield known[number]
        else:
            raise other
    if count < len(known):
        raise other


def frames_per_scene(model: Model, options: VideoCaptionOptions) -> int:
    """How many frames of a scene are looked at with these options."""
    if options.frames_per_scene is not None:
        return options.frames_per_scene
    return model.manifest.model.video_frames if model.watches else _FRAMES_AS_PICTURES


def describe(model: Model, scene: Scene, options: CaptionOptions) -> Cue:
    """A scene's cue."""
    look = look_at(model, scene.pixels)
    seen = model.see(look.tokens, look.embedding)
    (memory,) = model._memories([seen])
    caption = seen.caption(options)
    each = model.captioner.token_probabilities(memory, caption.ids, options)
    return Cue(
        *_place(scene)[:2],
        caption.text,
        _rounded(math.exp(min(0.0, caption.score))),
        caption.ids,
        tuple(_rounded(min(1.0, one)) for one in each),
        scene.frames,
        look.central,
        scene.of_frames,
    )


def _place(scene: Scene) -> tuple[int, int, tuple[object, ...]]:
    return scene.start_ms, scene.end_ms, scene.frames


def _rounded(probability: float) -> float:
    """Four digits: more would be arithmetic noise, which differs with the number of threads."""
    return round(probability, 4)


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, up to `count` of them made beforehand by a thread. Its errors are raised here, in their place.

    The thread has ended when this generator has, however that comes about.
    """
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(count)
    stop = threading.Event()

    def offer(kind: str, value: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                offer("item", item)
                if stop.is_set():
                    return
            offer("end", None)
        except BaseException as problem:
            offer("error", problem)

    thread = threading.Thread(target=work, name="scenes", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if isinstance(value, BaseException) and kind == "error":
                raise value
            yield value  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


__all__ = ["VideoCaptionOptions", "ahead", "caption_scenes", "caption_video", "describe", "frames_per_scene"]
