"""COCO's detection form.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [left, top, width, height], "area"?, "iscrowd"?}],
     "categories": [{"id", "name"}]}

Outlines and whatever else a record holds are passed over. `read_boxes` also serves LVIS, which differs in what it says
about names (see lvis_files.py).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mammut.detection.box_files import BoxCounts, BoxFile, Category, Ints, PictureBoxes, by_id, cut
from mammut.detection.json_records import keyed_records
from mammut_runtime.errors import InputError

MAX_PICTURES = 20_000_000
MAX_BOXES = 100_000_000
MAX_CATEGORIES = 100_000
MAX_SIDE = 1_000_000
"""Pixels."""
MAX_BOXES_A_PICTURE = 10_000
_MAX_ID = 2**62
_LISTS = ("images", "annotations", "categories")


def read_coco(path: Path) -> BoxFile:
    """A COCO detection file. Raises InputError that names the record of another form, and what read limits say."""
    return read_boxes(path, CocoForm())


class CocoForm:
    """What a form says about names and pictures beyond the boxes. COCO says nothing more."""

    federated = False

    def category(self, record: Any, where: str) -> Category:
        name = text(record, "name", where)
        return Category(whole(record, "id", where), name)

    def file_name(self, record: Any, where: str) -> str:
        return text(record, "file_name", where)

    def known(self, record: Any, where: str) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        """Ids of categories that are known to be absent (None: all without a box), and of those labelled in part."""
        return None, ()


def read_boxes(path: Path, form: CocoForm) -> BoxFile:
    """A file of COCO's or a related form. Raises InputError."""
    raw = _Raw(path, form)
    for key, place, record in keyed_records(path, _LISTS):
        raw.add(key, place, record)
    return raw.finished()


