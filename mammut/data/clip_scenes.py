"""Clips put together from drawings that move over a photograph: what happens in them is known exactly.

Every clip is of one kind: something moves in a direction, slowly or fast; one of two things moves; things come or go
one after the other; one appears or disappears; one passes behind or in front of another; several are to be counted. A
caption, texts to match and questions follow by templates. All of it is synthetic, and called so where it is reported.

Answers are drawn first and evenly. Where things stand in the middle frame is drawn without a look at the answer, so
that this frame alone tells nothing but how many things there are: what moves, and where to, comes from the others. In
a third of the clips the camera drifts a little, by less than anything moves that is said to move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from mammut.data.scenes import NUMBERS, Drawing, with_article
from mammut_runtime.errors import InputError

Bytes = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

CLIP_KINDS = ("direction", "still", "order", "appearing", "passing", "count")
KIND_SHARES = (0.2, 0.25, 0.15, 0.1, 0.15, 0.15)
"""How often each of CLIP_KINDS is made where none is asked for."""
CLIP_QUESTION_KINDS = (
    "direction", "speed", "moving", "which moves", "order", "appearing", "passing", "count moving", "count",
)  # fmt: skip
"""All but the last are at chance for who sees the middle frame only."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps in x and y; y grows downwards."""
SLOW, FAST, PLAIN, SHORT = (0.10, 0.16), (0.36, 0.44), (0.18, 0.30), (0.12, 0.18)
"""Least and most way over a whole clip, as shares of the picture's side; the last two where nobody asks how fast."""
DRIFT = (0.02, 0.04)
"""Of the camera, likewise."""
LEAST_FRAMES = 12
"""For things that come one after the other before the middle."""


@dataclass(frozen=True, eq=False)
class Thing:
    """Something in a clip."""

    name: str
    vendor: str
    boxes: F32
    """float32[F, 4]: x0, y0, x1, y1 in pixels, all inside the picture; NaN in frames in which it is not there."""

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        """bool[F]."""
        return ~np.isnan(self.boxes[:, 0])


@dataclass(frozen=True, eq=False)
class ClipScene:
    """A clip and everything true about it that can be worded."""

    frames: Bytes
    """uint8[F, S, S, 3] RGB."""
    kind: str
    """One of CLIP_KINDS."""
    things: tuple[Thing, ...]
    """From back to front."""
    captions: tuple[str, ...]
    matches: tuple[str, ...]
    questions: tuple[tuple[str, str, str], ...]
    """(kind, question, answer); kind is one of CLIP_QUESTION_KINDS."""

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """(question, answer), as training takes them."""
        return tuple((question, answer) for _, question, answer in self.questions)


def compose_clip(
    rng: np.random.Generator,
    drawings: Sequence[Drawing],
    background: Bytes,
    frames: int = 16,
    size: int = 96,
    kind: str | None = None,
) -> ClipScene:
    """A clip of `frames` pictures of size x size pixels.

    Args:
        rng: decides everything.
        drawings: what may be in it; at least four names that are no plurals.
        background: uint8[H, W, 3] RGB; a random part of it is used.
        kind: one of CLIP_KINDS; None: any, by KIND_SHARES.

    Raises:
        InputError: too few frames or drawings, or an unknown kind.
    """
    if frames < LEAST_FRAMES or size < 32:
        raise InputError(f"clips: expected at least {LEAST_FRAMES} frames of 32 pixels, got {frames} of {size}")
    if kind is not None and kind not in CLIP_KINDS:
        raise InputError(f"clips: unknown kind {kind!r}; expected one of {', '.join(CLIP_KINDS)}")
    stage = _Stage(rng, drawings, frames, size)
    made = kind or str(rng.choice(CLIP_KINDS, p=KIND_SHARES))
    plan = _PLANS[made](stage)
    plain = stage.chance(0.1)
    # Nobody sees the camera drift before a plain colour: what stands would seem to move.
    camera = np.zeros((frames, 2), np.int64) if plain else stage.camera()
    pixels = stage.plain_backdrop() if plain else stage.backdrop(background, camera)
    things = tuple(stage.drawn(actor, pixels, camera) for actor in plan.actors)
    # One factor for the whole clip: evening, noon.
    column = pixels.reshape(frames * size, size, 3)
    cv2.convertScaleAbs(column, column, rng.uniform(0.75, 1.2))
    return ClipScene(pixels, made, things, (plan.caption,), (plan.caption, f"a clip: {plan.caption}"), plan.questions)


