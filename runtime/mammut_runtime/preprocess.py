"""From a picture to the numbers a model eats: resize, crop or pad, RGB, normalise. The only place where this is done.

The device, the trainer and the exporter all call `Preprocessor`, so that they cannot drift apart. The exact mode gives
bit for bit what Pillow 12.3 gives in the public preprocess (resize, then crop, then convert to RGB), in every picture
mode. The fast mode halves large pictures with a box filter first; its numbers are close, not equal.

Arithmetic of the resize is in `resample`, reading files in `pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from mammut_runtime import strict
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture, to_rgb
from mammut_runtime.resample import STRIP_ROWS, Axis, Interpolation, resize_nearest, resize_u8, resize_u16

ResizeMode = Literal["shortest", "longest", "squash"]
ChannelOrder = Literal["rgb", "bgr"]
Mode = Literal["exact", "fast"]
U8 = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.generic]

MAX_SIZE = 4096
"""Largest model input side a rule may ask for; 4096 x 4096 float32 is already 200 MB."""


@dataclass(frozen=True)
class PreprocessRule:
    """How a model wants its pictures. It travels in the checkpoint and in the bundle's manifest.

    Raises InputError when a value is out of its range.
    """

    size: int
    """Side of the square model input, in pixels, 1 to 4096."""
    mean: tuple[float, float, float]
    """Subtracted from R, G, B in [0, 1]."""
    std: tuple[float, float, float]
    """Divides R, G, B after the mean is taken off; above 0."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize: "bicubic" (a = -0.5) or "bilinear", both antialiased when shrinking."""
    resize_mode: ResizeMode = "shortest"
    """"shortest": the short side becomes `size`, the long one is cropped in the centre. "longest": the long side
    becomes `size`, the short one is padded. "squash": both become `size`, the shape of the picture is lost."""
    fill: int = 0
    """Value of the padding of "longest", 0 to 255, in every channel (for palette pictures: the palette's entry)."""

    def __post_init__(self) -> None:
        _check_rule(self)

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON-ready values."""
        values: dict[str, Any] = strict.to_dict(self)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessRule:
        """Read what `to_dict` wrote. Unknown and missing keys, other types and ranges raise InputError by name."""
        return strict.from_dict(cls, values, "preprocess rule", InputError)


def _check_rule(rule: PreprocessRule) -> None:
    for key, low, high in (("size", 1, MAX_SIZE), ("fill", 0, 255)):
        value = getattr(rule, key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{key}: expected a whole number from {low} to {high:,}, got {value!r}")
    for key, choices in (("interpolation", get_args(Interpolation)), ("resize_mode", get_args(ResizeMode))):
        value = getattr(rule, key)
        if value not in choices:
            raise InputError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
    for key in ("mean", "std"):
        value = getattr(rule, key)
        if not isinstance(value, tuple) or len(value) != 3 or not all(math.isfinite(number) for number in value):
            raise InputError(f"{key}: expected a tuple of three finite numbers (red, green, blue), got {value!r}")
    if min(rule.std) <= 0:
        raise InputError(f"std: expected three numbers above 0, got {rule.std!r}")


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a picture go: the axes that are computed, and the padding before them (left, top)."""

    columns: Axis
    rows: Axis
    left: int
    top: int


def place(width: int, height: int, size: int, resize_mode: ResizeMode) -> Placement:
    """The geometry of a rule for one picture size. A side that would round to no pixel at all keeps one."""
    if resize_mode == "squash":
        new_width, new_height = size, size
    elif resize_mode == "longest":
        ratio = max(width, height) / size
        new_width, new_height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    elif width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    columns, left = _crop_or_pad(width, new_width, size)
    rows, top = _crop_or_pad(height, new_height, size)
    return Placement(columns, rows, left, top)


def _crop_or_pad(source: int, resized: int, size: int) -> tuple[Axis, int]:
    """The window of one axis, and how many pixels of padding come before it."""
    if resized < size:
        return Axis(source, resized, 0, resized), (size - resized) // 2
    # round() is half to even, as in the public centre crop
    return Axis(source, resized, round((resized - size) / 2.0), size), 0