@dataclass
class _Raw:
    """Records as they come, checked one by one and kept small; what they say of each other is checked at the end."""

    path: Path
    form: CocoForm
    categories: list[Category] = field(default_factory=list)
    images: list[tuple[int, str, int, int]] = field(default_factory=list)
    known: list[tuple[tuple[int, ...] | None, tuple[int, ...]]] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("q"))
    image_ids: array[int] = field(default_factory=lambda: array("q"))
    category_ids: array[int] = field(default_factory=lambda: array("q"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    areas: array[float] = field(default_factory=lambda: array("d"))
    crowd: bytearray = field(default_factory=bytearray)

    def add(self, key: str, place: int, record: Any) -> None:
        where = f"{self.path}: {key}[{place}]"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object, got {shown(record)}")
        if type(record.get("id")) is int:
            where += f" (id {record['id']})"
        if key == "images":
            self._add_image(record, where)
        elif key == "annotations":
            self._add_box(record, where)
        else:
            self.categories.append(self.form.category(record, where))
        limit = {"images": MAX_PICTURES, "annotations": MAX_BOXES, "categories": MAX_CATEGORIES}[key]
        if place >= limit:
            raise InputError(f"{where}: expected at most {limit:,} of these; split the file")

    def _add_image(self, record: Any, where: str) -> None:
        sides = (whole(record, "width", where, 1, MAX_SIDE), whole(record, "height", where, 1, MAX_SIDE))
        self.images.append((whole(record, "id", where), self.form.file_name(record, where), *sides))
        self.known.append(self.form.known(record, where))

    def _add_box(self, record: Any, where: str) -> None:
        box = numbers(record, "bbox", where)
        crowd = record.get("iscrowd", 0)
        if type(crowd) not in (int, bool) or crowd not in (0, 1):
            raise InputError(f"{where}: iscrowd: expected 0 or 1, got {shown(crowd)}")
        area = record.get("area", -1.0)
        if "area" in record and not (type(area) in (int, float) and 0 <= area < _FAR**2):
            raise InputError(f"{where}: area: expected a number of pixels from 0 on, under 1e18, got {shown(area)}")
        self.ids.append(whole(record, "id", where))
        self.image_ids.append(whole(record, "image_id", where))
        self.category_ids.append(whole(record, "category_id", where))
        self.boxes.extend(box)
        self.areas.append(area)
        self.crowd.append(int(crowd))

    def finished(self) -> BoxFile:
        categories, category_places = self._categories()
        if not self.images:
            raise InputError(f"{self.path}: images: expected 1 or more, got none")
        image_order = by_id([image[0] for image in self.images], lambda place: self._where("images", place))
        by_id(self.ids, lambda place: self._where("annotations", place))
        image_ids = np.array([self.images[place][0] for place in image_order], np.int64)
        owner = self._places(self.image_ids, image_ids, "image_id", "images")
        label = self._places(
            self.category_ids, np.array([category.id for category in categories], np.int64), "category_id", "categories"
        )
        sides = np.array([self.images[place][2:] for place in image_order], np.float64).reshape(-1, 2)
        boxes = np.frombuffer(self.boxes, np.float64).reshape(-1, 4) if self.boxes else np.empty((0, 4))
        found = cut(boxes, sides[owner])
        crowd = np.frombuffer(bytes(self.crowd), np.uint8).astype(bool)
        areas = np.array(self.areas, np.float64)
        areas = np.where(areas < 0, found.boxes[:, 2] * found.boxes[:, 3], areas)
        kept = np.flatnonzero(~found.empty)
        kept = kept[np.argsort(owner[kept], kind="stable")]
        ends = np.searchsorted(owner[kept], np.arange(len(image_order) + 1))
        pictures, contradicted = [], 0
        for number, place in enumerate(image_order):
            rows = kept[ends[number] : ends[number + 1]]
            identity, name, width, height = self.images[place]
            if len(rows) > MAX_BOXES_A_PICTURE:
                raise InputError(
                    f"{self._where('images', int(place))}: {len(rows):,} boxes, expected at most "
                    f"{MAX_BOXES_A_PICTURE:,} in one picture"
                )
            absent, partial = self._known(int(place), category_places)
            own = set(label[rows].tolist())
            contradicted += len(own.intersection(absent or ()))
            absent = None if absent is None else tuple(each for each in absent if each not in own)
            pictures.append(PictureBoxes(identity, name, width, height, found.boxes[rows], label[rows], areas[rows],
                                         crowd[rows], absent, partial))  # fmt: skip
        counts = BoxCounts(
            pictures=len(pictures),
            boxes=len(boxes),
            clipped=int(found.clipped.sum()),
            furthest_outside=float(found.outside.max(initial=0.0)),
            without_area=int(found.empty.sum()),
            crowds=int(crowd[kept].sum()),
            contradicted=contradicted,
        )
        return BoxFile(self.path, self.form.federated, categories, tuple(pictures), counts)

    def _categories(self) -> tuple[tuple[Category, ...], dict[int, int]]:
        """By id, and the place of each id."""
        if not self.categories:
            raise InputError(f"{self.path}: categories: expected 1 or more, got none")
        order = by_id([each.id for each in self.categories], lambda place: self._where("categories", place))
        found = tuple(self.categories[place] for place in order)
        names: dict[str, int] = {}
        for category in found:
            if category.name in names:
                raise InputError(
                    f"{self.path}: categories: ids {names[category.name]} and {category.id} are both named "
                    f"{category.name!r}; one name must mean one thing, so rename or merge them"
                )
            names[category.name] = category.id
        return found, {category.id: place for place, category in enumerate(found)}

    def _places(self, given: array[int], ids: Ints, key: str, among: str) -> Ints:
        """Places of the given ids among sorted ids. InputError names the first annotation whose id is not there."""
        wanted = np.array(given, np.int64)
        places = np.searchsorted(ids, wanted)
        unknown = ids[np.minimum(places, len(ids) - 1)] != wanted
        if unknown.any():
            place = int(np.flatnonzero(unknown)[0])
            raise InputError(
                f"{self._where('annotations', place)}: {key} {wanted[place]} is not among the {among}; the file is "
                f"damaged or mixed up"
            )
        return places.astype(np.int64)

    def _known(self, place: int, category_places: dict[int, int]) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        absent, partial = self.known[place]
        for each in (*(absent or ()), *partial):
            if each not in category_places:
                raise InputError(f"{self._where('images', place)}: category {each} is not among the categories")
        as_places = None if absent is None else tuple(category_places[each] for each in absent)
        return as_places, tuple(category_places[each] for each in partial)

    def _where(self, key: str, place: int) -> str:
        ids = {"annotations": lambda: self.ids[place], "images": lambda: self.images[place][0],
               "categories": lambda: self.categories[place].id}  # fmt: skip
        return f"{self.path}: {key}[{place}] (id {ids[key]()})"


# ---- fields of one record, fast: these are called for every box of a set ----


def whole(record: Any, key: str, where: str, low: int = -_MAX_ID, high: int = _MAX_ID) -> int:
    """A whole number within limits. Raises InputError."""
    value = record.get(key)
    if type(value) is not int or not low <= value <= high:
        expected = "a whole number" if low == -_MAX_ID else f"a whole number from {low} to {high:,}"
        _fail(record, key, where, expected)
    return value


def text(record: Any, key: str, where: str) -> str:
    """A text with something in it, without space around it. Raises InputError."""
    value = record.get(key)
    if type(value) is not str or not value.strip() or not value.isprintable():
        _fail(record, key, where, "a text of printable characters")
    return str(value).strip()


def numbers(record: Any, key: str, where: str) -> tuple[float, float, float, float]:
    """[left, top, width, height], finite, width and height from 0 on. Raises InputError."""
    value = record.get(key)
    if type(value) is list and len(value) == 4:
        left, top, width, height = value
        plain = {type(left), type(top), type(width), type(height)} <= _NUMBERS
        if plain and -_FAR < left < _FAR and -_FAR < top < _FAR and 0 <= width < _FAR and 0 <= height < _FAR:
            return left, top, width, height
    _fail(record, key, where, "[left, top, width, height] in pixels, under 1e9, width and height from 0 on")


_NUMBERS = {int, float}
_FAR = 1e9


def _fail(record: Any, key: str, where: str, expected: str) -> NoReturn:
    if key not in record:
        has = ", ".join(sorted(map(str, record))[:8]) or "nothing"
        raise InputError(f"{where}: no field {key!r}; it has {has}")
    raise InputError(f"{where}: {key}: expected {expected}, got {shown(record[key])}")


def shown(value: Any) -> str:
    """A value as messages repeat it: short, on one line."""
    if isinstance(value, list) and len(value) <= 8 and all(type(each) in (int, float) for each in value):
        return repr(value)[:80]
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value if not isinstance(value, str) else value[:60])[:80]
