"""Pillow 12.3's antialiased resize, restated bit for bit and made fast with matrix products.

Models of this family were trained on pictures that Pillow shrank, so its rounding is part of the model. Pillow
filters one axis at a time with 22-bit fixed-point weights and rounds to 8 bits between the two passes. Here each pass
is a banded matrix product: a block of neighbouring output lines reads one short span of input lines. Float32 holds
integers below 2^24 exactly, so the weights are split into a high and a low half whose sums stay below that; where
they would not (shrinking by more than about 30), float64 does the same without a split. Only what the crop keeps is
computed.

This file knows arrays and axes. Picture modes, crops and rules are in `preprocess`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

Interpolation = Literal["bicubic", "bilinear"]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

WEIGHT_BITS = 22
"""Pillow's fixed-point precision: 32 bits less 8 of the pixel and 2 of head room for overshoot."""
SPLIT_BITS = 11
"""The low half of a weight; the high half then has 11 bits and a sign."""
FLOAT32_EXACT = 1 << 24
"""Every integer up to here is a float32, so float32 sums that stay below it are exact in any order."""
BLOCK = 8
"""Output lines per matrix product. Measured for 1080p to 224: 8 beats 16 and 24 (fewer multiplications by zero)."""
ONE_THREAD_PRODUCT = 1 << 18
"""Multiplications in one matrix product. Up to here OpenBLAS stays on the calling thread. Above, it wakes one thread
per core; on a device whose cores are busy they wait for each other: 7 ms became 230 ms (measured, 1080p, 4 busy
cores)."""
STRIP_ROWS = 1200
"""Rows filtered along the width at a time; bounds the working memory for very large pictures."""
LONGEST_SUM = 1 << 22
"""Nearest-neighbour positions beyond this are multiplied out, not added up: a very long picture, much enlarged."""
CACHED_SOURCE = 16_384
"""Axes longer than this are not cached: their weights take megabytes, and no camera sends them twice."""


@dataclass(frozen=True)
class Axis:
    """One axis of a resize, of which only a window is wanted.

    `source` pixels become `size` pixels, of which `count` from `start` are computed. `extent` is the length of the
    source in source pixels when it is not a whole number (a picture already shrunk by blocks); None means `source`.
    """

    source: int
    size: int
    start: int
    count: int
    extent: float | None = None

    @property
    def unchanged(self) -> bool:
        """True when Pillow would not filter this axis at all."""
        return self.source == self.size and self.extent is None


@dataclass(frozen=True, eq=False)
class Taps:
    """The weights of each wanted output pixel: `first[count]`, `last[count]` (exclusive) and `weights[count, taps]`."""

    first: I64
    last: I64
    weights: F64


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring output lines that are computed together from the input lines `first:last`."""

    outputs: slice
    first: int
    last: int
    weights: npt.NDArray[np.float32] | F64
    """float32[2 n, last - first], the high halves above the low halves, or float64[n, last - first]."""


def taps(axis: Axis, interpolation: Interpolation) -> Taps:
    """The normalised float64 weights of Pillow's filter, computed in its order of operations."""
    extent = float(axis.source) if axis.extent is None else axis.extent
    scale = extent / axis.size
    stretch = max(scale, 1.0)
    support = (2.0 if interpolation == "bicubic" else 1.0) * stretch
    center = (np.arange(axis.start, axis.start + axis.count) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), axis.source)
    steps = np.arange(int((last - first).max()))
    distance = np.abs(((steps + first[:, None]) - center[:, None] + 0.5) * (1.0 / stretch))
    weights = _bicubic(distance) if interpolation == "bicubic" else np.maximum(1.0 - distance, 0.0)
    weights[steps >= (last - first)[:, None]] = 0.0
    # cumsum adds one by one, as the C loop does; sum() adds in pairs and may differ in the last bit
    total = np.cumsum(weights, axis=1)[:, -1:]
    return Taps(first, last, np.divide(weights, total, out=weights, where=total != 0.0))


def _bicubic(distance: F64) -> F64:
    """Keys' cubic with a = -0.5 (OpenCV and PyTorch use -0.75)."""
    a = -0.5
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    return np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))


def blocks(axis: Axis, interpolation: Interpolation) -> tuple[Block, ...]:
    """The banded weight matrix of an axis, cached for the sizes met last."""
    return _build_blocks(axis, interpolation) if axis.source > CACHED_SOURCE else _cached_blocks(axis, interpolation)


