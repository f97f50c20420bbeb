"""Average precision of boxes: matched by pycocotools, counted so that pictures can be drawn anew.

COCO   Lin et al. 2014, as COCOeval does it: 10 overlaps from .5 to .95, 101 recalls, 100 boxes for each picture and
       name, sizes by area, crowds neither found nor missed
LVIS   Gupta et al. 2019, as LVISEval does it: 300 boxes for each picture over all names; a box of a name counts only
       in pictures for which it is known whether the name is there; an unmatched one of a name labelled in part does not

pycocotools computes overlaps and matches; what becomes of the matches is computed here, for many weightings of the
pictures at once. With every picture once the figures are those of the two official programs, which tests hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut.detection.box_files import BoxFile, PictureBoxes
from mammut.detection.coco_results import Found
from mammut.evaluation.bootstrap import F64, Statistic
from mammut_runtime.errors import EngineError

Ints = NDArray[np.int64]
Masks = NDArray[np.uint16]
"""One bit for each of the 10 overlaps."""

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
SIZES = ("all", "small", "medium", "large")
_AREAS = [[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]]
COCO_BOXES, LVIS_BOXES = 100, 300
_BITS = np.left_shift(1, np.arange(10)).astype(np.uint16)
_VALUES_AT_ONCE = 4_000_000
HALF, THREE_QUARTERS = 0, 5
"""Places among OVERLAPS of .5 and .75."""


@dataclass(frozen=True)
class NameMatches:
    """All boxes of one name and size, best score first."""

    picture: Ints
    """int64[D], whose."""
    scores: F64
    right: Masks
    """uint16[D], at which overlaps the box found a thing."""
    wrong: Masks
    """uint16[D], at which it found none. Neither: it does not count (a crowd, another size, nothing is known)."""
    rank: Ints
    """int64[D], how many boxes of the name the picture has before it."""
    things: tuple[Ints, Ints]
    """Pictures with things to find, and how many."""


@dataclass(frozen=True)
class Matches:
    """How a set's boxes met its truth."""

    file: BoxFile
    names: list[list[NameMatches | None]]
    """[size][name]; None: neither boxes nor things."""
    hits: dict[tuple[int, int], float]
    """(picture, its box) to the score that found it at overlap .5; -inf: not found. Crowds are left out."""

    @property
    def boxes(self) -> int:
        """How many boxes count, for a sense of the work."""
        return sum(len(each.scores) for each in self.names[0] if each is not None)


def match(file: BoxFile, found: Sequence[Found]) -> Matches:
    """Match what was found with the boxes of a file. found: for each of its pictures, in order.

    Raises EngineError where pycocotools is not installed.
    """
    evaluator = _evaluator(LVIS_BOXES if file.federated else COCO_BOXES)
    rows: list[list[list[_Row]]] = [[[] for _ in file.categories] for _ in SIZES]
    hits: dict[tuple[int, int], float] = {}
    for place, (picture, each) in enumerate(zip(file.pictures, found, strict=True)):
        if file.federated:
            each = each.best(LVIS_BOXES)
        for name in _judged(picture, each, file.federated):
            sized = _matched(evaluator, picture, each, name, file.federated, hits, place)
            for size, row in enumerate(sized):
                rows[size][name].append(_Row(place, *row))
    return Matches(file, [[_joined(of_name) for of_name in of_size] for of_size in rows], hits)


def _evaluator(most: int) -> Any:
    try:
        from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped, unused-ignore]
    except ImportError as problem:  # only this task needs it
        raise EngineError(f"{problem.name} is not there to match boxes; pip install mammut-edge[boxes]") from problem
    evaluator = COCOeval(None, None, "bbox")
    evaluator.params.maxDets = [most]
    return evaluator


def _judged(picture: PictureBoxes, found: Found, federated: bool) -> list[int]:
    """Names that boxes or truth of this picture have, less those about which nothing is known here."""
    own = set(picture.categories.tolist())
    known = own | (set(picture.absent or ()) if federated else set(found.labels.tolist()))
    return sorted(known & (own | set(found.labels.tolist())))


