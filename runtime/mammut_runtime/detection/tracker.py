"""Which detection of this frame is which of the last: stable numbers for things that move.

Each thing has a Kalman filter with constant velocity for the centre and the sides of its box. Where it is expected now
is compared with what was detected now, by generalised overlap, and the pairs with the largest sum are taken (the
Hungarian method, so that one good pair does not spoil two). Only detections of the same name are pairs. A thing that
is not detected for a while keeps its number if it comes back where it would be by then.

Nothing is random, and the boxes are passed on as they were detected. It knows positions only: two things of one name
that stop and turn round behind each other may exchange their numbers (docs/detection.md has how often).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.detection.boxes import Detection, Detections, areas
from mammut_runtime.errors import InputError

F64 = NDArray[np.float64]
_NO_PAIR = 1e6
"""Cost of a pair that is not allowed: more than any sum of allowed ones."""


@dataclass(frozen=True)
class TrackRule:
    """What counts as the same thing. Raises InputError for values out of range."""

    patience_s: float = 1.0
    """Seconds without a detection after which a thing is given up; at least two frames, whatever their rate."""
    least_overlap: float = -0.25
    """Of the expected box and the detected one: their generalised intersection over union, -1 to 1. Below 0 they need
    not touch: -0.25 is a gap of a third of their common extent."""
    noise: float = 0.05
    """How far a detected edge usually is from the real one, in sides of the box."""
    acceleration: float = 3.0
    """How fast velocities usually change, in sides of the box per second and second."""
    first_velocity: float = 3.0
    """How fast a new thing may be, in sides of the box per second."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("patience_s", 0.0, 3600.0),
            ("least_overlap", -1.0, 1.0),
            ("noise", 1e-4, 10.0),
            ("acceleration", 0.0, 1e4),
            ("first_velocity", 0.0, 1e4),
        ):
            if not low <= getattr(self, key) <= high:
                raise InputError(f"{key}: expected a number from {low:g} to {high:g}, got {getattr(self, key)}")


@dataclass(frozen=True)
class Tracked:
    """A detection and the thing it is of."""

    number: int
    """Of the thing, from 1, never used twice by one tracker."""
    detection: Detection
    first_s: float
    """When it was first detected."""
    seen: int
    """In how many frames so far, this one counted."""

    def to_dict(self) -> dict[str, Any]:
        return {"number": self.number, **self.detection.to_dict(), "first_s": round(self.first_s, 3), "seen": self.seen}


class Tracker:
    """Follows things through one clip. For one thread."""

    def __init__(self, rule: TrackRule | None = None) -> None:
        self._rule = rule or TrackRule()
        self._tracks: list[_Track] = []
        self._number = 0
        self._time_s = -np.inf
        self._step_s = 0.0

    def update(self, time_s: float, detections: Detections | Sequence[Detection]) -> tuple[Tracked, ...]:
        """The detections of the next frame with their numbers, in their order. Raises InputError for a time that is
        not later than the last."""
        if not time_s > self._time_s:
            raise InputError(f"expected a time after {self._time_s:g} s, got {time_s:g}; frames come in their order")
        self._step_s = time_s - self._time_s if self._tracks else self._step_s
        self._time_s = time_s
        found = list(detections)
        owner: dict[int, _Track] = {}
        for name in dict.fromkeys(each.name for each in found):
            mine = [index for index, each in enumerate(found) if each.name == name]
            known = [track for track in self._tracks if track.name == name]
            for track in known:
                track.predict(time_s, self._rule)
            for track, index in self._pairs(known, [found[index] for index in mine], mine):
                owner[index] = track
        for index, each in enumerate(found):
            measured = _centre_and_sides(each)
            if index not in owner:
                self._number += 1
                owner[index] = _Track(self._number, each.name, measured, time_s, self._rule)
                self._tracks.append(owner[index])
            else:
                owner[index].correct(measured, time_s, self._rule)
        patience_s = max(self._rule.patience_s, 2.0 * (self._step_s if np.isfinite(self._step_s) else 0.0))
        self._tracks = [track for track in self._tracks if time_s - track.last_s <= patience_s]
        return tuple(
            Tracked(owner[index].number, each, owner[index].first_s, owner[index].seen)
            for index, each in enumerate(found)
        )

    def _pairs(self, tracks: list[_Track], found: list[Detection], indices: list[int]) -> list[tuple[_Track, int]]:
        if not tracks or not found:
            return []
        expected = np.array([track.box for track in tracks])
        overlap = generalised_iou(expected, np.array([each.box.xyxy for each in found]))
        costs = np.where(overlap >= self._rule.least_overlap, 1 - overlap, _NO_PAIR)
        rows, columns = assignment(costs)
        chosen = zip(rows.tolist(), columns.tolist(), strict=True)
        return [(tracks[row], indices[column]) for row, column in chosen if costs[row, column] < _NO_PAIR]


