"""The pictures and texts an export is checked with: the user's own, or a few made here, so there are always some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.canary import canary_picture
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PICTURES = 32
"""More would only make the export slower: each takes one uncached caption by the reference."""
MAX_PIXELS = 400_000_000
"""Of all pictures together; they are held in memory, three bytes each."""
TEXTS = (
    "a photo of a cat",
    "two red flowers in the rain",
    "A DOG, 3 birds & the number 42!",
    "a very small house beside a very large tree, seen from far away on a grey day in the early spring",
)


@dataclass(frozen=True)
class Sample:
    """One picture of the check."""

    name: str
    """Its file's name, or what was drawn."""
    pixels: NDArray[np.uint8]
    """uint8[H, W, 3], RGB."""
    kind: Literal["given", "drawn"]


def load_samples(places: tuple[Path, ...]) -> tuple[Sample, ...]:
    """Pictures from files and folders (not their subfolders), in order of name; without any, the drawn ones.

    Raises InputError for a place without pictures, a picture that cannot be read, or more than MAX_PICTURES or
    MAX_PIXELS.
    """
    if not places:
        return drawn_samples()
    paths: list[Path] = []
    for place in places:
        found = sorted(each for each in place.iterdir() if _is_picture(each)) if place.is_dir() else [place]
        if not found:
            raise InputError(f"{place}: no pictures in this folder; expected some of {', '.join(SUFFIXES)}")
        paths += found
    if len(paths) > MAX_PICTURES:
        raise InputError(f"{len(paths)} pictures to check with, expected at most {MAX_PICTURES}; give a smaller folder")
    samples: list[Sample] = []
    pixels = 0
    for path in paths:
        samples.append(Sample(path.name, read_picture(path).rgb(), "given"))
        pixels += samples[-1].pixels.shape[0] * samples[-1].pixels.shape[1]
        if pixels > MAX_PIXELS:
            raise InputError(
                f"{path}: the pictures to check with have more than {MAX_PIXELS // 10**6} megapixels together; "
                f"give fewer or smaller ones"
            )
    return tuple(samples)


def drawn_samples() -> tuple[Sample, ...]:
    """Five pictures, the same on every machine: two canary pictures and three plain shapes, wide, tall and square."""
    canvases = [np.full((*size, 3), colour, np.uint8) for size, colour in (
        ((180, 240), (225, 235, 245)), ((240, 160), (250, 240, 220)), ((200, 200), (30, 60, 40)),
    )]  # fmt: skip
    cv2.circle(canvases[0], (110, 90), 60, (215, 40, 40), cv2.FILLED)
    cv2.rectangle(canvases[1], (40, 60), (120, 190), (40, 80, 200), cv2.FILLED)
    for x in range(0, 200, 40):
        cv2.rectangle(canvases[2], (x, 0), (x + 19, 199), (240, 210, 60), cv2.FILLED)
    drawn = zip(("red disc", "blue box", "yellow stripes"), canvases, strict=True)
    return (
        *(
            Sample(f"canary {seed}", canary_picture(seed, size), "drawn")
            for seed, size in ((0, (192, 256)), (1, (256, 144)))
        ),
        *(Sample(name, canvas, "drawn") for name, canvas in drawn),
    )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
