"""Batches: boxes follow their pictures through the jitter, and what is not known stays unknown."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.detection.feeding import Fed, Jitter, SetSource, batches, collate, jittered
from mammut.detection.samples import BoxedPicture, BoxedSet
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