class _Track:
    """The filter of one thing: centre and sides, each with a velocity."""

    def __init__(self, number: int, name: str, measured: F64, time_s: float, rule: TrackRule) -> None:
        self.number, self.name, self.first_s, self.last_s, self.seen = number, name, time_s, time_s, 1
        self._at_s = time_s
        self._state = np.stack([measured, np.zeros(4)], axis=1)
        side = _side(measured)
        spread = np.diag([(rule.noise * side) ** 2, (rule.first_velocity * side) ** 2])
        self._covariance = np.repeat(spread[None], 4, axis=0)

    @property
    def box(self) -> F64:
        """float64[4] xyxy, where it is expected."""
        centre, sides = self._state[:2, 0], np.maximum(self._state[2:, 0], 1e-3)
        return np.concatenate([centre - sides / 2, centre + sides / 2])

    def predict(self, time_s: float, rule: TrackRule) -> None:
        step_s = time_s - self._at_s
        self._at_s = time_s
        move = np.array([[1.0, step_s], [0.0, 1.0]])
        self._state = self._state @ move.T
        change = (rule.acceleration * _side(self._state[:, 0])) ** 2
        drift = change * np.array([[step_s**4 / 4, step_s**3 / 2], [step_s**3 / 2, step_s**2]])
        self._covariance = move @ self._covariance @ move.T + drift

    def correct(self, measured: F64, time_s: float, rule: TrackRule) -> None:
        noise = (rule.noise * _side(measured)) ** 2
        gain = self._covariance[:, :, 0] / (self._covariance[:, 0, 0] + noise)[:, None]
        self._state = self._state + gain * (measured - self._state[:, 0])[:, None]
        self._covariance = self._covariance - gain[:, :, None] * self._covariance[:, None, 0, :]
        self.last_s = time_s
        self.seen += 1


def generalised_iou(first: F64, second: F64) -> F64:
    """float64[N, 4], float64[M, 4] xyxy -> float64[N, M], -1 to 1: overlap, less the empty share of what holds both."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = np.maximum(high - low, 0)
    common = sides[..., 0] * sides[..., 1]
    union = np.maximum(_areas(first)[:, None] + _areas(second)[None] - common, 1e-12)
    reach = np.maximum(first[:, None, 2:], second[None, :, 2:]) - np.minimum(first[:, None, :2], second[None, :, :2])
    hull = np.maximum(reach[..., 0] * reach[..., 1], 1e-12)
    overlap: F64 = common / union - (hull - union) / hull
    return overlap


def assignment(costs: F64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of rows and columns with the least sum: float64[N, M] -> int64[K], int64[K], K = min(N, M).

    The Hungarian method by shortest augmenting paths: every row in turn finds the cheapest way to a free column, moving
    earlier pairs along it. Takes N * N * M steps, N the smaller side. Costs must be finite.
    """
    if costs.shape[0] > costs.shape[1]:
        columns, rows = assignment(costs.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    count, width = costs.shape
    row_price, column_price = np.zeros(count), np.zeros(width)
    row_of: NDArray[np.int64] = np.full(width, -1, np.int64)
    for start in range(count):
        distance, before = np.full(width, np.inf), np.full(width, -1, np.int64)
        done = np.zeros(width, bool)
        row, column, walked = start, -1, 0.0
        while True:
            length = walked + costs[row] - row_price[row] - column_price
            shorter = ~done & (length < distance)
            distance[shorter], before[shorter] = length[shorter], column
            column = int(np.where(done, np.inf, distance).argmin())
            walked = float(distance[column])
            done[column] = True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
        row_price[start] += walked
        passed = done & (row_of >= 0)
        row_price[row_of[passed]] += walked - distance[passed]
        column_price[done] -= walked - distance[done]
        while column >= 0:  # back along the path: each column takes the row of the one before
            previous = int(before[column])
            row_of[column] = start if previous < 0 else row_of[previous]
            column = previous
    columns = np.flatnonzero(row_of >= 0)
    order = np.argsort(row_of[columns])
    return row_of[columns][order], columns[order]


def _areas(boxes: F64) -> F64:
    return areas(boxes)  # type: ignore[arg-type, return-value]


def _centre_and_sides(detection: Detection) -> F64:
    box = detection.box
    return np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, box.width, box.height])


def _side(measured: F64) -> float:
    """The longer side of a box given as centre and sides, pixels."""
    return float(max(measured[2], measured[3], 1.0))
