"""Matrices of few bits: the arithmetic of weight quantization, in NumPy, and how 4-bit numbers are stored.

Weights are quantized symmetrically: value = scale * integer, zero is zero. TensorRT knows no other form, and the
integer kernels of all engines are fastest with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mammut_export.weights import WeightStore

INT8_LARGEST = 127
"""-128 is not used: the range is the same on both sides."""
INT4_SMALLEST, INT4_LARGEST = -8, 7
SMALLEST_BLOCK = 8
"""Engines' fast kernels begin at 16; 8 is for models so small that their widths have no larger factor."""
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_LARGEST_BECOMES = tuple(float(each) for each in np.arange(6.5, 10.6, 0.5))
"""What the weight of largest magnitude of a block may become, tried in turn: above 8 it is cut off, and the others
gain. Measured on the demo's weights, blocks of 32: relative error 0.098 with 7 alone, 0.087 with all, 0.082 with a
scale whose sign makes the largest weight negative (there are eight negative integers and seven positive ones), and
0.078 with zero points, which TensorRT does not take."""
_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """value = scale * integer, each scale for a row, a column, or a block of a column."""

    integers: NDArray[Any]
    """int8 or ml_dtypes.int4, of the weight's shape."""
    scales: NDArray[np.float32]
    """int8: one for each channel of the axis. int4: [K / block, N]."""
    axis: int
    """int8: the axis that the scales belong to. int4: the one that is cut into blocks."""
    block: int = 0
    """Length of a block along the axis; 0: the scales are for whole channels."""

    def restored(self) -> NDArray[np.float32]:
        """float32, of the weight's shape: what an engine computes with."""
        if self.block:
            scales = np.repeat(self.scales, self.block, axis=self.axis)
        else:
            scales = _along(self.scales, self.axis, self.integers.ndim)
        return self.integers.astype(np.float32) * scales


def int8_channels(weight: NDArray[np.float32], axis: int) -> QuantizedMatrix:
    """8 bits, one scale for each channel of an axis of a weight (finite, of any dimensions).

    A channel of zeros gets scale 1. The error of a weight is at most half its scale.
    """
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scales = _usable(np.abs(weight).max(axis=others, initial=0.0) / np.float32(INT8_LARGEST))
    integers = np.rint(weight / _along(scales, axis, weight.ndim))
    return QuantizedMatrix(np.clip(integers, -INT8_LARGEST, INT8_LARGEST).astype(np.int8), scales, axis)


def _along(scales: NDArray[np.float32], axis: int, dimensions: int) -> NDArray[np.float32]:
    """The same with dimensions of size 1 around, to be multiplied."""
    return scales.reshape([-1 if each == axis else 1 for each in range(dimensions)])


def int4_blocks(matrix: NDArray[np.float32], block: int, signed_scales: bool = True) -> QuantizedMatrix:
    """4 bits, one scale for each block of `block` rows of each column of float32[K, N]; K is a multiple of `block`.

    Of several scales each block takes the one with the smallest squared error. signed_scales: they may be negative,
    which is a little more accurate.
    """
    rows, columns = matrix.shape
    integers = np.empty(matrix.shape, ml_dtypes.int4)
    scales = np.empty((rows // block, columns), np.float32)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        part = slice(start, start + _COLUMNS_AT_ONCE)
        blocks = np.ascontiguousarray(matrix[:, part]).reshape(rows // block, block, -1)
        scales[:, part] = _best_scales(blocks, signed_scales)
        integers[:, part] = _int4(blocks, scales[:, part]).reshape(rows, -1).astype(ml_dtypes.int4)
    return QuantizedMatrix(integers, scales, 0, block)


def _best_scales(blocks: NDArray[np.float32], signed: bool) -> NDArray[np.float32]:
    """float32[blocks, columns] for float32[blocks, rows of a block, columns]."""
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    largest = _usable(np.abs(extreme))
    unit = blocks / largest[:, None]  # so that no square overflows or vanishes
    sign = np.where(signed & (extreme > 0), np.float32(-1), np.float32(1)).astype(np.float32)
    best_error = np.full(extreme.shape, np.inf, np.float32)
    best_scales = np.ones_like(extreme)
    for becomes in _LARGEST_BECOMES:
        scales = (sign / np.float32(becomes)).astype(np.float32)
        difference = _int4(unit, scales) * scales[:, None] - unit
        error = np.einsum("brc,brc->bc", difference, difference)
        better = error < best_error
        best_error[better], best_scales[better] = error[better], scales[better]
    return _usable(best_scales * largest)


def block_for(rows: int, preferred: int) -> int | None:
    """The largest block of at most `preferred`, halved until it divides the rows; None if none does."""
    block = preferred
    while block >= SMALLEST_BLOCK:
        if rows % block == 0:
            return block
        block //= 2
    return None


class PackingStore(WeightStore):
    """A WeightStore that packs 4-bit numbers two to a byte, the first in the lower half, as ONNX does."""

    def add(self, array: NDArray[Any]) -> tuple[int, int]:
        """Offset and length in bytes of the array's content."""
        return super().add(pack(array) if array.dtype == ml_dtypes.int4 else array)


def pack(array: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8[half the size, rounded up] of an ml_dtypes.int4 array of any shape."""
    flat = array.reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: NDArray[np.uint8] = flat[0::2] | np.left_shift(flat[1::2], 4, dtype=np.uint8)
    return packed


def _int4(blocks: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    integers: NDArray[np.float32] = np.clip(np.rint(blocks / scales[:, None]), INT4_SMALLEST, INT4_LARGEST)
    return integers


def _usable(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 in place of scales that are zero or too small to divide by."""
    return np.where(np.abs(scales) >= _SMALLEST_SCALE, scales, np.float32(1)).astype(np.float32)