_Sized = tuple[F64, Masks, Masks, int]


def _matched(
    evaluator: Any, picture: PictureBoxes, found: Found, name: int, federated: bool,
    hits: dict[tuple[int, int], float], place: int,
) -> list[_Sized]:  # fmt: skip
    """(scores, right, wrong, things) for each size, by pycocotools."""
    truth = np.flatnonzero(picture.categories == name)
    given = np.flatnonzero(found.labels == name)
    key = (0, name)
    # Ids from 1 on: pycocotools takes a match with id 0 for none.
    evaluator._gts = {key: [
        {"id": number, "bbox": picture.boxes[row].tolist(), "area": float(picture.areas[row]),
         "ignore": int(picture.crowd[row]) * (not federated), "iscrowd": int(picture.crowd[row]) * (not federated)}
        for number, row in enumerate(truth, 1)
    ]}  # fmt: skip
    evaluator._dts = {key: [
        {"id": number, "bbox": found.boxes[row].tolist(), "area": float(found.boxes[row, 2] * found.boxes[row, 3]),
         "score": float(found.scores[row])}
        for number, row in enumerate(given, 1)
    ]}  # fmt: skip
    evaluator.ious = {key: evaluator.computeIoU(*key)}
    sized = []
    for size, area in enumerate(_AREAS):
        result = evaluator.evaluateImg(*key, area, evaluator.params.maxDets[-1])
        matched = result["dtMatches"] > 0
        ignored = result["dtIgnore"].astype(bool)
        if name in picture.partial:
            ignored |= ~matched
        things = int(np.count_nonzero(np.asarray(result["gtIgnore"]) == 0))
        scores = np.asarray(result["dtScores"], np.float64)
        sized.append((scores, _packed(matched & ~ignored), _packed(~matched & ~ignored), things))
        if size == 0:
            for number, row in enumerate(result["gtIds"]):
                if not result["gtIgnore"][number]:
                    by = int(result["gtMatches"][HALF, number])
                    hits[place, int(truth[row - 1])] = float(found.scores[given[by - 1]]) if by else -math.inf
    return sized


def _packed(bits: NDArray[np.bool_]) -> Masks:
    """bool[10, D] to uint16[D]."""
    masks: Masks = (bits * _BITS[:, None]).sum(axis=0).astype(np.uint16)
    return masks


@dataclass(frozen=True)
class _Row:
    """One picture's share of a name."""

    picture: int
    scores: F64
    right: Masks
    wrong: Masks
    things: int


def _joined(rows: list[_Row]) -> NameMatches | None:
    if not rows:
        return None
    scores = np.concatenate([row.scores for row in rows])
    order = np.argsort(-scores, kind="stable")
    picture = np.concatenate([np.full(len(row.scores), row.picture, np.int64) for row in rows])
    rank = np.concatenate([np.arange(len(row.scores)) for row in rows])
    with_things = [row for row in rows if row.things]
    things = np.array([[row.picture, row.things] for row in with_things], np.int64).reshape(-1, 2)
    return NameMatches(
        picture[order],
        scores[order],
        np.concatenate([row.right for row in rows])[order],
        np.concatenate([row.wrong for row in rows])[order],
        rank[order],
        (things[:, 0], things[:, 1]),
    )


# ---- figures ----


