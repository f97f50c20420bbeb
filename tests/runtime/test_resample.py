"""The resize against Pillow itself, bit for bit, and the ways in which it could silently stop being exact."""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mammut_runtime import resample
from mammut_runtime.resample import Axis, blocks, resize_nearest, resize_u8, resize_u16

Filter = Literal["bicubic", "bilinear"]
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

sides = st.integers(1, 90)
sizes = st.integers(1, 60)
filters: Any = st.sampled_from(["bicubic", "bilinear"])
seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, height: int, width: int, channels: int, hard: bool = False) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random bytes; hard: only 0 and 255, which makes the filter overshoot as far as it can."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if hard else pixels


def whole(source: int, size: int) -> Axis:
    return Axis(source, size, 0, size)


def by_pillow(pixels: np.ndarray[Any, Any], width: int, height: int, name: Filter) -> np.ndarray[Any, Any]:
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
    return np.asarray(picture.resize((width, height), PILLOW[name])).reshape(height, width, *pixels.shape[2:])


@settings(max_examples=150, deadline=None)
@given(seeds, sides, sides, sizes, sizes, st.sampled_from([1, 3]), filters, st.booleans())
@example(0, 2, 2, 4, 4, 3, "bilinear", True)
@example(0, 3000, 5, 9, 9, 3, "bicubic", False)
def test_equals_pillow(
    seed: int, height: int, width: int, rows: int, columns: int, channels: int, name: Filter, hard: bool
) -> None:
    pixels = noise(seed, height, width, channels, hard)
    ours = resize_u8(pixels, whole(width, columns), whole(height, rows), name)
    assert ours.dtype == np.uint8 and np.array_equal(ours, by_pillow(pixels, columns, rows, name))


@settings(max_examples=60, deadline=None)
@given(seeds, sides, sides, sizes, sizes, filters, st.data())
def test_a_window_is_a_part_of_the_whole(
    seed: int, height: int, width: int, rows: int, columns: int, name: Filter, data: st.DataObject
) -> None:
    left, top = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    count_x, count_y = data.draw(st.integers(1, columns - left)), data.draw(st.integers(1, rows - top))
    pixels = noise(seed, height, width, 3)
    part = resize_u8(pixels, Axis(width, columns, left, count_x), Axis(height, rows, top, count_y), name)
    everything = resize_u8(pixels, whole(width, columns), whole(height, rows), name)
    assert np.array_equal(part, everything[top : top + count_y, left : left + count_x])


@pytest.mark.parametrize(("height", "width"), [(301, 3), (300, 3), (900, 2), (250, 1)])
@pytest.mark.parametrize("size", [1, 7, 64, 302])
def test_very_tall_pictures_take_pillows_other_order(height: int, width: int, size: int) -> None:
    pixels = noise(height, height, width, 3)
    ours = resize_u8(pixels, whole(width, size), whole(height, size), "bicubic")
    assert np.array_equal(ours, by_pillow(pixels, size, size, "bicubic"))


