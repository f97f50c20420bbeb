"""Scenes put together from drawings and a photograph: where everything is, is known exactly.

A scene has one to four things on a background, with their boxes; captions, texts to match and questions follow from
them by templates. All of it is synthetic, and is called so wherever it is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "brown", "black", "white")
_OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
_WHERE = {"to the left of": "on the left", "to the right of": "on the right", "above": "at the top",
          "below": "at the bottom"}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four")
_PLURALS = {"mouse": "mice", "fish": "fish", "glasses": "glasses", "jeans": "jeans", "scissors": "scissors",
            "sheep": "sheep", "wolf": "wolves", "maple leaf": "maple leaves"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Drawing:
    """A thing to place."""

    name: str
    """Without an article: "red apple"."""
    vendor: str
    """Who drew it."""
    pixels: Bytes
    """uint8[H, W, 4] RGBA, cut to what is not transparent."""

    @property
    def colour(self) -> str | None:
        """The colour its name begins with."""
        first = self.name.split()[0]
        return first if first in COLOURS and " " in self.name else None

    @property
    def thing(self) -> str:
        """The name without its colour."""
        return self.name.partition(" ")[2] if self.colour else self.name


@dataclass(frozen=True)
class Placed:
    """A thing in a scene."""

    name: str
    vendor: str
    box: Box
    """x0, y0, x1, y1 in pixels; all of it is inside the scene."""
    colour: str | None

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and everything true about it that can be worded."""

    pixels: Bytes
    """uint8[S, S, 3] RGB."""
    placed: tuple[Placed, ...]
    """From back to front."""
    captions: tuple[str, ...]
    matches: tuple[str, ...]
    """The first one says what is there, in the order from left to right."""
    questions: tuple[tuple[str, str, str], ...]
    """(kind, question, answer); kind is one of QUESTION_KINDS."""


QUESTION_KINDS = ("presence", "count", "colour", "where", "side", "relation yes/no", "other", "what")
"""where: of a thing; side: what is on one. other: "what is above the owl?" of two things, which who knows both names
can answer without seeing how they stand."""


def compose(rng: np.random.Generator, drawings: Sequence[Drawing], background: Bytes, size: int) -> Scene:
    """A scene of size x size pixels.

    Args:
        rng: decides everything.
        drawings: what may be placed; at least two names.
        background: uint8[H, W, 3] RGB, no smaller than the scene is wide; a random part of it is used.
    """
    chosen = _choose(rng, drawings)
    canvas = _background(rng, background, size)
    taken: list[Box] = []
    placed: list[Placed] = []
    for drawing in chosen:
        box = _place(rng, drawing, taken, size, len(chosen))
        if box is None:
            continue
        paste(canvas, drawing.pixels, box)
        taken.append(box)
        placed.append(Placed(drawing.name, drawing.vendor, box, drawing.colour))
    light = rng.uniform(0.75, 1.2)
    pixels = np.clip(canvas.astype(np.float32) * light, 0, 255).astype(np.uint8)
    captions, matches = _captions(rng, placed, size)
    return Scene(pixels, tuple(placed), captions, matches, _questions(rng, placed, drawings, size))


def paste(canvas: Bytes, drawing: Bytes, box: Box) -> None:
    """Lay an RGBA drawing over part of the canvas, in place. The box is whole pixels and may reach over the edges."""
    x0, y0, x1, y1 = (round(v) for v in box)
    shrinks = (x1 - x0) < drawing.shape[1]
    sized = cv2.resize(drawing, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    height, width = canvas.shape[:2]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left >= right or top >= bottom:
        return
    part = sized[top - y0 : bottom - y0, left - x0 : right - x0].astype(np.uint16)
    alpha = part[:, :, 3:]
    under = canvas[top:bottom, left:right]
    canvas[top:bottom, left:right] = (part[:, :, :3] * alpha + under * (255 - alpha) + 127) // 255


def trimmed(rgba: Bytes) -> Bytes:
    """Without its transparent edges; itself where nothing of it can be seen."""
    seen = rgba[:, :, 3] > 16
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if not len(rows):
        return rgba
    return np.ascontiguousarray(rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def with_article(name: str) -> str:
    """ "an owl", "a dog"; plurals stay bare."""
    if _PLURALS.get(name) == name and name != "fish":
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith('uni') else 'a'} {name}"


def plural(name: str) -> str:
    """ "two ..." """
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh", "mango", "potato", "tomato", "volcano")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


# --- choosing and placing ------------------------------------------------------------------------------------


def _choose(rng: np.random.Generator, drawings: Sequence[Drawing]) -> list[Drawing]:
    """One to four drawings: different things, or one thing several times (a quarter of the scenes)."""
    if rng.random() < 0.25:
        one = drawings[int(rng.integers(len(drawings)))]
        return [one] * int(rng.integers(2, 5))
    number = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.45, 0.2, 0.1]))
    number = min(number, len({drawing.name for drawing in drawings}))
    found: dict[str, Drawing] = {}
    while len(found) < number:
        one = drawings[int(rng.integers(len(drawings)))]
        found.setdefault(one.name, one)
    return list(found.values())


