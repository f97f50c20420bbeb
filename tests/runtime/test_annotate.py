from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.annotate import MAX_LINES, annotate, drawable, wrap, write_picture
from mammut_runtime.errors import InputError


def grey(height: int = 100, width: int = 400) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def test_a_band_is_added_under_the_picture_and_the_picture_stays() -> None:
    picture = grey()
    drawn = annotate(picture, ["a red circle"])
    assert drawn.dtype == np.uint8 and drawn.shape[1:] == (400, 3) and drawn.shape[0] > 100
    assert (drawn[:100] == picture).all()
    band = drawn[100:]
    assert band.max() > 200, "nothing was written"
    assert annotate(picture, ["  "]).shape == picture.shape  # control: no words, no band


def test_a_narrow_picture_is_enlarged_by_a_whole_factor() -> None:
    assert annotate(grey(50, 100), ["x"]).shape[1] == 400
    assert annotate(grey(50, 320), ["x"]).shape[1] == 320


def test_over_keeps_the_size_and_the_upper_part() -> None:
    picture = grey(300, 400)
    drawn = annotate(picture, ["a red circle"], place="over")
    assert drawn.shape == picture.shape
    assert (drawn[:150] == picture[:150]).all() and (drawn[-20:] != picture[-20:]).any()
    assert (picture == 128).all(), "the given picture was changed"


def test_long_text_is_wrapped_and_a_runaway_text_is_cut() -> None:
    short, long = annotate(grey(), ["word"]), annotate(grey(), ["word " * 30])
    assert long.shape[0] > short.shape[0]
    endless = wrap(["word " * 10_000], 300, 0.5)
    assert len(endless) == MAX_LINES and endless[-1] == "..."


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=80), st.integers(20, 400))
def test_every_wrapped_line_fits(text: str, width: int) -> None:
    lines = wrap([drawable(text)], width, 0.5)
    for line in lines:
        fits = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0] <= width
        assert fits or len(line) == 1 or line == "..."
    if "..." not in lines:
        assert "".join("".join(lines).split()) == "".join(drawable(text).split())


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_drawn(text: str) -> None:
    assert annotate(grey(20, 320), [text]).shape[2] == 3
    assert drawable(text, font_has_unicode=False).isascii()


def test_what_the_ascii_font_lacks_is_replaced() -> None:
    assert drawable("crème brûlée 你", font_has_unicode=False) == "creme brulee ?"
    assert drawable("crème 你", font_has_unicode=True) == "crème 你"
    assert drawable("two\nlines\x1b[31m") == "two lines[31m"


@pytest.mark.parametrize("shape, dtype", [((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((4, 4, 3), np.float32)])
def test_other_arrays_are_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(InputError, match=r"expected a picture uint8\[H, W, 3\]"):
        annotate(np.zeros(shape, dtype), ["x"])


def test_written_pictures_read_back_in_rgb(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    path = tmp_path / "röd.png"
    write_picture(path, red)
    back = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert (cv2.cvtColor(back, cv2.COLOR_BGR2RGB) == red).all()
    with pytest.raises(InputError, match="ends in"):
        write_picture(tmp_path / "x.txt", red)
