"""Detection of named things: average precision of boxes, by size, for names with and without boxes in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mammut.detection.box_files import BoxFile, PictureBoxes, corners
from mammut.detection.coco_results import Found, write_results
from mammut.evaluation.average_precision import (
    COCO_BOXES,
    HALF,
    LVIS_BOXES,
    SIZES,
    THREE_QUARTERS,
    Matches,
    Precision,
    match,
)
from mammut.evaluation.bootstrap import Statistic
from mammut.evaluation.examples import Image, PictureRef, batches
from mammut.evaluation.outcome import DrawnBox, Measure, Outcome, Shown, TaskOptions
from mammut.evaluation.predictor import CorruptedPredictor, Predictor
from mammut.evaluation.read_captions import find_picture
from mammut.evaluation.results_predictor import ResultsPredictor
from mammut_runtime.detection.boxes import iou_matrix
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture

MOST_RESAMPLED = 200_000
"""Boxes up to which intervals are computed; above they would take minutes for each figure."""
_NAMES_APART = 20
"""So many names at most get a figure of their own."""
_MOST_DRAWN = 40


@dataclass(frozen=True)
class _Judged:
    """One model's boxes beside the truth."""

    file: BoxFile
    folder: Path | None
    found: list[Found]
    matches: Matches
    threshold: float
    """The score from which boxes count as found on the page: the one with the best F1 at overlap .5."""


@dataclass(frozen=True)
class BoxData:
    """What is to be found, and where."""

    file: BoxFile
    """The pictures to judge."""
    whole: BoxFile
    """The file before any were left out."""
    folder: Path | None
    """Of the pictures; None where results are judged."""


def detect(predictor: Predictor, data: BoxData, options: TaskOptions) -> Outcome:
    """AP, AP50, AP75, by size, base and novel names, each name where there are few; recall.

    Raises InputError for pictures that cannot be used, and for
    a set without boxes.
    """
    file, found = _everything_found(predictor, data, options)
    if not any(len(picture.boxes) for picture in file.pictures):
        raise InputError(f"{file.path}: no picture with a box; expected at least one")
    if options.write_results is not None and not isinstance(predictor, CorruptedPredictor):
        write_results(options.write_results, file, found)
    matches = match(file, found)
    judged = _Judged(file, data.folder, found, matches, best_threshold(matches))
    measures = _measures(Precision(matches), file, options)
    keys = sorted(matches.hits)
    hits = np.array([matches.hits[key] >= judged.threshold for key in keys], np.float64)
    facts = {"pictures": len(file.pictures), "boxes": len(keys), "names": len(file.categories)}
    return Outcome(tuple(measures), hits, lambda index: _shown(judged, *keys[index]), facts, _notes(judged, options))


# ---- what is found ----


def _everything_found(predictor: Predictor, data: BoxData, options: TaskOptions) -> tuple[BoxFile, list[Found]]:
    """Pictures that could be judged, and what was found in each."""
    file, folder = data.file, data.folder
    if isinstance(predictor, ResultsPredictor):
        return file, predictor.found_in(file, data.whole)
    if folder is None:
        raise InputError(f"{file.path}: a model needs the pictures; give --boxes with their folder, FORM:FILE:FOLDER")
    names = [options.names.get(name, name) for name in file.names]
    again = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if again:
        raise InputError(f"--names: {', '.join(sorted(again)[:3])}: stands for several names of {file.path.name}")
    most = LVIS_BOXES if file.federated else COCO_BOXES
    kept: list[PictureBoxes] = []
    found: list[Found] = []
    for batch in batches(file.pictures, options.batch_size):
        read = [(picture, image) for picture in batch if (image := _read(picture, folder, options)) is not None]
        if read:
            kept += [picture for picture, _ in read]
            found += predictor.detect([image for _, image in read], names, most)
        options.advance(len(batch))
    if not kept:
        raise InputError(f"{folder}: no picture that can be read; expected at least one")
    return replace(file, pictures=tuple(kept)), found


def _read(picture: PictureBoxes, folder: Path, options: TaskOptions) -> Image | None:
    """The picture as it is stored, which its boxes mean; None where it cannot be used and --partial allows that."""
    try:
        image = _ref(picture, folder).read()
        pixels = image.rgb() if isinstance(image, Picture) else image
        height, width = pixels.shape[:2]
        if (width, height) != (picture.width, picture.height):
            raise InputError(
                f"{picture.file_name}: {width}x{height} pixels, and its boxes are for {picture.width}x{picture.height}"
            )
    except InputError as problem:
        options.problems.report([str(problem)])
        return None
    return pixels


def _ref(picture: PictureBoxes, folder: Path | None) -> PictureRef:
    path = None if folder is None else find_picture(folder, picture.file_name)
    return PictureRef(picture.file_name, path or Path(picture.file_name), upright=False)


# ---- figures ----


