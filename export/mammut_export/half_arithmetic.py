"""What a graph's operators give when every step is rounded to float16: for the range audit, in NumPy.

Each operator is written once, over an `Arithmetic`: exact (float32 throughout) or half. Half is what a GPU may do at
worst in a float16 network: products of 16 terms are added exactly and their sums in float16, one after another, as its
matrix units do; long sums are added in 32 lanes, which are then added pairwise, as its threads do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CHUNK, LANES = 16, 32
MOST_ROWS = 64
"""Of a product: for more, the rows with the largest values and others evenly between."""


class Arithmetic:
    """Float32, with every result rounded to float16 if `half`."""

    def __init__(self, half: bool) -> None:
        self.half = half

    def round(self, values: Array) -> Array:
        if not self.half:
            return values
        with np.errstate(over="ignore", invalid="ignore"):
            rounded: Array = values.astype(np.float16).astype(np.float32)
            return rounded

    def sum(self, values: Array) -> Array:
        """Over the last axis, which is kept with size 1."""
        if not self.half or values.shape[-1] < 2:
            exact: Array = values.sum(axis=-1, keepdims=True, dtype=np.float32)
            return exact
        padded = math.ceil(values.shape[-1] / LANES) * LANES
        lanes = np.zeros((*values.shape[:-1], padded), np.float32)
        lanes[..., : values.shape[-1]] = values
        lanes = lanes.reshape(*values.shape[:-1], -1, LANES)
        total: Array = lanes[..., 0, :]
        for step in range(1, lanes.shape[-2]):
            total = self.round(total + lanes[..., step, :])
        while total.shape[-1] > 1:
            total = self.round(total[..., 0::2] + total[..., 1::2])
        return total

    def matmul(self, left: Array, right: Array) -> Array:
        if not self.half:
            product: Array = np.matmul(left, right)
            return product
        total: Array | None = None
        for start in range(0, left.shape[-1], CHUNK):
            part = np.matmul(left[..., start : start + CHUNK], right[..., start : start + CHUNK, :])
            total = self.round(part if total is None else total + part)
        return np.zeros(1, np.float32) if total is None else total


EXACT, HALF = Arithmetic(False), Arithmetic(True)
Operator = Callable[[Arithmetic, Sequence[Array], Mapping[str, Any]], Array]


def operator(op_type: str) -> Operator | None:
    """The operator, None for one that only moves values or is not known here."""
    return _OPERATORS.get(op_type)


def _matmul(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    left, right = inputs[0], inputs[1]
    if left.ndim < 2 or right.ndim < 2:
        return a.round(np.matmul(left, right))
    return a.matmul(_some_rows(left), right)


def _gemm(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    left = inputs[0].T if attributes.get("transA") else inputs[0]
    right = inputs[1].T if attributes.get("transB") else inputs[1]
    product = a.round(a.matmul(_some_rows(left), right) * np.float32(attributes.get("alpha", 1.0)))
    if len(inputs) < 3 or inputs[2].ndim > 1:
        return product
    return a.round(product + np.float32(attributes.get("beta", 1.0)) * inputs[2])


def _conv(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    """Patches side by side only: a vision transformer's first layer. Others are not judged (an empty result)."""
    pixels, kernel = inputs[0], inputs[1]
    size = kernel.shape[2:]
    plain = pixels.ndim == 4 and tuple(attributes.get("strides", ())) == size and not any(attributes.get("pads", ()))
    if not plain or attributes.get("group", 1) != 1 or any(n % s for n, s in zip(pixels.shape[2:], size, strict=True)):
        return np.zeros(0, np.float32)
    batch, channels, height, width = pixels.shape
    patches = pixels.reshape(batch, channels, height // size[0], size[0], width // size[1], size[1])
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * size[0] * size[1])
    product = a.matmul(_some_rows(patches), kernel.reshape(len(kernel), -1).T)
    return a.round(product + inputs[2]) if len(inputs) > 2 else product


