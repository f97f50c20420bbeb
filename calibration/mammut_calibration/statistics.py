"""What a quantizer needs to know about a tensor's values, gathered in memory that does not grow with the data.

A histogram of fixed size covers [-limit, limit]. When a larger value comes, the limit doubles and neighbouring bins are
added together, so no value is ever looked at twice. The limit is always a power of two: bins of one size nest in bins
of the next, and the counts do not depend on the order of the data. So a run that was interrupted and resumed gives
the same table as one that was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.entropy import entropy_threshold
from mammut_runtime.errors import InputError

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
Counts = NDArray[np.int64]

HALF_BINS = 2048
"""Bins on each side of zero. With the limit a power of two, at least half of them are in use."""
BINS = 2 * HALF_BINS
DEFAULT_PERCENTILE = 99.99
"""Share of the values, in percent, that a "percentile" range holds."""
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -126, 128
"""Of the limit, as a power of two: what float32 holds."""
_AT_ONCE = 1 << 20
"""Values binned at once: bounds the scratch memory of large tensors."""


@dataclass(frozen=True)
class Range:
    """Values that a quantized tensor must be able to hold: low <= 0 <= high, for zero must be exact."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        """The larger of -low and high."""
        return max(-self.low, self.high)


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """All that was seen of one tensor."""

    minimum: float
    """Smallest finite value."""
    maximum: float
    """Largest finite value."""
    sum_abs: float
    """Sum of the absolute values."""
    values: int
    """Finite values seen."""
    not_finite: int
    """NaN and infinite values seen (masks of attention are infinite); in none of the other numbers."""
    runs: int
    """Runs of the graph in which it was seen."""
    limit: float
    """The histogram covers [-limit, limit]; a power of two."""
    counts: Counts
    """int64[4096]: values in each bin, from -limit to limit. A value on an edge counts in the upper bin."""

    @property
    def mean_abs(self) -> float:
        """Mean of the absolute values."""
        return self.sum_abs / self.values

    def range(
        self, method: Method = "minmax", *, percentile: float = DEFAULT_PERCENTILE, symmetric: bool = False
    ) -> Range:
        """The range to quantize.

        method: "minmax" is everything seen; "percentile" leaves the same share of values out at either end; "entropy"
        cuts where the distribution as 8 bits hold it is nearest to the whole one (Kullback-Leibler).
        percentile: above 50 to 100, for that method. symmetric: make low = -high, the larger of the two.
        """
        if method not in METHODS:
            raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        low, high = self.minimum, self.maximum
        if method == "percentile":
            if not 50 < percentile <= 100:
                raise InputError(f"percentile: expected a number above 50 and at most 100, got {percentile}")
            tail = (1 - percentile / 100) / 2
            low, high = max(low, self._quantile(tail)), min(high, self._quantile(1 - tail))
        if method == "entropy":
            threshold = self._entropy_threshold()
            low, high = max(low, -threshold), min(high, threshold)
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        return Range(low, high)

    def _quantile(self, share: float) -> float:
        """The value below which that share of the values lies, to within a bin."""
        cumulated = np.cumsum(self.counts)
        wanted = share * float(cumulated[-1])
        index = int(np.searchsorted(cumulated, wanted, side="left"))
        before = float(cumulated[index - 1]) if index else 0.0
        inside = (wanted - before) / max(float(self.counts[index]), 1.0)
        return (index + min(max(inside, 0.0), 1.0) - HALF_BINS) * self.limit / HALF_BINS

    def _entropy_threshold(self) -> float:
        magnitudes = self.counts[HALF_BINS:] + self.counts[:HALF_BINS][::-1]
        return entropy_threshold(magnitudes) * self.limit / HALF_BINS


class TensorCollector:
    """Gathers TensorStatistics, array by array."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)
        self._exponent: int | None = None
        self._minimum, self._maximum = math.inf, -math.inf
        self._sum_abs = 0.0
        self._values = self._not_finite = self._runs = 0

    def add(self, array: NDArray[Any]) -> None:
        """Take the values of one run: floats of any shape."""
        self._runs += 1
        flat = np.ravel(array)
        for start in range(0, flat.size, _AT_ONCE):
            self._add_part(flat[start : start + _AT_ONCE].astype(np.float32, copy=False))

    def _add_part(self, part: NDArray[np.float32]) -> None:
        low, high = float(part.min()), float(part.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN makes both NaN
            finite = part[np.isfinite(part)]
            self._not_finite += part.size - finite.size
            if not finite.size:
                return
            part, low, high = finite, float(finite.min()), float(finite.max())
        self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)
        self._values += part.size
        self._sum_abs += float(np.abs(part).sum(dtype=np.float64))
        self._widen(max(-low, high))
        assert self._exponent is not None
        # A power of two: the product is exact, and the same value always falls into the same bin.
        scaled = part * np.float64(HALF_BINS * 2.0**-self._exponent)
        indices = np.minimum(np.floor(scaled).astype(np.int64) + HALF_BINS, BINS - 1)
        self._counts += np.bincount(indices, minlength=BINS)

    def _widen(self, magnitude: float) -> None:
        """Let the histogram reach the magnitude."""
        needed = max(math.frexp(magnitude)[1] if magnitude else _SMALLEST_EXPONENT, _SMALLEST_EXPONENT)
        if self._exponent is None:
            self._exponent = needed
        doublings = needed - self._exponent
        for _ in range(min(doublings, HALF_BINS.bit_length())):
            merged = self._counts.reshape(HALF_BINS, 2).sum(axis=1)
            self._counts = np.zeros(BINS, np.int64)
            self._counts[HALF_BINS // 2 : HALF_BINS // 2 + HALF_BINS] = merged
        self._exponent = max(self._exponent, needed)

    @property
    def empty(self) -> bool:
        """Whether no finite value was seen."""
        return self._values == 0

    def result(self) -> TensorStatistics:
        """What was gathered so far. Only when not `empty`."""
        assert self._exponent is not None
        return TensorStatistics(
            minimum=self._minimum,
            maximum=self._maximum,
            sum_abs=self._sum_abs,
            values=self._values,
            not_finite=self._not_finite,
            runs=self._runs,
            limit=2.0**self._exponent,
            counts=self._counts.copy(),
        )

    @classmethod
    def resumed(cls, seen: TensorStatistics) -> TensorCollector:
        """A collector that goes on where the one that gave this result stopped."""
        collector = cls()
        collector._counts = seen.counts.copy()
        collector._exponent = math.frexp(seen.limit)[1] - 1
        collector._minimum, collector._maximum = seen.minimum, seen.maximum
        collector._sum_abs = seen.sum_abs
        collector._values, collector._not_finite, collector._runs = seen.values, seen.not_finite, seen.runs
        return collector


def check(statistics: TensorStatistics) -> str | None:
    """What is wrong with statistics read from a file, or None: numbers that no data could have given."""
    numbers = (statistics.minimum, statistics.maximum, statistics.sum_abs, statistics.limit)
    if not all(math.isfinite(number) for number in numbers):
        return "a number is not finite"
    exponent = math.frexp(statistics.limit)[1] - 1
    if statistics.limit != 2.0**exponent or not _SMALLEST_EXPONENT <= exponent <= _LARGEST_EXPONENT:
        return f"limit: expected a power of two, got {statistics.limit}"
    if not -statistics.limit <= statistics.minimum <= statistics.maximum <= statistics.limit:
        return f"expected {-statistics.limit} <= minimum <= maximum <= {statistics.limit}"
    if statistics.sum_abs < 0 or min(statistics.runs, statistics.values) < 1 or statistics.not_finite < 0:
        return "sum_abs, runs, values or not_finite is out of range"
    if statistics.counts.shape != (BINS,) or statistics.counts.min() < 0:
        return f"counts: expected {BINS} numbers of at least 0"
    if statistics.counts.sum() != statistics.values:
        return "the counts do not add up to the number of values"
    return None
