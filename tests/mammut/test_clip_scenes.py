"""What is said about a clip is what its pixels show, and its middle frame does not give it away."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.data.clip_scenes import (
    CLIP_KINDS,
    CLIP_QUESTION_KINDS,
    DIRECTIONS,
    DRIFT,
    FAST,
    SLOW,
    ClipScene,
    Thing,
    compose_clip,
)
from mammut.data.scenes import Drawing
from mammut_runtime.errors import InputError

GREY = np.full((128, 128, 3), 90, np.uint8)
SIZE, FRAMES = 96, 16
INKS = {"dog": (200, 0, 0), "owl": (0, 200, 0), "car": (0, 0, 200), "key": (200, 200, 0), "bus": (200, 0, 200)}


def solid(name: str, ink: tuple[int, int, int]) -> Drawing:
    """A plain rectangle, so that it can be found by its colour."""
    return Drawing(name, "test", np.broadcast_to(np.array([*ink, 255], np.uint8), (60, 80, 4)).copy())


DRAWINGS = [solid(name, ink) for name, ink in INKS.items()]


def clip_of(seed: int, kind: str | None = None, photo: npt.NDArray[np.uint8] = GREY) -> ClipScene:
    return compose_clip(np.random.default_rng(seed), DRAWINGS, photo, FRAMES, SIZE, kind)


def found(clip: ClipScene, thing: Thing) -> npt.NDArray[np.bool_]:
    """bool[F, S, S]: where a thing of this colour is seen, whatever the light."""
    ratio = np.array(INKS[thing.name], np.float64) > 0
    pixels = clip.frames.astype(np.float64)
    lit, dark = pixels[..., ratio].min(axis=-1), pixels[..., ~ratio].max(axis=-1)
    shown: npt.NDArray[np.bool_] = (lit > 100) & (dark < 10)
    return shown


def seen(clip: ClipScene, thing: Thing) -> npt.NDArray[np.bool_]:
    """bool[F]: in which frames any of it is seen."""
    return np.array([bool(frame.any()) for frame in found(clip, thing)])


def centres(clip: ClipScene, thing: Thing) -> npt.NDArray[np.float64]:
    """float64[F, 2]: x, y of what is seen of it, NaN where nothing is."""
    shown = found(clip, thing)
    rows = []
    for frame in shown:
        y, x = np.nonzero(frame)
        rows.append((x.mean(), y.mean()) if len(x) else (np.nan, np.nan))
    return np.array(rows)


def the(clip: ClipScene, name: str) -> Thing:
    return next(thing for thing in clip.things if thing.name == name)


def asked(clip: ClipScene, kind: str) -> list[tuple[str, str]]:
    return [(question, answer) for own, question, answer in clip.questions if own == kind]


def named(clip: ClipScene, question: str) -> Thing:
    """The first thing a question names."""
    return min((t for t in clip.things if t.name in question), key=lambda t: question.find(t.name))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(CLIP_KINDS))
def test_boxes_are_inside_and_hold_what_is_seen(seed: int, kind: str) -> None:
    clip = clip_of(seed, kind)
    assert clip.frames.shape == (FRAMES, SIZE, SIZE, 3) and clip.frames.dtype == np.uint8
    assert {own for own, _, _ in clip.questions} <= set(CLIP_QUESTION_KINDS)
    for thing in clip.things:
        boxes = thing.boxes[thing.there]
        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 4).all()
    if len({thing.name for thing in clip.things}) < len(clip.things):
        return  # equal things cannot be told apart by colour
    if any(found(clip, thing).mean(axis=(1, 2)).max() > 0.6 for thing in clip.things):
        return  # the plain background has a thing's colour
    for thing in clip.things:
        for shown, box, there in zip(found(clip, thing), thing.boxes, thing.there, strict=True):
            y, x = np.nonzero(shown)
            if not there:
                assert not len(x)
            elif len(x):
                assert x.min() >= box[0] and x.max() < box[2] and y.min() >= box[1] and y.max() < box[3]


@pytest.mark.parametrize("seed", range(30))
def test_the_direction_and_speed_are_those_of_the_pixels(seed: int) -> None:
    clip = clip_of(seed, "direction" if seed % 2 else "still")
    (question, answer), *_ = asked(clip, "direction")
    at = centres(clip, named(clip, question))
    at = at[~np.isnan(at[:, 0])]
    way = (at[-1] - at[0]) / SIZE
    said = np.array(DIRECTIONS[answer])
    assert way @ said > SLOW[0] / 2
    assert way @ said > abs(way @ said[::-1])  # control: not across
    for _, speed in asked(clip, "speed"):
        assert speed == ("fast" if way @ said > (SLOW[1] + FAST[0]) / 2 - DRIFT[1] else "slow")


@pytest.mark.parametrize("seed", range(20))
def test_what_stands_moves_with_the_camera_only(seed: int) -> None:
    clip = clip_of(seed, "still")
    boxes = {thing.name: thing.boxes[:, :2] for thing in clip.things}
    ways = {name: float(np.abs(box[-1] - box[0]).max()) / SIZE for name, box in boxes.items()}
    moving = max(ways, key=lambda name: ways[name])
    ((question, answer),) = asked(clip, "moving")
    assert answer == ("yes" if named(clip, question).name == moving else "no")
    assert asked(clip, "which moves")[0][1] == moving
    assert min(ways.values()) <= DRIFT[1] + 1 / SIZE < max(ways.values())


@pytest.mark.parametrize("seed", range(20))
def test_order_is_that_of_the_pixels(seed: int) -> None:
    clip = clip_of(seed, "order")
    ((question, answer),) = asked(clip, "order")
    shown = {thing.name: seen(clip, thing) for thing in clip.things}
    assert all(there[FRAMES // 2] for there in shown.values())
    counts = {name: int(there.sum()) for name, there in shown.items()}
    came = "appears" in question.split()
    assert all(there[-1] == came and there[0] != came for there in shown.values())
    assert answer == (max if came else min)(counts, key=lambda name: counts[name])
    assert len(set(counts.values())) == 2


@pytest.mark.parametrize("seed", range(20))
def test_appearing_is_seen(seed: int) -> None:
    clip = clip_of(seed, "appearing")
    ((question, answer),) = asked(clip, "appearing")
    shown = seen(clip, named(clip, question))
    assert answer == ("appears" if shown[-1] else "disappears") and shown[0] != shown[-1]
    assert np.count_nonzero(np.diff(shown)) == 1
    for other in clip.things:
        if other is not named(clip, question):
            assert seen(clip, other).all()


@pytest.mark.parametrize("seed", range(20))
def test_who_passes_behind_is_hidden(seed: int) -> None:
    clip = clip_of(seed, "passing")
    ((question, answer),) = asked(clip, "passing")
    mover = named(clip, question)
    other = next(thing for thing in clip.things if thing is not mover)
    areas = {thing.name: found(clip, thing).sum(axis=(1, 2)) for thing in clip.things}
    hidden = other if answer == "in front" else mover
    shown = mover if answer == "in front" else other
    assert areas[hidden.name].min() < 0.75 * areas[hidden.name].max()
    assert areas[shown.name].min() == areas[shown.name].max()
    middle = FRAMES // 2
    assert areas[hidden.name][middle] == areas[hidden.name].max()  # apart in the middle


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_the_boxes(seed: int) -> None:
    clip = clip_of(seed, "count")
    words = ("none", "one", "two", "three", "four")
    ways = [np.abs(thing.boxes[-1, :2] - thing.boxes[0, :2]).max() / SIZE for thing in clip.things]
    moved = sum(way > DRIFT[1] + 1.5 / SIZE for way in ways)
    for kind, _, answer in clip.questions:
        assert answer == words[len(clip.things) if kind == "count" else moved]
    boxes = [thing.boxes for thing in clip.things]
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            apart = np.maximum(one[:, :2] - two[:, 2:], two[:, :2] - one[:, 2:]).max(axis=1)
            assert (apart >= 0).all()


def test_answers_are_balanced() -> None:
    answers: dict[str, Counter[str]] = {}
    rng = np.random.default_rng(5)
    for _ in range(3000):
        clip = compose_clip(rng, DRAWINGS, GREY, 12, 32)
        for kind, question, answer in clip.questions:
            if kind in ("order", "which moves"):
                answer = "first" if named(clip, question).name == answer else "second"
            answers.setdefault(kind, Counter())[answer] += 1
    assert set(answers) == set(CLIP_QUESTION_KINDS)
    for kind, counts in answers.items():
        number, even = sum(counts.values()), 1 / len(counts)
        off = max(abs(count / number - even) for count in counts.values())
        assert off < 4 * (even * (1 - even) / number) ** 0.5, (kind, counts)


def _middle(thing: Thing) -> npt.NDArray[np.float32]:
    box = thing.boxes[FRAMES // 2]
    centre: npt.NDArray[np.float32] = (box[:2] + box[2:]) / 2
    return centre


def test_the_middle_frame_does_not_tell_the_answer() -> None:
    """Where a thing stands in the middle frame is spread alike whatever the answer is; control: not so at the end."""
    by_answer: dict[tuple[str, str], list[npt.NDArray[np.float32]]] = {}
    ends: dict[str, list[float]] = {}
    numbers: dict[str, list[int]] = {}
    rng = np.random.default_rng(1)
    for _ in range(4000):
        clip = compose_clip(rng, DRAWINGS, GREY, FRAMES, SIZE)
        for kind, question, answer in clip.questions:
            if kind in ("direction", "speed", "moving"):
                thing = named(clip, question)
                key = f"{kind} {clip.kind}"  # the kind of clip is known by how many things there are
                by_answer.setdefault((key, answer), []).append(_middle(thing))
                if kind == "direction":
                    ends.setdefault(answer, []).append(float(thing.boxes[-1, 0]))
            if kind == "count moving":
                numbers.setdefault(answer, []).append(len(clip.things))
            if kind == "appearing":
                there = named(clip, question).there[FRAMES // 2]
                by_answer.setdefault((kind, answer), []).append(np.array([there, 0], np.float32))
    for key in {kind for kind, _ in by_answer}:
        spots = [np.array(value) for (kind, _), value in by_answer.items() if kind == key]
        for one in spots[1:]:
            first = spots[0]
            error = np.sqrt(first.var(axis=0) / len(first) + one.var(axis=0) / len(one)) + 1e-6
            assert (np.abs(first.mean(axis=0) - one.mean(axis=0)) < 4 * error).all(), key
            assert np.allclose(first.std(axis=0), one.std(axis=0), rtol=0.25, atol=1e-6), key
    shares = [np.mean(np.array(value) == 3) for value in numbers.values()]
    assert max(shares) - min(shares) < 0.3
    assert np.mean(ends["right"]) - np.mean(ends["left"]) > 10


def test_a_clip_is_decided_by_its_generator() -> None:
    one, same, other = (clip_of(seed) for seed in (3, 3, 4))
    assert np.array_equal(one.frames, same.frames) and one.questions == same.questions
    assert not np.array_equal(one.frames, other.frames)


def test_a_drifting_camera_moves_the_photograph_too() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    still, moved = 0, 0
    for seed in range(60):
        clip = clip_of(seed, "appearing", photo)
        corner = clip.frames[:, :3, :3].reshape(FRAMES, -1)
        changes = bool((corner != corner[0]).any())
        boxes = [thing.boxes[thing.there] for thing in clip.things]
        drifts = any((box != box[0]).any() for box in boxes)
        moved, still = moved + (changes and drifts), still + (not changes and not drifts)
    assert moved > 5 and still > 25


def test_what_cannot_be_composed_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="at least 12 frames of 32 pixels, got 4 of 96"):
        compose_clip(rng, DRAWINGS, GREY, frames=4)
    with pytest.raises(InputError, match="unknown kind 'dance'; expected one of direction"):
        compose_clip(rng, DRAWINGS, GREY, kind="dance")
    with pytest.raises(InputError, match="drawings of 2 different things or more, got 1"):
        compose_clip(rng, DRAWINGS[:1], GREY, kind="passing")
    assert compose_clip(rng, DRAWINGS[:2], GREY, kind="passing").things  # control
