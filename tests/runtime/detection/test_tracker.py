"""Numbers that stay with things: measured on boxes that move, with a simpler tracker as the control."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.detection.boxes import Box, Detection, iou_matrix
from mammut_runtime.detection.tracker import Tracker, TrackRule, assignment, generalised_iou
from mammut_runtime.errors import InputError


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_the_assignment_is_the_best_of_all(rows: int, columns: int, seed: int, ties: bool) -> None:
    costs = np.random.default_rng(seed).random((rows, columns)) * 10 - 3
    if ties:
        costs = np.round(costs / 4)
    found_rows, found_columns = assignment(costs)
    assert len(found_rows) == len(set(found_rows.tolist())) == len(set(found_columns.tolist())) == min(rows, columns)
    found = costs[found_rows, found_columns].sum()
    wide = costs if rows <= columns else costs.T
    best = min(
        wide[np.arange(len(wide)), list(order)].sum()
        for order in itertools.permutations(range(wide.shape[1]), len(wide))
    )
    assert found == pytest.approx(best, abs=1e-9)


def test_generalised_overlap_of_known_boxes() -> None:
    one = np.array([[0.0, 0, 10, 10]])
    other = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [20, 0, 30, 10]])
    np.testing.assert_allclose(generalised_iou(one, other)[0], [1, 1 / 3, 0, -1 / 3])


@dataclass
class Scene:
    """Boxes of one name that move straight, and turn round at the borders."""

    frames: list[tuple[float, list[tuple[int, Detection]]]]


def moving(seed: int, things: int, fps: float = 10.0, seconds: float = 10.0, missed: float = 0.0) -> Scene:
    """Things of 40 pixels with up to 90 pixels a second in 640 x 360, found with 2 pixels of noise."""
    source = np.random.default_rng(seed)
    place = source.random((things, 2)) * (560, 280)
    speed = (source.random((things, 2)) - 0.5) * 180
    frames = []
    for number in range(int(fps * seconds)):
        boxes = []
        for thing in range(things):
            corner = place[thing] + source.normal(0, 2, 2)
            sides = 40 + source.normal(0, 2, 2)
            if source.random() >= missed:
                boxes.append((thing, Detection("car", 0.9, Box(*corner.tolist(), *(corner + sides).tolist()))))
        frames.append((number / fps, [boxes[index] for index in source.permutation(len(boxes))]))
        place += speed / fps
        turned = (place < 0) | (place > (600, 320))
        speed[turned] *= -1
    return Scene(frames)


def switches(scene: Scene, numbers: list[list[int]]) -> int:
    """How often a thing has another number than when it was last found."""
    last: dict[int, int] = {}
    count = 0
    for (_, boxes), row in zip(scene.frames, numbers, strict=True):
        for (thing, _), number in zip(boxes, row, strict=True):
            count += last.get(thing, number) != number
            last[thing] = number
    return count


def tracked(scene: Scene, rule: TrackRule | None = None) -> list[list[int]]:
    tracker = Tracker(rule)
    return [[one.number for one in tracker.update(time_s, [box for _, box in boxes])] for time_s, boxes in scene.frames]


def nearest(scene: Scene) -> list[list[int]]:
    """The control: each box takes the number of the box of the last frame that it overlaps most."""
    rows, before, known, fresh = [], np.zeros((0, 4), np.float32), list[int](), itertools.count(1)
    for _, boxes in scene.frames:
        now = np.array([box.box.xyxy for _, box in boxes], np.float32).reshape(-1, 4)
        overlap = iou_matrix(now, before)
        row: list[int] = []
        for index in range(len(now)):
            best = int(overlap[index].argmax()) if len(before) else -1
            row.append(
                known[best] if best >= 0 and overlap[index, best] > 0 and known[best] not in row else next(fresh)
            )
        rows, before, known = [*rows, row], now, row
    return rows


def test_things_that_move_and_cross_keep_their_numbers() -> None:
    scenes = [moving(seed, 6) for seed in range(8)]
    ours = sum(switches(scene, tracked(scene)) for scene in scenes)
    control = sum(switches(scene, nearest(scene)) for scene in scenes)
    assert ours <= 12 and control >= 3 * ours, (ours, control)


def test_a_thing_that_is_missed_now_and_then_keeps_its_number() -> None:
    scenes = [moving(seed, 3, missed=0.2) for seed in range(8)]
    ours = sum(switches(scene, tracked(scene)) for scene in scenes)
    impatient = sum(switches(scene, nearest(scene)) for scene in scenes)
    assert ours <= 15 and impatient >= 10 * ours, (ours, impatient)


def test_a_fast_thing_at_a_low_rate_keeps_its_number_by_its_velocity() -> None:
    """A box of 40 pixels that moves 60 in each frame: it never overlaps itself, but where it goes is known."""
    frames = [(t / 2, [(0, Detection("car", 0.9, Box(45.0 * t, 10, 45.0 * t + 40, 50)))]) for t in range(10)]
    assert switches(Scene(frames), tracked(Scene(frames))) == 0
    assert switches(Scene(frames), nearest(Scene(frames))) == 9  # control


def test_it_is_given_up_after_a_while() -> None:
    box = Detection("car", 0.9, Box(0, 0, 40, 40))
    for gap_s, expected in ((0.9, 1), (1.5, 2)):
        tracker = Tracker(TrackRule(patience_s=1.0))
        for time_s in (0.0, 0.1, 0.2):
            (first,) = tracker.update(time_s, [box])
        tracker.update(0.3, [])
        step = 0.3
        while step + 0.1 < 0.2 + gap_s - 1e-9:
            step += 0.1
            tracker.update(step, [])
        (after,) = tracker.update(0.2 + gap_s + 0.05, [box])
        assert (first.number, after.number) == (1, expected)


def test_other_names_are_other_things() -> None:
    tracker = Tracker()
    box = Box(0, 0, 40, 40)
    tracker.update(0.0, [Detection("car", 0.9, box)])
    (dog, car) = tracker.update(0.1, [Detection("dog", 0.9, box), Detection("car", 0.8, box)])
    assert (dog.number, car.number) == (2, 1)
    assert (car.seen, car.first_s, dog.seen, dog.first_s) == (2, 0.0, 1, 0.1)
    assert car.to_dict()["number"] == 1 and car.to_dict()["name"] == "car"


def test_the_same_frames_give_the_same_numbers() -> None:
    scene = moving(3, 8, missed=0.1)
    assert tracked(scene) == tracked(scene)


def test_times_and_rules_out_of_range() -> None:
    tracker = Tracker()
    tracker.update(1.0, [])
    for time_s in (1.0, 0.5, float("nan")):
        with pytest.raises(InputError, match="expected a time after 1 s"):
            tracker.update(time_s, [])
    tracker.update(1.1, [])  # control
    with pytest.raises(InputError, match="patience_s: expected a number from 0 to 3600, got -1"):
        TrackRule(patience_s=-1)