class Preprocessor:
    """Applies one rule. Holds no buffers, so threads may share it.

    mode "exact" equals Pillow 12.3 bit for bit. "fast" first halves RGB and grey pictures while they stay at least
    twice the wanted size; pixels then differ by a few levels of 255 at edges.
    """

    def __init__(self, rule: PreprocessRule, mode: Mode = "exact") -> None:
        if mode not in get_args(Mode):
            raise InputError(f"preprocess mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        self.rule = rule
        self.mode: Mode = mode
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        # 256 possible inputs per channel: the table holds (u8 / 255 - mean) / std as float32 arithmetic gives it
        mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (rule.mean, rule.std))
        self._normalised = (levels - mean) / std

    def __call__(self, image: Pixels | Picture, *, color: ChannelOrder = "rgb") -> npt.NDArray[np.float32]:
        """float32[3, S, S] = (u8 / 255 - mean) / std, in the order red, green, blue. See `pixels_u8` for the input."""
        pixels = self.pixels_u8(image, color=color)
        out = np.empty((3, self.rule.size, self.rule.size), np.float32)
        for channel in range(3):
            np.take(self._normalised[channel], pixels[:, :, channel], out=out[channel], mode="clip")
        return out

    def pixels_u8(self, image: Pixels | Picture, *, color: ChannelOrder = "rgb") -> U8:
        """The resized and cropped picture, just before it becomes float: uint8[S, S, 3], RGB.

        image: uint8[H, W, 3] in the channel order `color`, or a Picture in any mode. A camera's BGR frame is given as
        it is, with color="bgr": only the small result is reordered, the frame is not copied. Raises InputError
        otherwise.
        """
        if color not in get_args(ChannelOrder):
            raise InputError(f"color must be one of {', '.join(get_args(ChannelOrder))}, got {color!r}")
        if isinstance(image, Picture):
            return self._of_picture(image)
        _check_frame(image)
        resized = self._placed(image, "RGB", self.rule.fill)
        return resized if color == "rgb" else np.ascontiguousarray(resized[:, :, ::-1])

    def _of_picture(self, picture: Picture) -> U8:
        fill: Any = self.rule.fill
        if picture.mode == "1":
            fill = 255 if fill else 0
        elif picture.mode == "P":
            fill = picture.palette_color(fill)
        elif picture.mode == "CMYK":
            # four inks of this strength: none is white paper, all is black
            fill = round((255 - fill) ** 2 / 255)
        return to_rgb(self._placed(picture.pixels, picture.mode, fill), picture.mode)

    def _placed(self, pixels: Pixels, mode: str, fill: Any) -> Any:
        """The picture in its own mode, [S, S, ...]: resized, cropped, padded."""
        height, width = pixels.shape[:2]
        placement = place(width, height, self.rule.size, self.rule.resize_mode)
        resized = self._resized(pixels, mode, placement.columns, placement.rows)
        if resized.shape[:2] == (self.rule.size, self.rule.size):
            return resized
        out = np.empty((self.rule.size, self.rule.size, *resized.shape[2:]), resized.dtype)
        out[:] = fill
        top, left = placement.top, placement.left
        out[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        return out

    def _resized(self, pixels: Any, mode: str, columns: Axis, rows: Axis) -> Any:
        """Pillow's resize for one mode, only the wanted window."""
        filtering = self.rule.interpolation
        if columns.unchanged and rows.unchanged:
            return pixels[rows.start : rows.start + rows.count, columns.start : columns.start + columns.count]
        if mode in ("1", "P"):
            return resize_nearest(pixels, columns, rows)
        if mode == "I;16":
            return resize_u16(pixels, columns, rows, filtering)
        if mode in ("LA", "RGBA"):
            return _unpremultiplied(resize_u8(_premultiplied(pixels), columns, rows, filtering))
        bands = pixels if pixels.ndim == 3 else pixels[:, :, None]
        if self.mode == "fast":
            bands, columns, rows = halved(bands, columns, rows)
        resized = resize_u8(bands, columns, rows, filtering)
        return resized if pixels.ndim == 3 else resized[:, :, 0]


def _check_frame(image: object) -> None:
    """A frame is uint8[H, W, 3] with at least one pixel."""
    advice = "pass one picture as uint8[height, width, 3], or a Picture from read_picture"
    if not isinstance(image, np.ndarray):
        raise InputError(f"expected a numpy array, got {type(image).__name__}; {advice}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"expected uint8[height, width, 3], got {image.dtype}{list(image.shape)}; {advice}")


def _premultiplied(pixels: U8) -> U8:
    """Colours times alpha / 255, rounded as Pillow does; the last channel is alpha and stays."""
    out = np.ascontiguousarray(pixels).copy()
    for top in range(0, len(out), STRIP_ROWS):
        strip = out[top : top + STRIP_ROWS]
        product = strip[:, :, :-1].astype(np.uint16) * strip[:, :, -1:] + 128
        strip[:, :, :-1] = ((product >> 8) + product) >> 8
    return out


def _unpremultiplied(pixels: U8) -> U8:
    """Colours times 255 / alpha, rounded down and clipped; where alpha is 0 or 255 they stay."""
    alpha = pixels[:, :, -1:].astype(np.uint32)
    divided = np.minimum(pixels[:, :, :-1].astype(np.uint32) * 255 // np.maximum(alpha, 1), 255).astype(np.uint8)
    kept = (alpha == 0) | (alpha == 255)
    return np.concatenate([np.where(kept, pixels[:, :, :-1], divided), pixels[:, :, -1:]], axis=2)


def halved(pixels: U8, columns: Axis, rows: Axis) -> tuple[U8, Axis, Axis]:
    """Average blocks of 2 x 2 while the picture stays at least twice as large as wanted; the axes follow.

    An odd last row or column is dropped; the extents keep the geometry right to a fraction of a pixel.
    """
    while columns.source >= 4 * columns.size and rows.source >= 4 * rows.size:
        height, width = rows.source // 2, columns.source // 2
        pixels = cv2.resize(pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        pixels = pixels.reshape(height, width, -1)
        columns, rows = _half(columns), _half(rows)
    return pixels, columns, rows


def _half(axis: Axis) -> Axis:
    extent = float(axis.source) if axis.extent is None else axis.extent
    return Axis(axis.source // 2, axis.size, axis.start, axis.count, extent / 2)
