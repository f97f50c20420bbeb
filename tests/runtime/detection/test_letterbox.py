from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.detection.letterbox import FILL, MAX_SIDE, Letterbox
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture

SIDES = st.integers(1, 20_000)


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 2048))
def test_the_picture_stands_whole_inside_the_square_with_its_long_side_filling_it(
    height: int, width: int, size: int
) -> None:
    box = Letterbox.fit(height, width, size)
    assert max(box.resized_height, box.resized_width) == size
    assert box.pad_top >= 0 and box.pad_top + box.resized_height <= size
    assert box.pad_left >= 0 and box.pad_left + box.resized_width <= size
    assert abs((size - box.resized_height - box.pad_top) - box.pad_top) <= 1, "in the middle"
    # The shape is kept to half a pixel of the square, but no side vanishes.
    assert abs(box.resized_width - width * box.scale) <= 0.5 or box.resized_width == 1
    assert abs(box.resized_height - height * box.scale) <= 0.5 or box.resized_height == 1


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 2048), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_there_and_back_is_the_same_box(height: int, width: int, size: int, parts: list[float]) -> None:
    letterbox = Letterbox.fit(height, width, size)
    box = np.array(parts) * np.array([width, height] * 2)
    inside = letterbox.to_input(box)
    assert (inside >= -1e-9).all() and (inside <= size + 1e-9).all()
    np.testing.assert_allclose(letterbox.to_picture(inside), box, rtol=0, atol=1e-9 * max(height, width, size))
    again = letterbox.to_input(letterbox.to_picture(box))
    np.testing.assert_allclose(again, box, rtol=0, atol=1e-9 * max(height, width, size))


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 2048))
def test_the_corners_of_the_picture_are_the_corners_of_its_place(height: int, width: int, size: int) -> None:
    letterbox = Letterbox.fit(height, width, size)
    found = letterbox.to_input(np.array([0.0, 0.0, width, height]))
    left, top = letterbox.pad_left, letterbox.pad_top
    expected = [left, top, left + letterbox.resized_width, top + letterbox.resized_height]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_float32_stays_float32_and_differs_by_its_rounding_only() -> None:
    letterbox = Letterbox.fit(1080, 1920, 320)
    boxes = np.array([[[1.5, 2.25, 1919.5, 1079.0], [0, 0, 1, 1]]], np.float32)
    inside = letterbox.to_input(boxes)
    assert inside.dtype == np.float32 and inside.shape == boxes.shape
    np.testing.assert_allclose(letterbox.to_picture(inside), boxes, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 64), st.data())
def test_a_bright_rectangle_is_where_its_box_says(height: int, width: int, size: int, data: Any) -> None:
    """The pixels and the boxes are moved by the same geometry: the bright pixels' own box is the mapped one."""
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y0:y1, x0:x1] = 255
    letterbox = Letterbox.fit(height, width, size)
    square = letterbox.apply(picture, fill=0).astype(float)[:, :, 0] / 255
    left, top, right, bottom = letterbox.to_input(np.array([x0, y0, x1, y1], float))
    rows, columns = np.nonzero(square > 0)
    if not len(rows):  # bilinear at 8 bits, or a sliver of a pixel
        assert (right - left) * (bottom - top) < 1
        return
    margin = 1 + max(letterbox.scale_x, letterbox.scale_y)  # of a blurred edge
    assert rows.min() >= top - margin and rows.max() + 1 <= bottom + margin
    assert columns.min() >= left - margin and columns.max() + 1 <= right + margin
    outside = np.ones((size, size), bool)
    outside[
        letterbox.pad_top : letterbox.pad_top + letterbox.resized_height,
        letterbox.pad_left : letterbox.pad_left + letterbox.resized_width,
    ] = False
    assert not square[outside].any()


def test_areas_are_averaged_when_shrinking_so_the_brightness_stays() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    small = Letterbox.fit(600, 800, 100).apply(picture)
    assert abs(small[13:87].mean() - picture.mean()) < 1 and small[13:87].std() < picture.std() / 4
    assert (small[:12] == FILL).all()  # control: the padding is the fill, whatever the picture


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (Letterbox.fit(32, 32, 32).apply(picture) == picture).all()
    assert (Letterbox.fit(32, 32, 33).apply(picture)[1:, 1:] != picture).any()  # control


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright_before_its_letterbox_is_made(orientation: int) -> None:
    """The same upright picture, stored in any of EXIF's eight ways, has the same letterbox and the same boxes."""
    image = pytest.importorskip("PIL.Image")
    upright = np.full((40, 24, 3), 20, np.uint8)
    upright[4:12, 2:10] = (250, 60, 30)
    turned: Any = upright  # the inverse of what EXIF asks the viewer to do
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation >= 5:
        turned = turned.swapaxes(0, 1)
    exif = image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.fromarray(np.ascontiguousarray(turned)).save(file, "JPEG", quality=95, exif=exif)
    seen = read_picture(file.getvalue()).rgb()
    letterbox = Letterbox.fit(seen.shape[0], seen.shape[1], 32)
    square = letterbox.apply(seen)
    rows, columns = np.nonzero(square[:, :, 0] > 190)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
    np.testing.assert_allclose(letterbox.to_picture(found), [2, 4, 10, 12], atol=2.0)


@pytest.mark.parametrize(
    ("sides", "message"),
    [((0, 5, 8), "height: expected 1"), ((5, -1, 8), "width: expected 1"), ((5, 5, MAX_SIDE + 1), "size: expected 1")],
)
def test_sides_out_of_range_are_refused(sides: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Letterbox.fit(*sides)
    Letterbox.fit(5, 5, 8)  # control


def test_other_pictures_and_boxes_are_refused() -> None:
    letterbox = Letterbox.fit(10, 20, 8)
    for wrong in (np.zeros((20, 10, 3), np.uint8), np.zeros((10, 20, 3), np.float32), np.zeros((10, 20), np.uint8)):
        with pytest.raises(InputError, match=r"expected uint8\[10, 20, 3\]"):
            letterbox.apply(wrong)  # type: ignore[arg-type]
    letterbox.apply(np.zeros((10, 20, 3), np.uint8))  # control
    for boxes in (np.zeros((2, 3)), np.zeros((2, 4), int)):
        with pytest.raises(InputError, match="expected boxes as floating point"):
            letterbox.to_input(boxes)  # type: ignore[type-var]
    assert letterbox.to_input(np.zeros((0, 4))).shape == (0, 4)
