"""Holds what a detector graph gives against the core: the same boxes, the same scores, the same survivors after NMS.

The graph gives the best places first, and two places that are equally good may come in either order, or the last of
them not at all. So proposals are compared by where they are, not by their number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mammut.detection.detector import Detector
from mammut_runtime.detection.boxes import Detection, Detections
from mammut_runtime.detection.detector import PictureDetector, Square
from mammut_runtime.detection.vocabulary import Vocabulary
from mammut_runtime.model import Model

Arrays = dict[str, NDArray[Any]]
LOST_IN_HALF = 0.05
"""Share of a picture's proposals that may be others where float16 is involved. Of two places side by side that are
about equally good, only the better one is proposed. With a detector that knows nothing, 1 of 64 was another in every
fourth picture, with a trained one none in eight."""
DIFFERENT_IN_HALF = 0.1
"""Share of what is found in all pictures that may differ for this reason: as much as the gate allows."""
PIXELS, SCORE = 0.5, 1e-3
"""Boxes may differ by so many pixels, scores by so much: a fiftieth of what a person sees."""
_NOTHING = 1e-6
"""Scores below it are of places that are no proposals at all: they fill the fixed number up, in any order."""


def aligned(got: Arrays, wanted: Arrays, half: bool = False) -> tuple[Arrays, Arrays]:
    """Both outputs with the proposals of `got` in the order of `wanted`; those that say nothing are zero in both.

    A proposal that only one of them has counts as missing (NaN), unless its scores are within SCORE of the lowest
    that the graph had room for, or, where float16 is involved (half), it is one of a few: LOST_IN_HALF.
    """
    boxes, scores = got["boxes"].copy(), got["scores"].copy()
    right = {name: value.copy() for name, value in wanted.items()}
    if boxes.shape != right["boxes"].shape or scores.shape != right["scores"].shape:
        return got, wanted
    for row in range(len(boxes)):
        order = _matches(boxes[row], scores[row], right["boxes"][row], right["scores"][row])
        least = min(_best(scores[row]).min(), _best(right["scores"][row]).min())
        taken_boxes, taken_scores = boxes[row][order], scores[row][order]
        lost = order < 0
        taken_boxes[lost], taken_scores[lost] = np.nan, np.nan
        silent = _best(right["scores"][row]) < (_NOTHING if least < _NOTHING else least + SCORE)
        if half and (lost & ~silent).sum() <= LOST_IN_HALF * len(lost):
            silent |= lost
        for values in (taken_boxes, taken_scores, right["boxes"][row], right["scores"][row]):
            values[silent] = 0
        boxes[row], scores[row] = taken_boxes, taken_scores
    return {"boxes": boxes, "scores": scores}, right


def _best(scores: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(scores.max(axis=-1))


def _matches(
    boxes: NDArray[Any], scores: NDArray[Any], wanted: NDArray[Any], wanted_scores: NDArray[Any]
) -> NDArray[np.int64]:
    """For each wanted proposal the nearest that is left, in order; -1 where none is within 4 * PIXELS. What is near
    follows from boxes and scores together; how far scores may differ is judged afterwards."""
    apart = np.abs(boxes[None] - wanted[:, None]).max(axis=-1)
    other = np.abs(scores[None] - wanted_scores[:, None]).max(axis=-1)
    cost = apart / PIXELS + other / SCORE
    order = np.full(len(wanted), -1, np.int64)
    for index in range(len(wanted)):
        nearest = int(cost[index].argmin())
        if np.isfinite(cost[index, nearest]) and apart[index, nearest] <= 4 * PIXELS:
            order[index] = nearest
            cost[:, nearest] = np.inf
    return order


@dataclass(frozen=True)
class DetectionParity:
    """What the runtime found in a picture, and what the core's detector finds with the same NMS."""

    picture: str
    found: int
    different: int
    """Things that only one of them found, or both with another score."""
    problem: str
    """The first of them in words, or ""."""
    excused: bool = False
    """It is one of a few, in a bundle with float16: see DIFFERENT_IN_HALF."""
    example: Detections | None = field(default=None, repr=False, compare=False)
    """What the runtime found, for a report."""


class _Core:
    """The core's detector in the place of an engine."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def run(self, name: str, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            boxes, scores = self._detector(*(torch.from_numpy(feeds[key]) for key in ("pixels", "classes", "novel")))
        return {"boxes": boxes.numpy(), "scores": scores.numpy()}


def names_for(detector: Detector, most: int = 40) -> tuple[str, ...]:
    """Names to try it with: some of those it was trained with, and some it was not."""
    return (*detector.config.base_names[:most], "a thing that nobody named", "zebra crossing")


def compare_detections(
    model: Model, detector: Detector, pictures: list[tuple[str, NDArray[np.uint8]]], half: bool = False
) -> list[DetectionParity]:
    """The runtime's whole way from pictures to detections, against the core's with the runtime's own NMS.

    half: whether float16 is involved, so that a few differences are excused.
    """
    core = PictureDetector(_Core(detector), model.bundle, lambda: model.text)  # type: ignore[arg-type]
    vocabulary = model.vocabulary(names_for(detector))
    found = []
    for name, pixels in pictures:
        square = core.square(pixels, "rgb")
        threshold = _threshold(core, square, vocabulary)
        ours = model.detect(pixels, vocabulary, threshold=threshold)
        theirs = core.detect([square], vocabulary, threshold=threshold)[0]
        scale = max(pixels.shape[:2]) / detector.config.image_size
        differ = differences(ours, theirs, threshold, scale)
        found.append(DetectionParity(name, len(theirs), len(differ), differ[0] if differ else "", example=ours))
    different, every = sum(each.different for each in found), sum(each.found for each in found)
    excused = half and different <= DIFFERENT_IN_HALF * every
    return [replace(each, excused=excused and bool(each.problem)) for each in found]


def _threshold(core: PictureDetector, square: Square, vocabulary: Vocabulary) -> float:
    """Low enough for something to be found, also by a detector that knows nothing yet."""
    best = core.best_scores([square], vocabulary)[0]
    return float(min(core.rule.threshold, np.sort(best)[-min(5, len(best))]))


def differences(ours: Detections, theirs: Detections, threshold: float, scale: float) -> list[str]:
    """What one has and the other has not, in words. Near the threshold (within SCORE) either is right.

    scale: pixels of the picture for one of the detector's input.
    """
    left, found = list(ours.detections), []
    for want in theirs.detections:
        nearest = min(left, key=lambda each: _apart(each, want), default=None)
        if nearest is not None and _apart(nearest, want) <= PIXELS * scale:
            if abs(nearest.score - want.score) > SCORE:
                found.append(f"{want.name}: score {nearest.score:.4f}, the core's {want.score:.4f}")
            left.remove(nearest)
        elif want.score > threshold + SCORE:
            found.append(f"{want.name} with score {want.score:.4f} is missing")
    extra = [each for each in left if each.score > threshold + SCORE]
    return found + [f"{each.name} with score {each.score:.4f} is too much" for each in extra]


def _apart(a: Detection, b: Detection) -> float:
    if a.name != b.name:
        return float("inf")
    corners = ((getattr(a.box, key), getattr(b.box, key)) for key in ("x0", "y0", "x1", "y1"))
    return max(abs(float(one) - float(other)) for one, other in corners)