def _build_blocks(axis: Axis, interpolation: Interpolation) -> tuple[Block, ...]:
    wanted = taps(axis, interpolation)
    scaled = wanted.weights * (1 << WEIGHT_BITS)
    fixed = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64)
    bands = []
    for begin in range(0, axis.count, BLOCK):
        end = min(begin + BLOCK, axis.count)
        first, last = int(wanted.first[begin:end].min()), int(wanted.last[begin:end].max())
        band = np.zeros((end - begin, last - first), np.int64)
        for line in range(begin, end):
            used = int(wanted.last[line] - wanted.first[line])
            offset = int(wanted.first[line]) - first
            band[line - begin, offset : offset + used] = fixed[line, :used]
        bands.append((slice(begin, end), first, last, band))
    split = all(_fits_float32(band) for *_, band in bands)
    return tuple(Block(outputs, first, last, _as_floats(band, split)) for outputs, first, last, band in bands)


_cached_blocks = lru_cache(maxsize=16)(_build_blocks)


def _halves(band: I64) -> tuple[I64, I64]:
    """High and low halves of fixed-point weights; the low half is signed, which halves its sums."""
    high = (band + (1 << (SPLIT_BITS - 1))) >> SPLIT_BITS
    return high, band - (high << SPLIT_BITS)


def _fits_float32(band: I64) -> bool:
    """True when no sum of weighted 8-bit pixels, however ordered, leaves the integers that float32 holds exactly."""
    return all(255 * int(np.abs(half).sum(axis=1).max()) < FLOAT32_EXACT for half in _halves(band))


def _as_floats(band: I64, split: bool) -> npt.NDArray[np.float32] | F64:
    """Float weights for `_filter`, scaled by a power of two, which rounds nothing."""
    if split:
        return (np.concatenate(_halves(band)) * 2.0**-SPLIT_BITS).astype(np.float32)
    return band * 2.0**-WEIGHT_BITS


