"""LVIS v1: COCO's form, and for each picture what was looked for in it.

    images      "neg_category_ids": names that are not in the picture; "not_exhaustive_category_ids": names of which not
                every thing has a box; "coco_url" instead of "file_name"
    categories  "frequency": "r" rare, "c" common, "f" frequent

About a name that has no box in a picture and is not said to be absent, nothing is known there.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from mammut.detection.box_files import BoxFile, Category
from mammut.detection.coco_files import CocoForm, read_boxes, shown, text, whole
from mammut.detection.samples import Frequency
from mammut_runtime.errors import InputError


def read_lvis(path: Path) -> BoxFile:
    """An LVIS v1 file; "bow_(weapon)" is read as "bow (weapon)". Raises InputError as read_coco does."""
    return read_boxes(path, LvisForm())


class LvisForm(CocoForm):
    """What LVIS says beyond COCO."""

    federated = True

    def category(self, record: Any, where: str) -> Category:
        name = " ".join(text(record, "name", where).replace("_", " ").split())
        frequency = text(record, "frequency", where)
        if frequency not in ("r", "c", "f"):
            raise InputError(f"{where}: frequency: expected r, c or f, got {shown(frequency)}")
        if not name:
            raise InputError(f"{where}: name: expected words, got {shown(record['name'])}")
        return Category(whole(record, "id", where), name, cast(Frequency, frequency))

    def file_name(self, record: Any, where: str) -> str:
        if "file_name" in record:
            return text(record, "file_name", where)
        try:
            address = urlsplit(text(record, "coco_url", where)).path
        except ValueError as problem:  # brackets that hold no address
            given = shown(record["coco_url"])
            raise InputError(f"{where}: coco_url: expected an address, got {given} ({problem})") from problem
        parts = PurePosixPath(address).parts[-2:]
        if len(parts) < 2 or parts[0] == "/":
            raise InputError(f"{where}: coco_url: expected .../FOLDER/FILE, got {shown(record['coco_url'])}")
        return "/".join(parts)

    def known(self, record: Any, where: str) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
        return _ids(record, "neg_category_ids", where), _ids(record, "not_exhaustive_category_ids", where)


def _ids(record: Any, key: str, where: str) -> tuple[int, ...]:
    value = record.get(key)
    if key not in record:
        raise InputError(f"{where}: no field {key!r}; LVIS v1 has it for every picture (a COCO file is read as coco:)")
    if type(value) is not list or not all(type(each) is int for each in value):
        raise InputError(f"{where}: {key}: expected a list of ids of categories, got {shown(value)}")
    return tuple(dict.fromkeys(value))