def _layer_norm(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    values, size = inputs[0], np.float32(inputs[0].shape[-1])
    centred = a.round(values - a.round(a.sum(values) / size))
    variance = a.round(a.sum(a.round(centred * centred)) / size)
    scale = a.round(1 / a.round(np.sqrt(a.round(variance + np.float32(attributes.get("epsilon", 1e-5))))))
    result = a.round(a.round(centred * scale) * inputs[1])
    return a.round(result + inputs[2]) if len(inputs) > 2 else result


def _softmax(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    values = np.moveaxis(inputs[0], attributes.get("axis", -1), -1)
    powers = a.round(np.exp(a.round(values - values.max(axis=-1, keepdims=True))))
    return a.round(powers / a.sum(powers))


def _gelu(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    values = inputs[0]
    scaled = a.round(values * np.float32(math.sqrt(0.5)))
    return a.round(a.round(values * np.float32(0.5)) * a.round(1 + a.round(_erf(scaled))))


def _erf(values: Array) -> Array:
    """Abramowitz and Stegun 7.1.26, within 1.5e-7: far below what is looked for here."""
    t = 1 / (1 + 0.3275911 * np.abs(values))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return (np.sign(values) * (1 - series * np.exp(-(values.astype(np.float64) ** 2)))).astype(np.float32)


def _reduction(inside: str, after: str) -> Operator:
    def reduce(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
        axes = [int(axis) for axis in (inputs[1] if len(inputs) > 1 else attributes.get("axes", range(inputs[0].ndim)))]
        values = np.moveaxis(inputs[0], axes, range(-len(axes), 0))
        values = values.reshape(*values.shape[: values.ndim - len(axes)], -1)
        if inside == "square":
            values = a.round(values * values)
        total = a.sum(values)
        if after == "mean":
            total = a.round(total / np.float32(values.shape[-1]))
        return a.round(np.sqrt(total)) if after == "root" else total

    return reduce


def _elementwise(function: Callable[..., Array]) -> Operator:
    def compute(a: Arithmetic, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
        return a.round(np.asarray(function(*inputs), np.float32))

    return compute


def _clip(values: Array, low: Array | None = None, high: Array | None = None) -> Array:
    values = values if low is None else np.maximum(values, low)
    return values if high is None else np.minimum(values, high)


def _some_rows(left: Array) -> Array:
    """Not all rows of a large matrix: the same for values as they are and for the same values rounded to float16."""
    rows = left.shape[-2]
    if rows <= MOST_ROWS:
        return left
    largest = HALF.round(np.abs(left).max(axis=-1).reshape(-1, rows).max(axis=0))
    chosen = set(np.argsort(-largest, kind="stable")[: MOST_ROWS // 2].tolist())
    chosen |= set(np.linspace(0, rows - 1, MOST_ROWS // 2).astype(int).tolist())
    return left[..., sorted(chosen), :]


_OPERATORS: dict[str, Operator] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "LayerNormalization": _layer_norm,
    "Softmax": _softmax,
    "Gelu": _gelu,
    "ReduceMean": _reduction("", "mean"),
    "ReduceSum": _reduction("", ""),
    "ReduceSumSquare": _reduction("square", ""),
    "ReduceL2": _reduction("square", "root"),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(np.divide),
    "Pow": _elementwise(np.power),
    "Sqrt": _elementwise(np.sqrt),
    "Exp": _elementwise(np.exp),
    "Log": _elementwise(np.log),
    "Tanh": _elementwise(np.tanh),
    "Erf": _elementwise(_erf),
    "Sigmoid": _elementwise(lambda x: 1 / (1 + np.exp(-x))),
    "Relu": _elementwise(lambda x: np.maximum(x, 0)),
    "Reciprocal": _elementwise(np.reciprocal),
    "Clip": _elementwise(_clip),
}
