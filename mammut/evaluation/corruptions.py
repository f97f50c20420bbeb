"""Common corruptions of pictures, five severities each: sensor noise, defocus, JPEG, low light, fog.

Made for this software, in the spirit of Hendrycks and Dietterich 2019, not their code: figures compare within this
software only. A picture is first shrunk to 256 px on its shorter side, where it is larger, so that a severity means the
same for every camera; severity 0 is that and nothing else. Blur and fog go by the picture's size; noise and JPEG's
blocks are of pixels, so smaller pictures suffer more from them. The same picture is always corrupted alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

SIDE = 256
SEVERITIES = (1, 2, 3, 4, 5)
_NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
"""Standard deviation, of the range 0 to 1."""
_BLUR = (1.5, 3.0, 5.0, 7.5, 11.0)
"""Standard deviation in pixels where the shorter side is SIDE."""
_JPEG = (25, 15, 10, 7, 4)
"""Quality."""
_LIGHT = (0.5, 0.3, 0.2, 0.12, 0.07)
"""Share of the light that is left; the sensor's noise stays as it is."""
_FOG = (0.3, 0.45, 0.6, 0.72, 0.83)
"""Share of fog in what is seen."""


def corrupted(pixels: U8, kind: str, severity: int) -> U8:
    """uint8[H, W, 3] RGB to the same, at most SIDE px on the shorter side. Raises InputError for an unknown kind."""
    if kind not in CORRUPTIONS or severity not in (0, *SEVERITIES):
        known = ", ".join(CORRUPTIONS)
        raise InputError(f"corruption: expected {known} with a severity of 0 to 5, got {kind} {severity}")
    small = _shrunk(pixels)
    if severity == 0:
        return small
    generator = np.random.default_rng([zlib.crc32(small.tobytes()), zlib.crc32(kind.encode()), severity])
    return CORRUPTIONS[kind](small, severity - 1, generator)


def _shrunk(pixels: U8) -> U8:
    scale = SIDE / min(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _noise(pixels: U8, level: int, generator: np.random.Generator) -> U8:
    return _bytes(_floats(pixels) + generator.normal(0, _NOISE[level], pixels.shape).astype(np.float32))


def _blur(pixels: U8, level: int, _: np.random.Generator) -> U8:
    sigma = _BLUR[level] * min(pixels.shape[:2]) / SIDE
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT), np.uint8)


def _jpeg(pixels: U8, level: int, _: np.random.Generator) -> U8:
    encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG[level]])[1]
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(decoded[:, :, ::-1])


def _low_light(pixels: U8, level: int, generator: np.random.Generator) -> U8:
    """Less light in linear intensity, then photon and read-out noise of a small sensor."""
    light = _floats(pixels) ** 2.2 * np.float32(_LIGHT[level])
    photons = generator.poisson(light * 400) / 400 + generator.normal(0, 0.003, pixels.shape)
    return _bytes(np.clip(photons, 0, 1).astype(np.float32) ** np.float32(1 / 2.2))


def _fog(pixels: U8, level: int, generator: np.random.Generator) -> U8:
    """Light grey over the picture, in soft clouds of several sizes."""
    height, width = pixels.shape[:2]
    cloud = np.zeros((height, width), np.float32)
    for octave in range(5):
        grid = generator.random((2**octave + 1, 2**octave + 1), np.float32)
        cloud += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / np.float32(2**octave)
    share = np.clip(np.float32(_FOG[level]) * (0.6 + 0.8 * cloud / cloud.max()), 0, 0.97)[:, :, None]
    return _bytes(_floats(pixels) * (1 - share) + np.float32(0.85) * share)


def _floats(pixels: U8) -> F32:
    return pixels.astype(np.float32) / np.float32(255)


def _bytes(values: F32) -> U8:
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)


CORRUPTIONS: dict[str, Callable[[U8, int, np.random.Generator], U8]] = {
    "noise": _noise,
    "blur": _blur,
    "jpeg": _jpeg,
    "low light": _low_light,
    "fog": _fog,
}