def _measures(precision: Precision, file: BoxFile, options: TaskOptions) -> list[Measure]:
    items, resampled = len(file.pictures), precision.matches.boxes <= MOST_RESAMPLED

    def measure(name: str, statistic: Statistic, main: bool = False) -> Measure:
        return Measure(name, statistic, items, main=main, resampled=resampled)

    found = [
        measure("AP", precision.average(), main=True),
        measure("AP50", precision.average(HALF), main=True),
        measure("AP75", precision.average(THREE_QUARTERS)),
    ]
    found += [
        measure(f"AP {size}", precision.average(size=size)) for size in SIZES[1:] if precision.names_with_things(size)
    ]
    for title, places in _groups(file, options):
        with_things = [place for place in precision.names_with_things() if place in places]
        if with_things:
            names = f"{len(with_things):,} name{'s' if len(with_things) > 1 else ''}"
            found.append(measure(f"AP {title} ({names})", precision.average(names=with_things)))
            found.append(measure(f"AP50 {title}", precision.average(HALF, names=with_things)))
    depths = (LVIS_BOXES,) if file.federated else (1, 10, COCO_BOXES)
    found += [measure(f"AR {depth}", precision.recall(depth)) for depth in depths]
    if len(file.categories) <= _NAMES_APART:
        found += [
            measure(f"AP50 of {file.names[place]}", precision.average(HALF, names=[place]))
            for place in precision.names_with_things()
        ]
    return found


def _groups(file: BoxFile, options: TaskOptions) -> list[tuple[str, set[int]]]:
    """Titles of groups of names, and their places."""
    places = range(len(file.categories))
    groups: list[tuple[str, set[int]]] = []
    if file.federated:
        titles = {"r": "rare", "c": "common", "f": "frequent"}
        groups = [(title, {place for place in places if file.categories[place].frequency == letter})
                  for letter, title in titles.items()]  # fmt: skip
    novel = options.novel
    if novel is None and file.federated:
        novel = frozenset(each.name for each in file.categories if each.frequency == "r")
    if novel is None:
        return groups
    unknown = novel - set(file.names)
    if unknown:
        raise InputError(f"--novel: {', '.join(sorted(unknown)[:3])}: not among the names of {file.path.name}")
    new = {place for place in places if file.names[place] in novel}
    apart = [("base", set(places) - new)]
    # LVIS's new names are the rare ones, which have their line.
    return groups + (apart if options.novel is None else [*apart, ("novel", new)])


def best_threshold(matches: Matches) -> float:
    """The score from which boxes are best taken, by F1 over all names at overlap .5; inf where nothing is found."""
    bit = 1 << HALF
    each = [names for names in matches.names[0] if names is not None]
    scores = np.concatenate([names.scores for names in each])
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(np.concatenate([(names.right & bit) > 0 for names in each])[order])
    wrong = np.cumsum(np.concatenate([(names.wrong & bit) > 0 for names in each])[order])
    things = sum(int(names.things[1].sum()) for names in each)
    if not len(scores) or not right[-1]:
        return math.inf
    return float(scores[order][np.argmax(2 * right / (right + wrong + things))])


def _notes(judged: _Judged, options: TaskOptions) -> tuple[str, ...]:
    file, matches = judged.file, judged.matches
    notes = [*file.counts.lines()]
    crowds = sum(int(picture.crowd.sum()) for picture in file.pictures) * (not file.federated)
    if crowds:
        notes.append(f"{crowds:,} crowds are neither found nor missed")
    if matches.boxes > MOST_RESAMPLED:
        notes.append(f"no intervals: {matches.boxes:,} boxes, over {MOST_RESAMPLED:,}; --limit takes fewer pictures")
    if math.isfinite(judged.threshold):
        notes.append(f"hits and misses are shown for boxes with a score of {judged.threshold:.3g} or more (best F1)")
    return tuple(notes)


# ---- what is shown ----


def _shown(judged: _Judged, place: int, row: int) -> Shown:
    """One thing of the truth, and all that was found in its picture."""
    picture, found = judged.file.pictures[place], judged.found[place]
    names, score = judged.file.names, judged.matches.hits[place, row]
    kept = np.flatnonzero(found.scores >= judged.threshold)
    kept = kept[np.argsort(-found.scores[kept], kind="stable")][:_MOST_DRAWN]
    boxes = corners(found.boxes[kept])
    right = verdicts(boxes, found.labels[kept], picture.xyxy, picture.categories)
    drawn = [
        DrawnBox(_corners(box), "right" if good else "wrong", f"{names[label]} {value:.2f}")
        for box, good, label, value in zip(boxes, right, found.labels[kept], found.scores[kept], strict=True)
    ]
    truth = DrawnBox(_corners(picture.xyxy[row]), "truth")
    name = names[picture.categories[row]]
    hit = score >= judged.threshold
    said = f"found with {score:.2f}" if hit else f"only with {score:.2g}" if math.isfinite(score) else "not found"
    wrong = int((~right).sum())
    more = (f"{wrong} more that are wrong",) if wrong else ()
    return Shown(_ref(picture, judged.folder), "", (name,), (said, *more), float(hit), (*drawn, truth))


def verdicts(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    truth: NDArray[np.float32],
    truth_labels: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """bool[n], whether each box, best first, finds a thing of its name at overlap .5 that no better one has found."""
    overlaps = iou_matrix(boxes, truth) * (labels[:, None] == truth_labels[None])
    right = np.zeros(len(boxes), bool)
    for row in range(len(boxes) if len(truth) else 0):
        best = int(overlaps[row].argmax())
        if overlaps[row, best] >= 0.5:
            right[row] = True
            overlaps[:, best] = 0
    return right


def _corners(box: Sequence[float] | NDArray[np.float32]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(each) for each in box)
    return left, top, right, bottom
