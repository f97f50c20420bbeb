"""Proposals to detections: for each name, boxes that overlap a better one of the same name are left out.

The detector's boxes do not depend on the names, so who overlaps whom is computed once, for all names together. Then
every round takes, for all names at once, the best box that is left; there are as many rounds as boxes of the commonest
name, whatever the number of names.

Legend: P proposals, C names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.detection.boxes import Floats, iou_matrix
from mammut_runtime.errors import InputError


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left, best first."""

    proposals: NDArray[np.int64]
    """int64[K], which proposal."""
    names: NDArray[np.int64]
    """int64[K], which name."""
    scores: Floats
    """float32[K]."""


def class_wise_nms(
    boxes: Floats,
    scores: Floats,
    thresholds: Floats,
    iou: float,
    max_per_class: int | None = None,
) -> Kept:
    """Greedy suppression for each name on its own.

    boxes: float32[P, 4] xyxy. scores: float32[P, C]. thresholds: float32[C], lowest score that counts, per name.
    iou: boxes that overlap a kept one of their name by more than this are left out. max_per_class: most kept of one
    name; None keeps all. Equal scores: the earlier proposal first, then the earlier name. A box without area, or with
    NaN, counts as no box; a score that is NaN as none. Raises InputError for iou outside 0 to 1, or max_per_class
    below 1.
    """
    if not 0 <= iou <= 1:
        raise InputError(f"iou: expected a number from 0 to 1, got {iou}")
    if max_per_class is not None and max_per_class < 1:
        raise InputError(f"max_per_class must be at least 1, got {max_per_class}")
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    usable = (scores >= thresholds) & solid[:, None]
    rows, columns = np.flatnonzero(usable.any(axis=1)), np.flatnonzero(usable.any(axis=0))
    if not len(rows):
        return Kept(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    left = np.where(usable[np.ix_(rows, columns)], scores[np.ix_(rows, columns)], -np.inf).T.copy()
    apart = iou_matrix(boxes[rows], boxes[rows]) <= iou
    np.fill_diagonal(apart, False)  # a kept box is not taken again
    proposals, names, found = _rounds(left, apart, max_per_class)
    proposals, names = rows[proposals], columns[names]
    order = np.lexsort((names, proposals, -found))
    return Kept(proposals[order], names[order], found[order].astype(np.float32))


def _rounds(
    left: Floats, apart: NDArray[np.bool_], most: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """left: float32[C, P], -inf for what does not count; used up. apart: bool[P, P]."""
    active = np.arange(len(left))
    taken: list[tuple[NDArray[np.int64], NDArray[np.int64], Floats]] = []
    while len(active) and (most is None or len(taken) < most):
        best = left.argmax(axis=1)
        top = left[np.arange(len(left)), best]
        some = top > -np.inf
        if not some.all():
            active, left, best, top = active[some], left[some], best[some], top[some]
        if len(active):
            taken.append((best.astype(np.int64), active.astype(np.int64), top))
            left[~apart[best]] = -np.inf
    columns = [np.concatenate(each) for each in zip(*taken, strict=True)]
    return columns[0], columns[1], columns[2]