@dataclass(eq=False)
class _Actor:
    """A thing before it is drawn."""

    drawing: Drawing
    ink: npt.NDArray[np.uint16]
    """uint16[h, w, 3]: colours multiplied by how opaque they are."""
    clear: npt.NDArray[np.uint16]
    """uint16[h, w, 1]: 255 where the background is seen."""
    centre: F64
    """float64[F, 2]: x, y in the world, which the camera looks at."""
    there: npt.NDArray[np.bool_]

    @property
    def name(self) -> str:
        return self.drawing.name

    @property
    def half(self) -> F64:
        """float64[2]: of width and height."""
        return np.array([self.ink.shape[1], self.ink.shape[0]]) / 2


@dataclass(frozen=True)
class _Plan:
    actors: Sequence[_Actor]
    """From back to front."""
    caption: str
    questions: tuple[tuple[str, str, str], ...]


class _Stage:
    """What all kinds of clips are made with."""

    def __init__(self, rng: np.random.Generator, drawings: Sequence[Drawing], frames: int, size: int) -> None:
        self.rng, self.drawings, self.frames, self.size = rng, drawings, frames, size
        self.middle = frames // 2
        self.margin = math.ceil(DRIFT[1] * size * self.middle / (frames - 1)) + 1
        """What the camera may move to either side, pixels."""

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def actors(self, number: int, least: float, most: float, different: bool = True) -> list[_Actor]:
        """Things whose longer side is this share of the picture's, all through the clip in the middle."""
        found: dict[str, Drawing] = {}
        for _ in range(100 * number):
            one = self.drawings[int(self.rng.integers(len(self.drawings)))]
            if with_article(one.name) == one.name:
                continue  # glasses: the texts here have their verbs in the singular
            found.setdefault(one.name, one)
            if len(found) == number or not different:
                break
        chosen = list(found.values()) if different else list(found.values()) * number
        if len(chosen) < number:
            raise InputError(f"clips: expected drawings of {number} different things or more, got {len(found)}")
        return [self._actor(one, self.size * self.rng.uniform(least, most)) for one in chosen]

    def _actor(self, drawing: Drawing, side: float) -> _Actor:
        height, width = drawing.pixels.shape[:2]
        w, h = (max(4, round(side * length / max(height, width))) for length in (width, height))
        red, green, blue, alpha = cv2.split(drawing.pixels)
        # Multiplied before it is made smaller: else the colours of what is transparent bleed into the edges.
        solid = cv2.merge([*(cv2.multiply(each, alpha, scale=1 / 255) for each in (red, green, blue)), alpha])
        sized = cv2.resize(solid, (w, h), interpolation=cv2.INTER_AREA if w < width else cv2.INTER_LINEAR)
        ink, clear = sized[:, :, :3].astype(np.uint16) * 255, 255 - sized[:, :, 3:].astype(np.uint16)
        at = np.full((self.frames, 2), self.size / 2)
        return _Actor(drawing, ink, clear, at, np.ones(self.frames, np.bool_))

    def place(self, actors: Sequence[_Actor], way: Sequence[float]) -> None:
        """Put them apart for the middle frame, where each may also go its way (a share of the side) to any side."""
        reach = np.array(way)[:, None] * self.size * self.middle / (self.frames - 1)
        half = np.stack([actor.half for actor in actors])
        low = np.minimum(half + self.margin + reach, self.size / 2)
        spots = low + (self.size - 2 * low) * self.rng.random((64, len(actors), 2))
        gaps = np.full(64, np.inf)
        for i in range(len(actors)):
            for j in range(i):
                apart = np.abs(spots[:, i] - spots[:, j]) - half[i] - half[j]
                gaps = np.minimum(gaps, apart.max(axis=1))
        best = int(np.argmax(gaps >= 1)) if (gaps >= 1).any() else int(np.argmax(gaps))
        for actor, spot in zip(actors, spots[best], strict=True):
            actor.centre[:] = spot

    def place_in_quarters(self, actors: Sequence[_Actor], way: float) -> None:
        """The same for up to four, each in a quarter of the picture of its own."""
        reach = way * self.size * self.middle / (self.frames - 1)
        for actor, quarter in zip(actors, self.rng.permutation(4), strict=False):
            room = np.maximum(0.0, (self.size - 2 * self.margin) / 4 - actor.half - reach)
            middle = self.size / 2 + (np.array(divmod(int(quarter), 2)) - 0.5) * (self.size / 2 - self.margin)
            actor.centre[:] = middle + room * self.rng.uniform(-1, 1, 2)

    def move(self, actor: _Actor, direction: str, way: tuple[float, float]) -> None:
        """Evenly, so that it is where it stood in the middle frame."""
        step = np.array(DIRECTIONS[direction]) * self.rng.uniform(*way) * self.size / (self.frames - 1)
        actor.centre += (np.arange(self.frames) - self.middle)[:, None] * step

    def shuffled(self, actors: Sequence[_Actor]) -> list[_Actor]:
        """In a random order: who is in front is random, and so is who is named first."""
        return [actors[int(i)] for i in self.rng.permutation(len(actors))]

    def camera(self) -> npt.NDArray[np.int64]:
        """int64[F, 2]: by how many pixels everything is shifted in each frame; not in the middle one."""
        angle, way = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(*DRIFT) * self.size
        if not self.chance(1 / 3):
            way = 0.0
        shares = (np.arange(self.frames) - self.middle) / (self.frames - 1)
        shifts: npt.NDArray[np.int64] = np.rint(
            way * shares[:, None] * np.array([math.cos(angle), math.sin(angle)])
        ).astype(np.int64)
        return shifts

    def plain_backdrop(self) -> Bytes:
        """uint8[F, S, S, 3]: one colour."""
        return np.tile(self.rng.integers(0, 256, 3).astype(np.uint8), (self.frames, self.size, self.size, 1))

    def backdrop(self, photo: Bytes, camera: npt.NDArray[np.int64]) -> Bytes:
        """uint8[F, S, S, 3]: a random square part, mirrored half of the time, as the camera sees it."""
        side = self.size + 2 * self.margin
        height, width = photo.shape[:2]
        least = min(height, width)
        own = int(self.rng.integers(max(1, least * 2 // 3), least + 1))
        top, left = int(self.rng.integers(0, height - own + 1)), int(self.rng.integers(0, width - own + 1))
        part = photo[top : top + own, left : left + own]
        if self.chance():
            part = part[:, ::-1]
        world = cv2.resize(
            np.ascontiguousarray(part), (side, side), interpolation=cv2.INTER_AREA if own > side else cv2.INTER_LINEAR
        )
        pixels = np.empty((self.frames, self.size, self.size, 3), np.uint8)
        for frame, (x, y) in enumerate(self.margin - camera):
            pixels[frame] = world[y : y + self.size, x : x + self.size]
        return pixels

    def drawn(self, actor: _Actor, pixels: Bytes, camera: npt.NDArray[np.int64]) -> Thing:
        """Lay it over the frames in which it is there."""
        height, width = actor.ink.shape[:2]
        corners = np.rint(actor.centre - actor.half).astype(np.int64) + camera
        corners = np.clip(corners, 0, [self.size - width, self.size - height])
        for frame in np.flatnonzero(actor.there):
            x, y = corners[frame]
            under = pixels[frame, y : y + height, x : x + width]
            under[:] = (actor.ink + under * actor.clear + np.uint16(127)) // np.uint16(255)
        boxes = np.hstack([corners, corners + np.array([width, height])]).astype(np.float32)
        boxes[~actor.there] = np.nan
        return Thing(actor.name, actor.drawing.vendor, boxes)


# --- the kinds -------------------------------------------------------------------------------------------------


def _direction(stage: _Stage) -> _Plan:
    """One thing moves, slowly or fast; half of the time another stands by."""
    actors = stage.actors(2 if stage.chance() else 1, 0.20, 0.30)
    mover, by = actors[0], actors[1:]
    stage.place(actors, [FAST[1], *[0.0] * len(by)])
    direction, fast = stage.one_of(tuple(DIRECTIONS)), stage.chance()
    stage.move(mover, direction, FAST if fast else SLOW)
    caption = f"{with_article(mover.name)} moves {'fast' if fast else 'slowly'} {_to(direction)}{_standing(by)}"
    return _Plan(stage.shuffled(actors), caption, (
        _way(mover, direction), ("speed", f"is the {mover.name} slow or fast?", "fast" if fast else "slow"),
    ))  # fmt: skip


def _still(stage: _Stage) -> _Plan:
    """One of two moves."""
    actors = stage.actors(2, 0.18, 0.26)
    stage.place(actors, [PLAIN[1]] * 2)
    mover, other = actors
    direction = stage.one_of(tuple(DIRECTIONS))
    stage.move(mover, direction, PLAIN)
    about, answer = (mover, "yes") if stage.chance() else (other, "no")
    return _Plan(
        stage.shuffled(actors),
        f"{with_article(mover.name)} moves {_to(direction)}{_standing([other])}",
        (
            ("moving", f"does the {about.name} move?", answer),
            ("which moves", f"which moves, {_either(stage.shuffled(actors))}?", mover.name),
            _way(mover, direction),
        ),
    )


def _order(stage: _Stage) -> _Plan:
    """Two things come one after the other, or go so. In the middle both are there."""
    actors, middle = stage.actors(2, 0.22, 0.36), stage.middle
    stage.place(actors, [0.0, 0.0])
    apart = max(1, round(0.35 * middle))
    come = stage.chance()
    first_at = int(stage.rng.integers(1, middle - apart))
    second_at = int(stage.rng.integers(first_at + apart, middle))
    for actor, at in zip(actors, (first_at, second_at), strict=True):
        if come:
            actor.there[:at] = False
        else:
            actor.there[middle + at :] = False
    verb = "appears" if come else "disappears"
    first, then = actors
    return _Plan(
        stage.shuffled(actors),
        f"{with_article(first.name)} {verb}, then {with_article(then.name)}",
        (("order", f"which {verb} first, {_either(stage.shuffled(actors))}?", first.name),),
    )


def _appearing(stage: _Stage) -> _Plan:
    """One appears or disappears, before the middle or after; half of the time another stays."""
    actors = stage.actors(2 if stage.chance() else 1, 0.24, 0.40)
    stage.place(actors, [0.0] * len(actors))
    one, by, middle = actors[0], actors[1:], stage.middle
    early, appears = stage.chance(), stage.chance()
    at = int(stage.rng.integers(2, middle + 1) if early else stage.rng.integers(middle + 1, stage.frames - 1))
    one.there[slice(None, at) if appears else slice(at, None)] = False
    verb = "appears" if appears else "disappears"
    return _Plan(
        stage.shuffled(actors),
        f"{with_article(one.name)} {verb}{_standing(by)}",
        (("appearing", f"does the {one.name} appear or disappear?", verb),),
    )


def _passing(stage: _Stage) -> _Plan:
    """One passes behind or in front of another, before the middle or after it; in the middle frame they are apart."""
    actors = stage.actors(2, 0.20, 0.28)
    mover, other = actors
    axis, sign = int(stage.rng.integers(2)), 1 if stage.chance() else -1
    away = mover.half[axis] + other.half[axis] + 2
    spot = np.empty(2)
    for each, edge in ((axis, away + mover.half[axis]), (1 - axis, max(other.half[1 - axis], mover.half[1 - axis]))):
        low = min(edge + stage.margin, stage.size / 2)
        spot[each] = stage.rng.uniform(low, stage.size - low)
    other.centre[:] = spot
    late, frames, middle = stage.chance(), stage.frames, stage.middle
    at = np.arange(frames)
    progress = np.clip((at - middle) / (frames - 1 - middle), 0, 1) if late else np.clip(at / middle, 0, 1)
    mover.centre[:] = spot
    mover.centre[:, axis] += sign * away * (2 * progress - 1)
    beside = stage.rng.uniform(-0.2, 0.2) * other.half[1 - axis]
    low = mover.half[1 - axis] + stage.margin
    mover.centre[:, 1 - axis] = np.clip(spot[1 - axis] + beside, low, stage.size - low)
    behind = stage.chance()
    return _Plan(
        [mover, other] if behind else [other, mover],
        f"{with_article(mover.name)} passes {'behind' if behind else 'in front of'} {with_article(other.name)}",
        ((
            "passing", f"does the {mover.name} pass behind or in front of the {other.name}?",
            "behind" if behind else "in front",
        ),),
    )  # fmt: skip


def _count(stage: _Stage) -> _Plan:
    """One to four things of which some move. How many move is asked only where three or four are there, and drawn
    without a look at how many."""
    motion = stage.chance()
    number = int(stage.rng.integers(3, 5) if motion else stage.rng.integers(1, 5))
    moving = int(stage.rng.integers(0, 4) if motion else stage.rng.integers(0, number + 1))
    actors = stage.actors(number, 0.16, 0.24, different=stage.chance())
    stage.place_in_quarters(actors, SHORT[1])
    for actor in actors[:moving]:
        stage.move(actor, stage.one_of(tuple(DIRECTIONS)), SHORT)
    things = "thing" if number == 1 else "things"
    said = NUMBERS[moving] if moving else "none"
    asked = [("count moving", "how many things move?", said)] if motion else [
        ("count", "how many things are there?", NUMBERS[number])
    ]  # fmt: skip
    return _Plan(stage.shuffled(actors), f"{NUMBERS[number]} {things}, {said} moving", tuple(asked))


_PLANS: dict[str, Callable[[_Stage], _Plan]] = {
    "direction": _direction, "still": _still, "order": _order, "appearing": _appearing, "passing": _passing,
    "count": _count,
}  # fmt: skip


def _to(direction: str) -> str:
    return f"to the {direction}" if direction in ("left", "right") else direction


def _standing(others: Sequence[_Actor]) -> str:
    return "".join(f", {with_article(each.name)} stands still" for each in others)


def _either(two: Sequence[_Actor]) -> str:
    return f"the {two[0].name} or the {two[1].name}"


def _way(mover: _Actor, direction: str) -> tuple[str, str, str]:
    return ("direction", f"which way does the {mover.name} move?", direction)
