"""What is said about a composed scene is true of its pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.data.scenes import (
    NUMBERS,
    Drawing,
    Placed,
    Scene,
    compose,
    paste,
    plural,
    relation,
    relation_captions,
    trimmed,
    with_article,
)
from mammut.demo.evaluate_scenes import _form, _most_frequent

COLOURS = {"red circle": (200, 0, 0), "blue square": (0, 0, 200), "owl": (0, 200, 0), "key": (200, 200, 0)}


def drawing(name: str) -> Drawing:
    """A filled block of the name's own colour."""
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[:, :] = (*COLOURS[name], 255)
    return Drawing(name, "test", pixels)


DRAWINGS = [drawing(name) for name in COLOURS]
GREY = np.full((150, 150, 3), 128, np.uint8)


def scene(seed: int, size: int = 96) -> Scene:
    return compose(np.random.default_rng(seed), DRAWINGS, GREY, size)


def pixels_of(found: Scene, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Where the colour of a thing is, whatever the light."""
    wanted = np.array(COLOURS[name], np.float32) / np.linalg.norm(COLOURS[name])
    lit = found.pixels.astype(np.float32)
    length = np.linalg.norm(lit, axis=2)
    return np.asarray((lit @ wanted > 0.999 * length) & (length > 60))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_thing_is_where_its_box_says(seed: int) -> None:
    found = scene(seed)
    assert 1 <= len(found.placed) <= 4 and found.pixels.shape == (96, 96, 3)
    last = found.placed[-1]  # nothing covers it
    x0, y0, x1, y1 = (int(v) for v in last.box)
    assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
    assert pixels_of(found, last.name)[y0:y1, x0:x1].all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_answers_follow_from_what_is_placed(seed: int) -> None:
    found = scene(seed)
    names = [placed.name for placed in found.placed]
    for kind, question, answer in found.questions:
        if kind == "presence":
            assert (answer == "yes") == any(with_article(name) in question for name in names)
        if kind == "count" and "things" in question:
            assert answer == NUMBERS[len(names)]
        if kind == "count" and "things" not in question:
            assert answer == NUMBERS[sum(plural(name) in question for name in names)]
        if kind == "colour":
            assert answer in ("red", "blue")
        if kind in ("side", "other"):
            assert answer in names
        if kind == "where":
            assert answer.startswith(("on the", "at the"))


def test_left_and_right_and_above_and_below_are_as_seen() -> None:
    def at(name: str, x: float, y: float) -> Placed:
        return Placed(name, "", (x - 5, y - 5, x + 5, y + 5), None)

    middle = at("owl", 50, 50)
    assert relation(at("key", 10, 50), middle, 96) == "to the left of"
    assert relation(at("key", 90, 55), middle, 96) == "to the right of"
    assert relation(at("key", 45, 10), middle, 96) == "above"
    assert relation(at("key", 50, 90), middle, 96) == "below"
    assert relation(at("key", 80, 80), middle, 96) is None  # neither
    assert relation(at("key", 55, 50), middle, 96) is None  # too near


def test_the_caption_of_two_things_says_how_they_stand() -> None:
    scenes = [scene(seed) for seed in range(300)]
    said = [each for each in scenes if "left of" in each.captions[0]]
    assert len(said) > 5
    for each in said:
        first, second = sorted(each.placed, key=lambda one: one.centre[0])
        wanted = f"{with_article(first.name)} to the left of {with_article(second.name)}"
        assert each.captions == (wanted,)
        turned = f"{with_article(second.name)} to the right of {with_article(first.name)}"
        assert {*relation_captions((first, second), 96)} == {wanted, turned}


def test_one_seed_is_one_scene() -> None:
    assert np.array_equal(scene(5).pixels, scene(5).pixels) and scene(5).questions == scene(5).questions
    assert not np.array_equal(scene(5).pixels, scene(6).pixels)


@pytest.mark.parametrize(
    ("name", "many"),
    [("dog", "dogs"), ("fox", "foxes"), ("strawberry", "strawberries"), ("key", "keys"), ("fish", "fish"),
     ("mouse", "mice"), ("bus", "buses"), ("octopus", "octopuses"), ("peach", "peaches"), ("mango", "mangoes")],
)  # fmt: skip
def test_plural(name: str, many: str) -> None:
    assert plural(name) == many


def test_articles() -> None:
    assert [with_article(n) for n in ("owl", "dog", "jeans", "fish", "unicorn")] == [
        "an owl", "a dog", "jeans", "a fish", "a unicorn",
    ]  # fmt: skip


def test_paste_cuts_at_the_edges_and_trims() -> None:
    canvas = np.zeros((10, 10, 3), np.uint8)
    paste(canvas, DRAWINGS[0].pixels, (-5, -5, 5, 5))
    assert (canvas[:5, :5] == (200, 0, 0)).all() and not canvas[5:].any()
    paste(canvas, DRAWINGS[0].pixels, (20, 20, 30, 30))  # outside: nothing
    padded = np.zeros((40, 40, 4), np.uint8)
    padded[10:20, 5:30, 3] = 255
    assert trimmed(padded).shape == (10, 25, 4)
    assert trimmed(np.zeros((4, 4, 4), np.uint8)).shape == (4, 4, 4)


def test_a_thing_that_is_not_there_is_no_form_of_its_own() -> None:
    """Else who always gives a form's most frequent answer would be right about presence every time."""
    asked = [("is there an owl?", "yes"), ("is there a red heart?", "no"), ("how many foxes are there?", "two")]
    names = {"owl", "red heart", "heart", "fox"}
    assert [_form(question, names) for question, _ in asked] == ["is there X?", "is there X?", "how many X are there?"]
    assert _most_frequent([(_form(question, names), answer) for question, answer in asked[:2]]) == 0.5
    assert _most_frequent([(_form(question, ["owl"]), answer) for question, answer in asked[:2]]) == 1.0  # control
