from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from mammut_export.samples import MAX_PICTURES, drawn_samples, load_samples
from mammut_runtime.errors import InputError


def test_drawn_pictures_are_always_the_same() -> None:
    first, second = drawn_samples(), load_samples(())
    assert [each.name for each in first] == [each.name for each in second]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))
    assert len({each.pixels.shape for each in first}) >= 4  # wide, tall and square: all ways to crop
    assert {each.kind for each in first} == {"drawn"}


def test_pictures_of_a_folder_and_a_file(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", ".hidden.png"):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), 90, np.uint8))
    (tmp_path / "notes.txt").write_text("not a picture")
    red = np.zeros((10, 12, 3), np.uint8)
    red[:, :, 2] = 255  # OpenCV writes BGR
    (tmp_path / "more").mkdir()
    cv2.imwrite(str(tmp_path / "more" / "red.png"), red)
    samples = load_samples((tmp_path, tmp_path / "more" / "red.png"))
    assert [(each.name, each.kind) for each in samples] == [
        ("a.jpg", "given"),
        ("b.png", "given"),
        ("red.png", "given"),
    ]
    assert samples[2].pixels[0, 0].tolist() == [255, 0, 0]


def test_pictures_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((20, 30, 3), 90, np.uint8))
    monkeypatch.setattr("mammut_export.samples.MAX_PIXELS", 600)
    assert len(load_samples((tmp_path,))) == 1
    with pytest.raises(InputError, match="megapixels together"):
        load_samples((tmp_path, tmp_path))


def test_unusable_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures in this folder"):
        load_samples((tmp_path,))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(InputError, match=r"broken\.png"):
        load_samples((tmp_path,))
    with pytest.raises(
        InputError, match=rf"{MAX_PICTURES + 1} pictures to check with, expected at most {MAX_PICTURES}"
    ):
        load_samples((tmp_path / "broken.png",) * (MAX_PICTURES + 1))