def test_the_order_of_the_passes_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: without the rule for tall pictures, it would fail."""
    monkeypatch.setattr(resample, "_height_first", lambda columns, rows: False)
    pixels = noise(0, 301, 3, 3)
    ours = resize_u8(pixels, whole(3, 64), whole(301, 64), "bicubic")
    assert not np.array_equal(ours, by_pillow(pixels, 64, 64, "bicubic"))


def test_opencvs_own_cubic_is_another_filter() -> None:
    """The control of the whole file: a plausible resize is told apart."""
    pixels = noise(0, 60, 60, 3)
    assert not np.array_equal(
        cv2.resize(pixels, (40, 40), interpolation=cv2.INTER_CUBIC), by_pillow(pixels, 40, 40, "bicubic")
    )


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_ties_round_up(name: Filter) -> None:
    """Doubling 0 and 2 or 1 and 2 gives sums that end in exactly one half; OpenCV alone would round them to even."""
    pixels = np.array([[0, 2, 1, 2, 5, 6, 255, 254]], np.uint8).repeat(2, 0)[:, :, None].repeat(3, 2)
    for size in (4, 16, 24):
        ours = resize_u8(pixels, whole(8, size), whole(2, 4), name)
        assert np.array_equal(ours, by_pillow(pixels, size, 4, name))


@pytest.mark.parametrize(("source", "kind"), [(200, np.float32), (4000, np.float32), (9000, np.float64)])
def test_float64_takes_over_where_float32_is_not_exact(source: int, kind: type) -> None:
    assert {block.weights.dtype for block in blocks(whole(source, 224), "bicubic")} == {np.dtype(kind)}
    pixels = noise(source, 3, source, 3, hard=True)
    ours = resize_u8(pixels, whole(source, 224), whole(3, 2), "bicubic")
    assert np.array_equal(ours, by_pillow(pixels, 224, 2, "bicubic"))


def test_unsplit_weights_would_not_be_exact() -> None:
    """The control of the split: float32 products with whole 22-bit weights get a few pixels in a million wrong."""
    pixels, wrong = noise(3, 200, 20_000, 1)[:, :, 0], 0
    for block in blocks(whole(200, 50), "bicubic"):
        high, low = np.split(block.weights.astype(np.float64), 2)
        weights, lines = high + low * 2.0**-11, pixels[block.first : block.last]
        exact = np.floor(weights @ lines.astype(np.float64) + 0.5)
        crude = np.floor(weights.astype(np.float32) @ lines.astype(np.float32) + np.float32(0.5))
        wrong += int((np.clip(exact, 0, 255) != np.clip(crude, 0, 255)).sum())
    assert 0 < wrong < 1000


@pytest.mark.parametrize("limit", [1, 1000, 1 << 30])
def test_the_size_of_the_matrix_products_does_not_show(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(5, 70, 90, 3)
    usual = resize_u8(pixels, whole(90, 31), whole(70, 33), "bicubic")
    monkeypatch.setattr(resample, "ONE_THREAD_PRODUCT", limit)
    monkeypatch.setattr(resample, "STRIP_ROWS", 17)
    assert np.array_equal(resize_u8(pixels, whole(90, 31), whole(70, 33), "bicubic"), usual)


def test_views_with_any_strides_are_read_right() -> None:
    pixels = noise(6, 50, 60, 3)
    expected = resize_u8(pixels, whole(60, 20), whole(50, 20), "bicubic")
    for view in (pixels.copy()[:, :, ::-1][:, :, ::-1], np.asfortranarray(pixels), pixels[::-1].copy()[::-1]):
        assert np.array_equal(resize_u8(view, whole(60, 20), whole(50, 20), "bicubic"), expected)
    mirrored = resize_u8(pixels[:, ::-1], whole(60, 20), whole(50, 20), "bicubic")
    assert np.array_equal(mirrored, by_pillow(np.ascontiguousarray(pixels[:, ::-1]), 20, 20, "bicubic"))


def test_long_axes_are_not_kept_in_memory() -> None:
    before = resample._cached_blocks.cache_info().currsize
    blocks(whole(20_000, 10), "bicubic")
    assert resample._cached_blocks.cache_info().currsize == before
    blocks(whole(1_999, 10), "bicubic")
    assert resample._cached_blocks.cache_info().currsize in (before + 1, 16)


@settings(max_examples=80, deadline=None)
@given(seeds, sides, sides, sizes, sizes, filters, st.booleans())
@example(0, 400, 3, 50, 9, "bicubic", True)
def test_sixteen_bits_equal_pillow(
    seed: int, height: int, width: int, rows: int, columns: int, name: Filter, hard: bool
) -> None:
    pixels = noise(seed, height, width, 1, hard)[:, :, 0].astype(np.uint16) * np.uint16(257)
    ours = resize_u16(pixels, whole(width, columns), whole(height, rows), name)
    assert ours.dtype == np.uint16 and np.array_equal(ours, by_pillow(pixels, columns, rows, name))


@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(1, 700), st.integers(1, 40), st.integers(1, 400), st.integers(1, 90))
@example(0, 401, 4, 50, 9)
def test_nearest_equals_pillow(seed: int, height: int, width: int, rows: int, columns: int) -> None:
    pixels = noise(seed, height, width, 1)[:, :, 0]
    ours = resize_nearest(pixels, whole(width, columns), whole(height, rows))
    expected = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.NEAREST)
    assert np.array_equal(ours, np.asarray(expected))


def test_a_window_far_out_on_an_endless_axis_is_cheap() -> None:
    """A picture 1 pixel high and 60,000 wide becomes 13 million wide before the crop; nothing of that size is made."""
    axis = Axis(60_000, 60_000 * 224, 30_000 * 224, 224)
    line = noise(1, 1, 60_000, 3)
    assert resize_u8(line, axis, whole(1, 224), "bicubic").shape == (224, 224, 3)
    assert np.array_equal(resize_nearest(line, axis, whole(1, 1))[0], line[0, np.full(224, 30_000)])