def _filter(lines: U8, base: int, plan: tuple[Block, ...], count: int) -> U8:
    """uint8[count, M] from uint8[L, M], whose first line is line `base` of the source; sums are rounded half up."""
    width = lines.shape[1]
    out = np.empty((count, width), np.uint8)
    parts = -(-width * max(block.weights.size for block in plan) // ONE_THREAD_PRODUCT)
    part = -(-width // parts)
    padded = parts * part
    kind = plan[0].weights.dtype
    room = np.zeros(max(block.last - block.first for block in plan) * padded, kind)
    for block in plan:
        span = block.last - block.first
        source = room[: span * padded].reshape(span, padded)
        np.copyto(source[:, :width], lines[block.first - base : block.last - base])
        # a stack of products, one per part of the width; numpy hands each to the matrix library on its own
        sums = np.empty((block.weights.shape[0], padded), kind)
        np.matmul(block.weights, _parts(source, part), out=_parts(sums, part))
        out[block.outputs] = _rounded(sums[:, :width])
    return out


def _parts(lines: npt.NDArray[Any], part: int) -> npt.NDArray[Any]:
    """[parts, lines, part], a view of [lines, parts * part]."""
    return lines.reshape(lines.shape[0], -1, part).swapaxes(0, 1)


def _rounded(sums: npt.NDArray[Any]) -> U8:
    """uint8[n, M] from the sums of one block, rounded half up and clipped to 0..255."""
    if sums.dtype == np.float64:
        high, low, gain, tie = sums, sums, 0.0, 2.0 ** -(WEIGHT_BITS + 1)
    else:
        # floor((high * 2^11 + low + 2^21) / 2^22) needs only the floor of low / 2^11 beside high: exact in float32
        high, low = np.split(sums, 2)
        np.floor(low, out=low)
        gain, tie = 2.0**-SPLIT_BITS, 2.0 ** -(SPLIT_BITS + 1)
    # OpenCV rounds halves to even and Pillow rounds them up; half of the smallest step decides every tie upwards
    return np.asarray(cv2.addWeighted(high, 1.0, low, gain, tie, dtype=cv2.CV_8U), np.uint8)


def _along_width(pixels: U8, left: int, axis: Axis, interpolation: Interpolation) -> U8:
    """uint8[H, W, C], whose first column is column `left` of the source, to uint8[H, axis.count, C]."""
    if axis.unchanged:
        return pixels[:, axis.start - left : axis.start - left + axis.count]
    plan = blocks(axis, interpolation)
    height, width, channels = pixels.shape
    out = np.empty((height, axis.count, channels), np.uint8)
    for top in range(0, height, STRIP_ROWS):
        strip = pixels[top : top + STRIP_ROWS]
        lines = _swap(strip).reshape(width, -1)
        filtered = _filter(lines, left, plan, axis.count)
        out[top : top + STRIP_ROWS] = _swap(filtered.reshape(axis.count, strip.shape[0], channels))
    return out


def _along_height(pixels: U8, top: int, axis: Axis, interpolation: Interpolation) -> U8:
    """uint8[H, W, C], whose first row is row `top` of the source, to uint8[axis.count, W, C]."""
    if axis.unchanged:
        return pixels[axis.start - top : axis.start - top + axis.count]
    height, width, channels = pixels.shape
    lines = np.ascontiguousarray(pixels).reshape(height, width * channels)
    filtered = _filter(lines, top, blocks(axis, interpolation), axis.count)
    return filtered.reshape(axis.count, width, channels)


def _swap(pixels: U8) -> U8:
    """uint8[A, B, C] to a dense uint8[B, A, C]; OpenCV moves whole pixels, several times faster than numpy."""
    height, width, channels = pixels.shape
    return np.asarray(cv2.transpose(pixels), np.uint8).reshape(width, height, channels)


def _dense(pixels: U8) -> U8:
    """The pixels with each row in one piece, as OpenCV reads them without a copy; mirrored views are copied."""
    channels = pixels.shape[2]
    ordered = pixels.strides[1:] == (channels, 1) and pixels.strides[0] >= pixels.shape[1] * channels
    return pixels if ordered else np.ascontiguousarray(pixels)


def _read_by(axis: Axis, interpolation: Interpolation) -> tuple[int, int]:
    """The half-open range of source pixels that the window of this axis reads."""
    if axis.unchanged:
        return axis.start, axis.start + axis.count
    plan = blocks(axis, interpolation)
    return min(block.first for block in plan), max(block.last for block in plan)


def _height_first(columns: Axis, rows: Axis) -> bool:
    """Pillow 12.3 filters the height first when a picture is over 100 times as tall as wide and gets shorter."""
    return rows.source > columns.source * 100 and rows.size < rows.source


def resize_u8(pixels: U8, columns: Axis, rows: Axis, interpolation: Interpolation) -> U8:
    """The wanted window of the resized picture: uint8[rows.count, columns.count, C] from uint8[H, W, C], C in 1..4."""
    left, right = _read_by(columns, interpolation)
    top, bottom = _read_by(rows, interpolation)
    region = _dense(pixels[top:bottom, left:right])
    if _height_first(columns, rows):
        return _along_width(_along_height(region, top, rows, interpolation), left, columns, interpolation)
    return _along_height(_along_width(region, left, columns, interpolation), top, rows, interpolation)


def resize_u16(pixels: U16, columns: Axis, rows: Axis, interpolation: Interpolation) -> U16:
    """The wanted window of a resized 16-bit grey picture: uint16[rows.count, columns.count] from uint16[H, W].

    Pillow sums these in float64, tap by tap, and rounds to 16 bits between the passes.
    """
    left, right = _read_by(columns, interpolation)
    top, bottom = _read_by(rows, interpolation)
    region = pixels[top:bottom, left:right]
    if _height_first(columns, rows):
        narrow = _filter_u16(region.T, top, rows, interpolation).T
        return _filter_u16(narrow, left, columns, interpolation)
    wide = _filter_u16(region, left, columns, interpolation)
    return _filter_u16(wide.T, top, rows, interpolation).T


def _filter_u16(pixels: U16, base: int, axis: Axis, interpolation: Interpolation) -> U16:
    """uint16[M, axis.count] from uint16[M, L], filtered along the last axis."""
    if axis.unchanged:
        return pixels[:, axis.start - base : axis.start - base + axis.count]
    wanted = taps(axis, interpolation)
    sums = np.zeros((pixels.shape[0], axis.count), np.float64)
    for tap in range(wanted.weights.shape[1]):
        # one past the end has weight 0: read any pixel there
        column = np.minimum(wanted.first - base + tap, pixels.shape[1] - 1)
        sums += pixels[:, column] * wanted.weights[:, tap]
    return np.clip(np.floor(sums + 0.5), 0, 65535).astype(np.uint16)


def resize_nearest(pixels: npt.NDArray[np.generic], columns: Axis, rows: Axis) -> npt.NDArray[np.generic]:
    """The wanted window of a nearest-neighbour resize: [rows.count, columns.count, ...] from [H, W, ...]."""
    return pixels[_nearest(rows)][:, _nearest(columns)]


def _nearest(axis: Axis) -> I64:
    """int64[count] source indices. Pillow adds the step again and again, so its rounding errors add up and are kept."""
    scale = axis.source / axis.size
    if axis.start + axis.count > LONGEST_SUM:
        positions = (np.arange(axis.start, axis.start + axis.count) + 0.5) * scale
    else:
        steps = np.full(axis.start + axis.count, scale)
        steps[0] = scale * 0.5
        positions = np.cumsum(steps)[axis.start :]
    return np.minimum(positions.astype(np.int64), axis.source - 1)
