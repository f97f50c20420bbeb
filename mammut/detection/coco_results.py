"""COCO's results form, in which detections are exchanged and judged.

    [{"image_id", "category_id", "bbox": [left, top, width, height], "score"}, ...]

LVIS takes the same.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut.detection.box_files import F64, BoxFile, Ints
from mammut.detection.coco_files import MAX_BOXES, numbers, shown, whole
from mammut.detection.json_records import listed_records
from mammut_runtime.errors import InputError

_DIGITS = 2
"""Of pixels: a box moves by at most 0.005."""


@dataclass(frozen=True)
class Found:
    """What a detector found in one picture."""

    boxes: F64
    """float64[n, 4], left, top, width, height in pixels of the picture as it is stored."""
    scores: F64
    """float64[n], 0 to 1 (files of others may hold other numbers; only their order counts)."""
    labels: Ints
    """int64[n], places in the list of names."""

    @classmethod
    def of_corners(cls, boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any]) -> Found:
        """From xyxy boxes float[n, 4], as detectors give them."""
        wide = np.asarray(boxes, np.float64).reshape(-1, 4)
        sides = np.maximum(wide[:, 2:] - wide[:, :2], 0)
        return cls(np.concatenate([wide[:, :2], sides], axis=1), np.asarray(scores, np.float64).reshape(-1),
                   np.asarray(labels, np.int64).reshape(-1))  # fmt: skip

    def best(self, count: int) -> Found:
        """The `count` best, best first; equal scores in their order."""
        order = np.argsort(-self.scores, kind="stable")[:count]
        return Found(self.boxes[order], self.scores[order], self.labels[order])


def read_results(path: Path, file: BoxFile) -> list[Found]:
    """A results file of the pictures of `file`, in their order; pictures without a line have nothing found.

    Raises InputError that names the record: of another form, of a picture or category that `file` does not have.
    """
    picture_of = {picture.id: place for place, picture in enumerate(file.pictures)}
    label_of = {category.id: place for place, category in enumerate(file.categories)}
    owners, labels, boxes, scores = array("q"), array("q"), array("d"), array("d")
    for place, record in listed_records(path):
        where = f"{path}: [{place}]"
        if place >= MAX_BOXES:
            raise InputError(f"{where}: expected at most {MAX_BOXES:,} boxes; split the file")
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object with image_id, bbox and so on, got {shown(record)}")
        image_id, category_id = whole(record, "image_id", where), whole(record, "category_id", where)
        if image_id not in picture_of:
            raise InputError(f"{where}: image_id {image_id} is not in {file.path.name}: results of other data")
        if category_id not in label_of:
            raise InputError(f"{where}: category_id {category_id} is not in {file.path.name}")
        score: Any = record.get("score")
        if type(score) not in (int, float) or not abs(score) <= sys.float_info.max:
            raise InputError(f"{where}: score: expected a finite number, got {shown(score)}")
        boxes.extend(numbers(record, "bbox", where))
        owners.append(picture_of[image_id])
        labels.append(label_of[category_id])
        scores.append(score)
    return _by_picture(len(file.pictures), owners, Found(np.array(boxes).reshape(-1, 4), np.array(scores, np.float64),
                                                         np.array(labels, np.int64)))  # fmt: skip


def write_results(path: Path, file: BoxFile, found: Sequence[Found]) -> None:
    """Write what was found in the pictures of `file`, in their order. Raises InputError where it cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as out:
            out.write("[")
            first = True
            for picture, each in zip(file.pictures, found, strict=True):
                for box, score, label in zip(each.boxes, each.scores, each.labels, strict=True):
                    record = {
                        "image_id": picture.id,
                        "category_id": file.categories[label].id,
                        "bbox": [round(float(number), _DIGITS) for number in box],
                        "score": round(float(score), 6),
                    }
                    out.write(("\n" if first else ",\n") + json.dumps(record))
                    first = False
            out.write("\n]\n")
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem


def _by_picture(pictures: int, owners: array[int], found: Found) -> list[Found]:
    owner = np.array(owners, np.int64)
    order = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[order], np.arange(pictures + 1))
    rows = [order[ends[place] : ends[place + 1]] for place in range(pictures)]
    return [Found(found.boxes[each], found.scores[each], found.labels[each]) for each in rows]
