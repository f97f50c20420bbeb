"""Pictures with boxes: what the readers (COCO, LVIS) and the composed scenes give to training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Frequency = Literal["r", "c", "f"]
"""LVIS: rare (in 1 to 10 training pictures), common (11 to 100), frequent."""


@dataclass(frozen=True)
class BoxedPicture:
    """One picture and what is known of the things in it."""

    name: str
    """For messages and results: the file's name, or how it was composed."""
    picture: Path | bytes | U8
    """A file, the bytes of one, or uint8[H, W, 3] RGB. Files are read as they are stored: that is what their boxes
    were drawn on."""
    boxes: F32
    """float32[n, 4], xyxy in pixels of the stored picture, inside it, wider and higher than 0."""
    labels: tuple[str, ...]
    """The name in each box."""
    ignore: npt.NDArray[np.bool_]
    """bool[n]: a region (COCO's crowds) that is neither a thing to find nor background."""
    absent: tuple[str, ...] | None = None
    """Names that are known not to be in the picture; None: every name of the set that is no label. LVIS says it for
    few names a picture; about all others nothing is known, and they must not count as wrong."""
    partial: tuple[str, ...] = ()
    """Names of which not every thing in the picture has a box."""
    stated: tuple[int, int] | None = None
    """Width and height that the record of a file's picture gives, pixels; its boxes are in them."""

    def rgb(self) -> U8:
        """uint8[H, W, 3]. Raises mammut_runtime.errors.InputError where the file cannot be read, or is not as large as
        its record says."""
        if isinstance(self.picture, np.ndarray):
            return self.picture
        pixels = read_picture(self.picture, upright=False).rgb()
        height, width = pixels.shape[:2]
        if self.stated not in (None, (width, height)):
            told = "{} x {}".format(*self.stated or ())
            raise InputError(
                f"{self.name}: the picture has {width} x {height} pixels and its record says {told}: the boxes are of "
                "another picture; take the one they were drawn on"
            )
        return pixels


@dataclass(frozen=True)
class BoxedSet:
    """Pictures that were labelled with one list of names."""

    name: str
    names: tuple[str, ...]
    """Every name that was looked for, in the file's order."""
    pictures: Sequence[BoxedPicture]
    frequency: Mapping[str, Frequency] = field(default_factory=dict)
    """Of each name, where the set says so (LVIS)."""
