"""A file of boxes as training and evaluation see it, whichever form it was published in.

Readers are strict: a record of another form is an error that names file, list, place and id. Two things that well-known
files contain are put right instead, and counted: boxes that stand out of their picture are cut at its edge, and boxes
without an area, before or after the cut, are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mammut.detection.samples import BoxedPicture, BoxedSet, Frequency
from mammut.evaluation.examples import Problems
from mammut.evaluation.read_captions import find_picture
from mammut_runtime.errors import InputError

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Category:
    """A name that boxes may have."""

    id: int
    """The file's own number."""
    name: str
    frequency: Frequency | None = None
    """LVIS only."""


@dataclass(frozen=True)
class PictureBoxes:
    """One picture's record with its boxes."""

    id: int
    file_name: str
    """With forward slashes, relative to the folder of the pictures."""
    width: int
    height: int
    """Pixels, as the file says."""
    boxes: F64
    """float64[n, 4]: left, top, width, height in pixels, inside the picture, width and height over 0; to the last bit
    as in the file where nothing was cut."""
    categories: Ints
    """int64[n], places in BoxFile.categories."""
    areas: F64
    """float64[n], pixels: of the outline where the file states it, else of the box. Sizes are told apart by it."""
    crowd: NDArray[np.bool_]
    """bool[n]: many things in one box, neither to be found nor wrong to be found."""
    absent: tuple[int, ...] | None = None
    """Places of categories that are known not to be in the picture; None: all that have no box (COCO)."""
    partial: tuple[int, ...] = ()
    """Places of categories of which not every thing has a box."""

    @property
    def xyxy(self) -> NDArray[np.float32]:
        """float32[n, 4], left, top, right, bottom in pixels."""
        return corners(self.boxes)


@dataclass(frozen=True)
class BoxCounts:
    """What a file held, and what was put right."""

    pictures: int = 0
    boxes: int = 0
    """As they stand in the file."""
    clipped: int = 0
    """Cut at the picture's edge."""
    furthest_outside: float = 0.0
    """Pixels by which the worst of them stood out; files rounded to cents of a pixel have 0.01."""
    without_area: int = 0
    """Dropped: width or height 0, or wholly outside."""
    crowds: int = 0
    contradicted: int = 0
    """LVIS: names said to be absent from a picture that has a box of them. The box counts."""

    def lines(self) -> tuple[str, ...]:
        """What a reader of figures must know, a sentence each."""
        found = []
        if self.clipped:
            worst = f"the furthest stood {self.furthest_outside:.3g} pixels outside"
            found.append(f"{self.clipped:,} of {self.boxes:,} boxes were cut at their picture's edge; {worst}")
        if self.without_area:
            found.append(f"{self.without_area:,} of {self.boxes:,} boxes have no area in their picture: dropped")
        if self.contradicted:
            found.append(f"{self.contradicted:,} names are said to be absent from pictures with a box of them")
        return tuple(found)


@dataclass(frozen=True)
class BoxFile:
    """All of a file. Pictures are not touched."""

    path: Path
    federated: bool
    """LVIS: what is known differs from picture to picture."""
    categories: tuple[Category, ...]
    """By id."""
    pictures: tuple[PictureBoxes, ...]
    """By id, as the official tools take them."""
    counts: BoxCounts

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.categories)

    def found_in(self, folder: Path, problems: Problems) -> BoxFile:
        """Only the pictures whose file is in the folder. What is missing goes to `problems` (InputError or listed)."""
        if not folder.is_dir():
            raise InputError(f"{folder}: expected the folder with the pictures of {self.path.name}, there is none")
        missing = [each.file_name for each in self.pictures if find_picture(folder, each.file_name) is None]
        problems.report(missing, len(self.pictures), f"{folder}: pictures of {self.path.name}")
        gone = set(missing)
        kept = tuple(each for each in self.pictures if each.file_name not in gone)
        if not kept:
            raise InputError(f"{self.path}: none of its pictures is in {folder}; expected at least one")
        return replace(self, pictures=kept)

    def boxed_set(self, folder: Path, problems: Problems | None = None) -> BoxedSet:
        """The pictures with their boxes, for training. Raises InputError where pictures are missing."""
        file = self.found_in(folder, problems or Problems())
        frequency = {each.name: each.frequency for each in file.categories if each.frequency is not None}
        return BoxedSet(self.path.name, self.names, [file._boxed(each, folder) for each in file.pictures], frequency)

    def _boxed(self, record: PictureBoxes, folder: Path) -> BoxedPicture:
        path = find_picture(folder, record.file_name)
        if path is None:
            raise InputError(f"{folder}: {record.file_name} is gone; complete the data")
        names = self.names
        return BoxedPicture(
            name=record.file_name,
            picture=path,
            boxes=record.xyxy,
            labels=tuple(names[place] for place in record.categories),
            ignore=record.crowd,
            absent=None if record.absent is None else tuple(names[place] for place in record.absent),
            partial=tuple(names[place] for place in record.partial),
            stated=(record.width, record.height),
        )


def corners(boxes: F64) -> NDArray[np.float32]:
    """float64[n, 4] left, top, width, height to float32[n, 4] left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Cut:
    """Boxes after they were cut at the edges of their pictures."""

    boxes: F64
    """float64[n, 4] left, top, width, height; those that were inside are as they were."""
    clipped: NDArray[np.bool_]
    empty: NDArray[np.bool_]
    """Without an area: to be dropped."""
    outside: F64
    """float64[n], pixels by which each stood out."""


def cut(boxes: F64, sides: F64) -> Cut:
    """Cut boxes at the edges of their pictures.

    boxes: float64[n, 4], left, top, width, height, finite. sides: float64[n, 2], width and height of their pictures.
    A box is empty unless it has an area also as float32 corners, which is what training computes with.
    """
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):
        outside = np.max(np.maximum(-low, high - sides), axis=1, initial=0.0)
    clipped = outside > 0
    inner_low = np.clip(low, 0, sides)
    inner_high = np.clip(high, 0, sides)
    found = boxes.copy()
    found[clipped] = np.concatenate([inner_low, inner_high - inner_low], axis=1)[clipped]
    single = corners(found)
    solid = (single[:, 2:] > single[:, :2]) & (found[:, 2:] > 0)
    empty = np.logical_not(solid.all(axis=1))
    return Cut(found, clipped & ~empty, empty, np.where(empty, 0.0, outside))


def by_id(records: Sequence[int], where: Callable[[int], str]) -> Ints:
    """Places of records in the order of their ids. Raises InputError for an id given twice, which `where` names."""
    ids = np.asarray(records, np.int64)
    order: Ints = np.argsort(ids, kind="stable").astype(np.int64)
    again = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        raise InputError(f"{where(int(second))}: id {ids[second]} is already that of {where(int(first))}")
    return order