@dataclass
class Precision:
    """Figures of a set of matches as functions of how often each picture counts."""

    matches: Matches
    _known: dict[bytes, F64] = field(default_factory=dict)

    def names_with_things(self, size: str = "all") -> list[int]:
        """Places of names that have something to find."""
        of_size = self.matches.names[SIZES.index(size)]
        return [place for place, each in enumerate(of_size) if each is not None and len(each.things[0])]

    def average(self, overlap: int | None = None, size: str = "all", names: Sequence[int] | None = None) -> Statistic:
        """Mean average precision over names, at one overlap (a place among OVERLAPS) or over all ten.

        Names without a thing in the pictures that are drawn do not count.
        """
        wanted = self.names_with_things(size)
        chosen = [place for place in (wanted if names is None else names) if place in set(wanted)]

        def statistic(weights: F64) -> F64:
            each = self._cached(weights, size)[:, chosen]
            return _mean(each.mean(axis=2) if overlap is None else each[:, :, overlap])

        return statistic

    def recall(self, most: int, size: str = "all") -> Statistic:
        """Mean over names and overlaps of the share of things that are found with `most` boxes a picture and name."""
        of_size = self.matches.names[SIZES.index(size)]
        pictures = len(self.matches.file.pictures)

        def statistic(weights: F64) -> F64:
            found = []
            for place in self.names_with_things(size):
                each = of_size[place]
                if each is None:
                    continue
                right = np.where(each.rank < most, np.bitwise_count(each.right), 0)
                by_picture = np.bincount(each.picture, right, minlength=pictures)
                found.append(_divided(weights @ by_picture, len(OVERLAPS) * _things(weights, each)))
            return _mean(np.stack(found, axis=1)) if found else np.full(len(weights), np.nan)

        return statistic

    def _cached(self, weights: F64, size: str) -> F64:
        """float64[R, names, overlaps]: every figure is drawn on the same resamples, so their parts are kept."""
        key = hashlib.blake2b(weights.tobytes(), digest_size=16, key=size.encode()).digest()
        if key not in self._known:
            of_size = self.matches.names[SIZES.index(size)]
            kind = np.float64 if len(weights) == 1 else np.float32  # resamples need few digits and are many
            found: NDArray[Any] = np.full((len(weights), len(of_size), len(OVERLAPS)), np.nan, kind)
            for place in self.names_with_things(size):
                each = of_size[place]
                if each is not None:
                    found[:, place] = _average_precision(each, weights)
            self._known[key] = found
        return self._known[key]


def _average_precision(matches: NameMatches, weights: F64) -> F64:
    """float64[R, overlaps]; NaN where nothing is to be found."""
    found = np.empty((len(weights), len(OVERLAPS)))
    rows = max(1, _VALUES_AT_ONCE // max(1, len(matches.scores)))
    for start in range(0, len(weights), rows):
        some = weights[start : start + rows]
        drawn = some[:, matches.picture]
        things = _things(some, matches)
        for overlap, bit in enumerate(_BITS):
            found[start : start + rows, overlap] = _at_overlap(matches, drawn, things, int(bit))
    return found


def _at_overlap(matches: NameMatches, drawn: F64, things: F64, bit: int) -> F64:
    """float64[R]. Precision is only looked at where something is found: it falls until the next find."""
    finds = np.flatnonzero(matches.right & bit)
    if not len(finds):
        return np.where(things > 0, 0.0, np.nan)
    right = np.cumsum(drawn[:, finds], axis=1)
    wrong = np.cumsum(drawn * ((matches.wrong & bit) > 0), axis=1)[:, finds]
    precision = right / (wrong + right + np.spacing(1))
    best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = _divided(right, things[:, None])
    # How many of the 101 recalls are first reached at each find.
    reached = np.searchsorted(RECALLS, recall, side="right")
    new = np.diff(reached, axis=1, prepend=0)
    found: F64 = np.where(things > 0, (best_from_here * new).sum(axis=1) / len(RECALLS), np.nan)
    return found


def _things(weights: F64, matches: NameMatches) -> F64:
    """float64[R], things to find in the pictures as they are drawn."""
    pictures, how_many = matches.things
    total: F64 = weights[:, pictures] @ how_many.astype(np.float64)
    return total


def _divided(above: F64, below: F64) -> F64:
    with np.errstate(invalid="ignore", divide="ignore"):
        share: F64 = above / below
    return share


def _mean(values: F64) -> F64:
    """Over the second axis, without NaN; NaN where there is nothing else."""
    counted = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: F64 = np.where(counted, values, 0).sum(axis=1, dtype=np.float64) / counted.sum(axis=1)
    return mean
