"""Detections as a COCO results file, for the tools that compute average precision.

Results name pictures and names by number. The numbers come from an annotation file, where there is one; else they are
counted from 1, and a second file says what they mean, in the form of an annotation file without annotations.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mammut_runtime.detection.boxes import Detections
from mammut_runtime.errors import InputError
from mammut_runtime.strict import parse_json

MAX_ANNOTATION_BYTES = 4 * 2**30


@dataclass(frozen=True)
class CocoNumbers:
    """Numbers of pictures and names, from an annotation file."""

    pictures: dict[str, int]
    """By file_name, and by its last part where that is unambiguous."""
    names: dict[str, int]
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Width and height of the pictures that have them in the file, by number."""

    @classmethod
    def read(cls, path: Path) -> CocoNumbers:
        """Raises InputError, which names the record, for what is no COCO annotation file."""
        try:
            size = path.stat().st_size
            if not path.is_file() or size > MAX_ANNOTATION_BYTES:
                limit = f"{MAX_ANNOTATION_BYTES:,}"
                raise InputError(f"{path}: {size:,} bytes, expected a file of annotations of at most {limit}")
            text = path.read_bytes()
        except OSError as problem:
            raise InputError(f"{path}: cannot be read ({problem.strerror})") from problem
        data = parse_json(text, str(path), InputError, MAX_ANNOTATION_BYTES)
        if not isinstance(data, dict):
            raise InputError(f"{path}: expected an object with images and categories, as COCO has it")
        files = _numbered(path, data, "images", "file_name")
        last: dict[str, int | None] = {}
        for file, number in files.items():
            part = file.rsplit("/", 1)[-1]
            last[part] = None if part in last else number
        pictures = {part: number for part, number in last.items() if number is not None} | files
        return cls(pictures, _numbered(path, data, "categories", "name"), _sizes(path, data["images"]))


class CocoResults:
    """Collects what was found in pictures."""

    def __init__(self, names: Sequence[str], numbers: CocoNumbers | None = None) -> None:
        """names: of the vocabulary. Raises InputError for a name that the annotation file does not have."""
        if numbers is not None:
            for name in names:
                if name not in numbers.names:
                    known = ", ".join(list(numbers.names)[:8])
                    raise InputError(f"the annotation file has no category {name!r}; it has {known}")
        self._given = numbers
        self._names = numbers.names if numbers else {name: index for index, name in enumerate(names, 1)}
        self._pictures: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    @property
    def numbered(self) -> bool:
        """Whether an annotation file numbers the pictures: then boxes are to be of the pictures as they are stored."""
        return self._given is not None

    def add(self, path: Path, found: Detections) -> None:
        """Raises InputError for a picture that the annotation file does not have, or has in another size."""
        number = len(self._pictures) + 1
        if self._given is not None:
            known = self._given.pictures
            number = known.get(path.as_posix(), known.get(path.name, -1))
            if number < 0:
                raise InputError(f"{path}: is not in the annotation file, which numbers the pictures; leave one out")
            size_there = self._given.sizes.get(number, (found.width, found.height))
            if size_there != (found.width, found.height):
                raise InputError(
                    f"{path}: {found.width}x{found.height} pixels as it is stored, and the annotation file says "
                    f"{size_there[0]}x{size_there[1]}; its boxes are of another picture"
                )
        size = {"width": found.width, "height": found.height}
        self._pictures.append({"id": number, "file_name": path.as_posix(), **size})
        for each in found:
            box = [round(value, 3) for value in each.box.xywh]
            self._results.append(
                {"image_id": number, "category_id": self._names[each.name], "bbox": box, "score": round(each.score, 6)}
            )

    def write(self, path: Path) -> Path | None:
        """Write the results, and beside them what the numbers mean (its path), unless an annotation file says so.

        Raises InputError.
        """
        _write_json(path, self._results)
        if self._given is not None:
            return None
        meaning = path.with_name(f"{path.stem}.index{path.suffix or '.json'}")
        categories = [{"id": number, "name": name} for name, number in self._names.items()]
        _write_json(meaning, {"images": self._pictures, "categories": categories, "annotations": []})
        return meaning


def _numbered(path: Path, data: dict[str, Any], key: str, field: str) -> dict[str, int]:
    records = data.get(key)
    if not isinstance(records, list):
        raise InputError(f"{path}: {key}: expected a list, as COCO has it")
    found: dict[str, int] = {}
    for index, record in enumerate(records):
        where = f"{path}: {key}[{index}]"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object with id and {field}")
        number, text = record.get("id"), record.get(field)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(text, str):
            raise InputError(f"{where}: expected a whole number as id and a text as {field}")
        if text in found:
            raise InputError(f"{where}: {field} {text!r} is there twice")
        found[text] = number
    return found


def _sizes(path: Path, records: list[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """By number, of the records that have both sides."""
    found: dict[int, tuple[int, int]] = {}
    for index, record in enumerate(records):
        if "width" not in record or "height" not in record:
            continue
        sides = record["width"], record["height"]
        if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
            raise InputError(f"{path}: images[{index}]: expected whole numbers above 0 as width and height")
        found[record["id"]] = sides
    return found


def _write_json(path: Path, value: object) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with part.open("x", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(problem, OSError):
            raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem
        raise
