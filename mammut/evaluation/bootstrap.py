"""How far a figure may be off because the set is only a sample: percentile intervals by resampling its items.

What is drawn anew is the picture, with everything about it: captions and questions of one picture are alike. The same
seed draws the same pictures, so two models are compared on the same resamples (a paired test).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[F64], F64]
"""Weights of the items float64[R, N], each how often an item is drawn, to the figure for each of R resamples."""
_VALUES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How to resample."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def interval(self, statistic: Statistic, items: int, groups: Ints | None = None) -> Interval:
        """The interval that holds the middle `confidence` of the figure over the resamples.

        groups: int64[N], numbers from 0 on: items that are drawn together. None: each on its own. Resamples where the
        figure is not defined (of a kind of question that was not drawn) do not count.
        """
        values = np.concatenate([statistic(weights) for weights in self._weights(items, groups)])
        values = values[np.isfinite(values)]
        if not len(values):
            return Interval(float("nan"), float("nan"))
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(values, [outside, 1 - outside])
        return Interval(float(low), float(high))

    def _weights(self, items: int, groups: Ints | None) -> Iterator[F64]:
        generator = np.random.default_rng(self.seed)
        drawn = items if groups is None else int(groups.max()) + 1
        at_once = max(1, _VALUES_AT_ONCE // max(items, drawn))
        for start in range(0, self.resamples, at_once):
            count = min(at_once, self.resamples - start)
            weights = np.stack([np.bincount(generator.integers(0, drawn, drawn), minlength=drawn)
                                for _ in range(count)]).astype(np.float64)  # fmt: skip
            yield weights if groups is None else weights[:, groups]


def mean_of(values: F64, counted: NDArray[np.bool_] | None = None) -> Statistic:
    """The mean of the items' values, or of those that are counted."""
    share = np.ones(len(values)) if counted is None else counted.astype(np.float64)
    weighted = values * share

    def statistic(weights: F64) -> F64:
        with np.errstate(invalid="ignore"):
            found: F64 = (weights @ weighted) / (weights @ share)
        return found

    return statistic


def point(statistic: Statistic, items: int) -> float:
    """The figure itself: every item once."""
    return float(statistic(np.ones((1, items)))[0])
