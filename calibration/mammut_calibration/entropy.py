"""Where to cut a histogram so that 8 bits lose the least information: the smallest Kullback-Leibler divergence.

For each candidate threshold the part below it is compared with what remains of it when its bins are gathered into the
levels that an 8-bit number has on one side of zero. Cutting low loses the tail, cutting high makes the levels coarse.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 128
"""Values of a signed 8-bit number on one side of zero."""
_CANDIDATES = 120
"""Thresholds that are tried, spread evenly over the bins in use."""


def entropy_threshold(magnitudes: NDArray[np.int64]) -> float:
    """The best threshold for a histogram of absolute values, in bins from its start.

    magnitudes: int64[N], counts of absolute values in N bins of one width from 0 on; N at least 128.
    """
    used = np.flatnonzero(magnitudes)
    if not used.size:
        return 0.0
    end = int(used[-1]) + 1
    if end <= LEVELS:
        return float(end)
    stops = np.unique(np.linspace(LEVELS, end, _CANDIDATES).astype(np.int64))
    losses = [_loss(magnitudes.astype(np.float64), int(stop), end) for stop in stops]
    # of equal losses the widest range: it cuts the least
    best = len(losses) - 1 - int(np.argmin(losses[::-1]))
    return float(stops[best])


def _loss(magnitudes: NDArray[np.float64], stop: int, end: int) -> float:
    """Divergence of the histogram, its tail moved into the last bin, from its form with LEVELS levels."""
    kept = magnitudes[:stop]
    whole = kept.copy()
    whole[-1] += magnitudes[stop:end].sum()
    edges = np.arange(LEVELS) * stop // LEVELS
    level_of = np.repeat(np.arange(LEVELS), np.diff(np.append(edges, stop)))
    filled = whole > 0
    sums = np.add.reduceat(kept, edges)
    slots = np.add.reduceat(filled.astype(np.float64), edges)
    # A level gives every bin that holds something the same share of what the level holds.
    rebuilt = np.where(filled, (sums / np.maximum(slots, 1.0))[level_of], 0.0)
    p, q = whole / whole.sum(), rebuilt / max(rebuilt.sum(), 1.0)
    q = np.maximum(q, 1e-12)  # a bin that only the tail fills
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())
