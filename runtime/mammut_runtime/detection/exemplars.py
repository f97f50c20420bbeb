"""A picture of a thing in the place of its name: the crop that is embedded, and how it is described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.detection.boxes import Floats
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture, read_picture

if TYPE_CHECKING:
    from mammut_runtime.model import Image, Model

U8 = NDArray[np.uint8]

MOST_SIDE = 2048
"""Pixels of a crop. The square of a long picture could have a thousand times its pixels; no encoder sees so many."""
_TOGETHER = 8
"""Crops that are in memory at a time."""


@dataclass(frozen=True, eq=False)
class Exemplar:
    """A thing that has no name, or a better picture than name."""

    name: str
    """What it is called in the results. Several exemplars of one name are averaged."""
    image: Image
    box: tuple[float, float, float, float] | None = None
    """Where it is, xyxy in pixels of the upright picture; None: the picture shows nothing else."""


def exemplar_crop(pixels: U8, box: tuple[float, float, float, float] | None, where: str) -> tuple[U8, bool]:
    """The square around a box, uint8[S, S, 3], and whether the box had to be cut at the picture's edges.

    The square is as large as the box's long side, with what is around the box in the picture; what lies outside the
    picture is grey. So the encoder sees the whole thing, in its shape. S is at most MOST_SIDE: what is larger is
    shrunk. Raises InputError for a box without area, or
    without a pixel of the picture.
    """
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = box or (0.0, 0.0, float(width), float(height))
    if not (np.isfinite([x0, y0, x1, y1]).all() and x0 < x1 and y0 < y1):
        raise InputError(
            f"{where}: expected a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {x0:g},{y0:g},{x1:g},{y1:g}"
        )
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InputError(f"{where}: the box {x0:g},{y0:g},{x1:g},{y1:g} is outside the picture of {width}x{height}")
    left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
    right, bottom = min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))
    side = max(right - left, bottom - top)
    column, row = (left + right - side) // 2, (top + bottom - side) // 2
    inside_x, inside_y = slice(max(0, column), min(width, column + side)), slice(max(0, row), min(height, row + side))
    square = _squared(pixels[inside_y, inside_x], side, inside_y.start - row, inside_x.start - column)
    return square, bool(x0 < 0 or y0 < 0 or x1 > width or y1 > height)


def _squared(part: U8, side: int, top: int, left: int) -> U8:
    """The part at its place in a grey square of side x side, shrunk to MOST_SIDE before the square is made."""
    if side > MOST_SIDE:
        scale = MOST_SIDE / side
        height, width = (max(1, round(length * scale)) for length in part.shape[:2])
        part = np.asarray(cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        side = MOST_SIDE
        top, left = min(round(top * scale), side - height), min(round(left * scale), side - width)
    square: U8 = np.full((side, side, 3), 127, np.uint8)
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    return square


def parse_exemplar(text: str) -> Exemplar:
    """NAME=FILE or NAME=FILE:x0,y0,x1,y1, as the command line has it. Raises InputError."""
    wanted = "expected NAME=FILE or NAME=FILE:x0,y0,x1,y1"
    name, equals, rest = text.partition("=")
    if not equals or not name.strip() or not rest:
        raise InputError(f"--exemplar {text!r}: {wanted}")
    file, colon, numbers = rest.rpartition(":")
    parts = numbers.split(",")
    if not colon or len(parts) != 4:
        return Exemplar(name.strip(), Path(rest))
    try:
        x0, y0, x1, y1 = (float(each) for each in parts)
    except ValueError:
        raise InputError(f"--exemplar {text!r}: {wanted}, the last four being numbers") from None
    return Exemplar(name.strip(), Path(file), (x0, y0, x1, y1))


def embed_exemplars(model: Model, exemplars: Sequence[Exemplar]) -> tuple[list[tuple[str, Floats]], tuple[str, ...]]:
    """An embedding float32[E], of unit length, for each name, and what was cut. Raises InputError."""
    by_name: dict[str, list[Floats]] = {}
    cut = 0
    for start in range(0, len(exemplars), _TOGETHER):
        group = exemplars[start : start + _TOGETHER]
        crops = [_crop(each) for each in group]
        cut += sum(was_cut for _, was_cut in crops)
        for each, seen in zip(group, model.encode_batch([crop for crop, _ in crops]), strict=True):
            by_name.setdefault(each.name, []).append(seen.embedding)
    means = {name: np.mean(rows, axis=0) for name, rows in by_name.items()}
    units = [(name, (row / np.maximum(np.linalg.norm(row), 1e-12)).astype(np.float32)) for name, row in means.items()]
    notice = f"{cut} of {len(exemplars)} exemplar boxes reach out of their pictures and were cut"
    return units, ((notice,) if cut else ())


def _crop(exemplar: Exemplar) -> tuple[U8, bool]:
    image = exemplar.image
    if isinstance(image, str | Path | bytes):
        image = read_picture(image)
    pixels = image.rgb() if isinstance(image, Picture) else image
    return exemplar_crop(pixels, exemplar.box, f"exemplar of {exemplar.name!r}")
