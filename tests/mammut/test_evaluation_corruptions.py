"""Corruptions: what they are for, that they worsen, and that they repeat."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from mammut.evaluation.corruptions import CORRUPTIONS, SEVERITIES, SIDE, corrupted
from mammut_runtime.errors import InputError


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Structure of all sizes, 80 x 120."""
    generator = np.random.default_rng(0)
    layers = [cv2.resize(generator.random((2**n, 2**n, 3), np.float32) - 0.5, (120, 80)) for n in range(1, 7)]
    return np.clip(128 + 90 * np.sum(layers, axis=0), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_more_severe_is_farther_from_the_picture(kind: str, picture: np.ndarray) -> None:
    far = [float(np.abs(corrupted(picture, kind, each).astype(float) - picture).mean()) for each in SEVERITIES]
    assert far == sorted(far) and far[0] > 0.5
    assert far[4] > 1.3 * far[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_same_picture_is_corrupted_alike_and_another_is_not(kind: str, picture: np.ndarray) -> None:
    worse = corrupted(picture, kind, 3)
    assert worse.shape == picture.shape and worse.dtype == np.uint8
    np.testing.assert_array_equal(worse, corrupted(picture.copy(), kind, 3))


def test_severity_0_only_shrinks(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(corrupted(picture, "fog", 0), picture)
    large = np.zeros((600, 900, 3), np.uint8)
    assert corrupted(large, "fog", 0).shape == (SIDE, SIDE * 3 // 2, 3)


def test_a_severity_means_the_same_for_every_size(picture: np.ndarray) -> None:
    """Blur by a share of the picture, not by pixels: the small one after a blur equals the shrunk blurred large one."""
    large = np.kron(picture[:64, :64], np.ones((4, 4, 1), np.uint8))
    blurred = corrupted(large, "blur", 3)[::4, ::4]
    small = corrupted(np.ascontiguousarray(picture[:64, :64]), "blur", 3)
    assert np.abs(blurred.astype(float) - small).mean() < 4
    assert np.abs(picture[:64, :64].astype(float) - small).mean() > 8  # control


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (300, 2), (3, 3)])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_odd_sizes(kind: str, size: tuple[int, int]) -> None:
    found = corrupted(np.full((*size, 3), 128, np.uint8), kind, 5)
    assert found.dtype == np.uint8 and found.shape[2] == 3


def test_unknown_corruptions_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected noise, blur, jpeg, low light, fog with a severity"):
        corrupted(picture, "rain", 1)
    with pytest.raises(InputError, match="got fog 6"):
        corrupted(picture, "fog", 6)
