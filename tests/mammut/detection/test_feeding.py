"""Batches: boxes follow their pictures through the jitter, and what is not known stays unknown."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.detection.feeding import Fed, Jitter, SetSource, batches, collate, jittered, varied
from mammut.detection.samples import BoxedPicture, BoxedSet, Frequency
from mammut_runtime.preprocess import PreprocessRule

RULE = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)


def white_box(height: int, width: int, box: tuple[int, int, int, int]) -> BoxedPicture:
    """A white thing on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return BoxedPicture("one", pixels, np.array([box], np.float32), ("thing",), np.zeros(1, bool))


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 10_000))
def test_boxes_follow_the_pixels(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = white_box(height, width, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    square, found = jittered(picture, Jitter(0.5, 2.0, light=0.0), 64, 0, rng)
    assert square.shape == (64, 64, 3)
    rows, columns = (np.flatnonzero((square[:, :, 0] > 127).any(axis=axis)) for axis in (1, 0))
    if not len(found.boxes):
        assert len(rows) <= 1 or len(columns) <= 1
        return
    if found.ignore[0]:
        return
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(found.boxes[0], seen, atol=1.6 + 64 / min(height, width))


def test_a_box_of_which_little_is_left_is_ignored() -> None:
    picture = white_box(64, 64, (0, 0, 20, 20))
    states = set()
    for seed in range(40):
        _, found = jittered(picture, Jitter(2.0, 2.0, flip=False, light=0), 64, 0, np.random.default_rng(seed))
        for box, ignored in zip(found.boxes, found.ignore, strict=True):
            share = float((box[2:] - box[:2]).prod()) / 40**2
            assert ignored == (share < 0.3)
            states.add(bool(ignored))
    assert states == {True, False}


def test_four_pictures_in_one() -> None:
    picture = dataclasses.replace(white_box(40, 40, (10, 10, 30, 30)), absent=("other",))
    source = SetSource(BoxedSet("set", ("thing", "other"), [picture]))
    square, found = varied(Fed(source, 1.0, Jitter(1.0, 1.0, light=0.0, mosaic=1.0)), 64, 0, np.random.default_rng(0))
    assert found.boxes.tolist() == [[x + 8, y + 8, x + 24, y + 24] for y in (0, 32) for x in (0, 32)]
    for box in found.boxes.astype(int):
        assert (square[box[1] + 1 : box[3] - 1, box[0] + 1 : box[2] - 1] > 200).all()
    assert (found.labels, found.absent, found.partial) == (("thing",) * 4, ("other",), ())
    one, _ = varied(Fed(source, 1.0, Jitter(1.0, 1.0, light=0.0)), 64, 0, np.random.default_rng(0))
    assert (one != square).any()  # the control


def test_what_one_of_four_does_not_know() -> None:
    """A name that only some of the pictures were searched for has its boxes, but says nothing about the rest."""
    sure, unsure = (
        dataclasses.replace(white_box(40, 40, (10, 10, 30, 30)), labels=(label,), absent=absent)
        for label, absent in (("a", ("b", "c")), ("b", ("c",)))
    )
    source = SetSource(BoxedSet("set", ("a", "b", "c"), [sure, unsure]))
    fed = Fed(source, 1.0, Jitter(1.0, 1.0, light=0.0, mosaic=1.0))
    seen = [varied(fed, 64, 0, np.random.default_rng(seed))[1] for seed in range(8)]
    mixed = next(each for each in seen if set(each.labels) == {"a", "b"})
    assert mixed.absent == ("c",)
    assert mixed.partial == ("a",)


def test_collate_leaves_out_held_out_names() -> None:
    boxes = np.array([[0, 0, 9, 9], [5, 5, 20, 20], [8, 8, 30, 30]], np.float32)
    picture = BoxedPicture("one", np.zeros((32, 32, 3), np.uint8), boxes, ("a", "rare", "b"),
                           np.array([False, False, True]), absent=("c",), partial=("a",))  # fmt: skip
    batch = collate([(picture.rgb(), picture, False)], {"a": 0, "b": 1, "c": 2, "d": 3}, RULE)
    assert batch.labels.tolist() == [[0, -1, -1]]
    assert batch.boxes[0, 1].tolist() == [0, 0, 0, 0]  # as if nobody had drawn it
    assert batch.ignore.tolist() == [[False, False, True]]
    assert batch.known.tolist() == [[True, True, True, False]]
    assert batch.partial.tolist() == [[True, False, False, False]]
    assert batch.complete.tolist() == [False]
    assert float(batch.pixels.max()) == -1.0


def test_a_step_is_its_number() -> None:
    pictures = [white_box(40, 50, (5, 5, 10 + k, 20)) for k in range(6)]
    feeds = [Fed(SetSource(BoxedSet("set", ("thing", "other"), pictures)), 1.0, Jitter(0.5, 1.5))]

    def made(start: int, threads: int) -> list[torch.Tensor]:
        feed = batches(feeds, ("other", "thing"), 32, 0, RULE, batch_size=3, seed=1, start=start, threads=threads)
        found = [batch.pixels for batch in itertools.islice(feed, 4)]
        feed.close()
        return found

    first = made(0, 1)
    for one, other in zip(first[2:], made(2, 3)[:2], strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(first[0], first[1])


def test_uncommon_names_are_drawn_more_often() -> None:
    """LVIS's repeat factors: of 4,000 pictures, one has a name that is 4 times rarer than needs no repetition."""
    usual = BoxedPicture(
        "usual", np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4), np.float32), ("a",), np.zeros(1, bool)
    )
    rare = dataclasses.replace(usual, name="rare", labels=("a", "b"))
    pictures = [usual] * 3999 + [rare]

    def share(frequency: dict[str, Frequency]) -> float:
        source = SetSource(BoxedSet("set", ("a", "b"), pictures, frequency))
        rng = np.random.default_rng(0)
        return sum(source.draw(rng).name == "rare" for _ in range(40_000)) / 40_000

    assert 1.4 / 4000 < share({"a": "f", "b": "c"}) < 2.7 / 4000
    assert share({}) < 1.7 / 4000
    drawn = SetSource(BoxedSet("set", ("a", "b"), [usual])).draw(np.random.default_rng(0))
    assert drawn.absent == ("b",)
