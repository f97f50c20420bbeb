from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.detection.boxes import Box, Detection
from mammut_runtime.detection.drawing import colour_of, draw_detections, label_of
from mammut_runtime.detection.tracker import Tracked

CAR = Detection("car", 0.874, Box(60, 80, 200, 180))


def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_name() -> None:
    picture = np.full((240, 400, 3), 128, np.uint8)
    drawn = draw_detections(picture, [CAR])
    assert drawn.shape == picture.shape and (picture == 128).all(), "the given picture was changed"
    for y, x in ((179, 130), (130, 60), (130, 199)):
        assert tuple(drawn[y, x]) == colour_of("car"), (y, x)
    assert (drawn[100:160, 80:180] == 128).all() and (drawn[190:] == 128).all()
    assert (drawn[60:80] != 128).any(), "no label above it"
    assert (draw_detections(picture, []) == picture).all()  # control


def test_narrow_pictures_are_enlarged_by_a_whole_factor() -> None:
    small = np.full((50, 100, 3), 128, np.uint8)
    drawn = draw_detections(small, [Detection("car", 0.5, Box(50, 20, 90, 40))])
    assert drawn.shape == (200, 400, 3)
    assert tuple(drawn[120, 200]) == colour_of("car")


def test_names_have_colours_of_their_own_and_numbers_stand_in_front() -> None:
    assert colour_of("car") == colour_of("Car") != colour_of("dog")
    assert label_of(CAR) == "car 0.87"
    assert label_of(Tracked(3, CAR, 0.0, 1)) == "#3 car 0.87"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.lists(st.floats(-50, 450), min_size=4, max_size=4),
    st.text(max_size=60),
)
def test_any_box_and_any_name_can_be_drawn(height: int, width: int, corners: list[float], name: str) -> None:
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    drawn = draw_detections(np.zeros((height, width, 3), np.uint8), [Detection(name, 0.5, Box(x0, y0, x1, y1))])
    assert drawn.dtype == np.uint8 and drawn.shape[1] >= 320 and drawn.shape[1] % width == 0


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_better_ones_are_drawn_over_worse_ones(score: float) -> None:
    picture = np.full((240, 400, 3), 128, np.uint8)
    other = Detection("dog", score, CAR.box)
    drawn = draw_detections(picture, [CAR, other])
    expected = "dog" if score > CAR.score else "car"
    assert tuple(drawn[130, 60]) == colour_of(expected)