def _place(rng: np.random.Generator, drawing: Drawing, taken: list[Box], size: int, number: int) -> Box | None:
    """A box that covers no more than a seventh of any other, or None where no room was found."""
    height, width = drawing.pixels.shape[:2]
    largest = {1: 0.85, 2: 0.55, 3: 0.45, 4: 0.4}[number]
    for attempt in range(40):
        side = size * rng.uniform(0.25, max(0.27, largest * (1 - attempt / 80)))
        w, h = (max(4, round(side * length / max(height, width))) for length in (width, height))
        x, y = int(rng.integers(0, size - w + 1)), int(rng.integers(0, size - h + 1))
        box = (float(x), float(y), float(x + w), float(y + h))
        if all(_overlap(box, other) < 0.14 for other in taken):
            return box
    return None


def _overlap(a: Box, b: Box) -> float:
    """The common area as a share of the smaller box."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((each[2] - each[0]) * (each[3] - each[1]) for each in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller


def _background(rng: np.random.Generator, photo: Bytes, size: int) -> Bytes:
    """A random square part, mirrored half of the time, or a plain colour (a fifth)."""
    if rng.random() < 0.2:
        return np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8)
    height, width = photo.shape[:2]
    side = int(rng.integers(min(size, height, width) * 2 // 3, min(height, width) + 1))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    part = photo[top : top + side, left : left + side]
    sized = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    return np.ascontiguousarray(sized[:, ::-1] if rng.random() < 0.5 else sized)


# --- wording -------------------------------------------------------------------------------------------------


def relation(a: Placed, b: Placed, size: int) -> str | None:
    """How a stands to b, where that is plain to see: "to the left of", "to the right of", "above", "below"."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if abs(dx) > max(0.2 * size, 1.3 * abs(dy)):
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) > max(0.2 * size, 1.3 * abs(dx)):
        return "above" if dy < 0 else "below"
    return None


def _counted(placed: Sequence[Placed]) -> dict[str, int]:
    """Names from left to right, and how often each is there."""
    counts: dict[str, int] = {}
    for each in sorted(placed, key=lambda one: one.centre):
        counts[each.name] = counts.get(each.name, 0) + 1
    return counts


def _captions(rng: np.random.Generator, placed: Sequence[Placed], size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parts = [with_article(n) if c == 1 else f"{NUMBERS[c]} {plural(n)}" for n, c in _counted(placed).items()]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    if len(placed) != 2 or len(parts) != 2:
        return (listed,), (listed,)
    both = relation_captions((placed[0], placed[1]), size)
    order = rng.permutation(2)
    return ((both[int(order[0])],) if both else (listed,)), (listed,)


def relation_captions(placed: tuple[Placed, Placed], size: int) -> tuple[str, ...]:
    """ "a key above an owl" and "an owl below a key", of different things that stand plainly to each other; else
    nothing."""
    first, second = placed
    stands = relation(first, second, size)
    if stands is None:
        return ()
    one, other = with_article(first.name), with_article(second.name)
    return f"{one} {stands} {other}", f"{other} {_OPPOSITE[stands]} {one}"


def _questions(
    rng: np.random.Generator, placed: Sequence[Placed], drawings: Sequence[Drawing], size: int
) -> tuple[tuple[str, str, str], ...]:
    """About as many of each kind as there is to ask; as many yes as no."""
    counts = _counted(placed)
    names = list(counts)
    asked = [("presence", f"is there {with_article(str(rng.choice(names)))}?", "yes")]
    absent = drawings[int(rng.integers(len(drawings)))].name
    if absent not in counts:
        asked.append(("presence", f"is there {with_article(absent)}?", "no"))
    asked.append(("count", "how many things are there?", NUMBERS[len(placed)]))
    name = str(rng.choice(names))
    asked.append(("count", f"how many {plural(name)} are there?", NUMBERS[counts[name]]))
    asked += _colour_questions(placed)
    asked += _relation_questions(rng, placed, size)
    if len(names) == 1:
        asked.append(("what", "what is in the picture?", names[0]))
    return tuple(asked)


def _colour_questions(placed: Sequence[Placed]) -> list[tuple[str, str, str]]:
    """Where only one colour of the thing is there."""
    colours: dict[str, set[str]] = {}
    for each in placed:
        if each.colour:
            colours.setdefault(each.name.partition(" ")[2], set()).add(each.colour)
    return [("colour", f"what color is the {t}?", next(iter(c))) for t, c in colours.items() if len(c) == 1]


def _relation_questions(rng: np.random.Generator, placed: Sequence[Placed], size: int) -> list[tuple[str, str, str]]:
    """Of two different things that stand plainly to each other."""
    if len(placed) < 2 or len({each.name for each in placed}) != len(placed):
        return []
    first, second = (placed[i] for i in rng.permutation(len(placed))[:2])
    stands = relation(first, second, size)
    if stands is None:
        return []
    said = stands if rng.random() < 0.5 else _OPPOSITE[stands]
    answer = "yes" if said == stands else "no"
    found = [("relation yes/no", f"is the {first.name} {said} the {second.name}?", answer)]
    if len(placed) == 2:
        found.append(("other", f"what is {stands} the {second.name}?", first.name))
        found.append(("side", f"what is {_WHERE[stands]}?", first.name))
        found.append(("where", f"where is the {first.name}?", _WHERE[stands]))
    return found
