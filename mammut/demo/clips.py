"""The clips of the demo: which drawings move over which photographs. Composing is mammut.data.clip_scenes'.

Held out are a tenth of the photographs as backgrounds and, for a second figure, one vendor's drawings of a sixth of the
names. No clip of a training background is ever judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from mammut.data.clip_scenes import (
    CLIP_KINDS,
    CLIP_QUESTION_KINDS,
    ClipScene,
    Thing,
    compose_clip,
)
from mammut.data.pairs import square
from mammut.demo.recipe import held_out_photos
from mammut.demo.scenes import scene_drawings
from mammut_runtime.errors import InputError

BACKGROUND_SIDE = 128
"""Pixels: some room around the 96 that are seen."""


@dataclass(frozen=True, eq=False)
class HeldOutClip:
    """A clip to be judged."""

    scene: ClipScene
    photo: int
    """Number of the photograph behind it. Clips of one photograph are alike."""
    credit: str
    """Whom to name for the photograph where it is shown."""


def held_out_clips(
    data: Path, number: int, *, frames: int = 16, size: int = 96, new_drawings: bool = False, seed: int = 0
) -> Iterator[HeldOutClip]:
    """Clips over photographs that are never trained on, all kinds in turn; the same for the same arguments.

    new_drawings: with drawings that are never trained on either. Errors as recipe.training_pairs'.
    """
    drawings = scene_drawings(data, held_out=new_drawings)
    pairs = held_out_photos(data)
    photos = [square(pair.data, max(BACKGROUND_SIDE, size), alpha=False) for pair in pairs]
    order = np.random.default_rng(seed).permutation(len(photos))
    for index in range(number):
        rng = np.random.default_rng([seed, int(new_drawings), index])
        photo, kind = int(order[index % len(photos)]), CLIP_KINDS[index % len(CLIP_KINDS)]
        scene = compose_clip(rng, drawings, photos[photo], frames, size, kind)
        yield HeldOutClip(scene, photo, pairs[photo].credit)


def training_questions(data: Path, number: int, seed: int = 1) -> Iterator[ClipScene]:
    """Clips with questions as training has them, of the least size: for what is answered without looking."""
    rng, drawings = np.random.default_rng(seed), scene_drawings(data)
    for _ in range(number):
        yield compose_clip(rng, drawings, np.zeros((40, 40, 3), np.uint8), 12, 32)


def clip_strip(clip: ClipScene, said: Sequence[str] = (), shown: int = 6) -> npt.NDArray[np.uint8]:
    """uint8[H, W, 3] RGB: frames spread evenly over a clip side by side, and below them its caption and its questions
    with their answers; `said`: what a model says to each of these, green where it is right."""
    picked = np.rint(np.linspace(0, len(clip.frames) - 1, shown)).astype(int)
    pictures = np.hstack([np.pad(clip.frames[at], ((0, 0), (0, 4), (0, 0))) for at in picked])
    lines = [
        (clip.captions[0], clip.captions[0]),
        *((f"{question} {answer}", answer) for question, answer in clip.asked),
    ]
    told: npt.NDArray[np.uint8] = np.full((28 * len(lines) + 6, pictures.shape[1], 3), 255, np.uint8)
    if not said:
        told = told[: 14 * len(lines) + 6]
    for number, (line, _) in enumerate(lines):
        _write(told, line, (2 if said else 1) * number, (0, 0, 0) if number == 0 else (90, 90, 90))
    for number, (text, (_, truth)) in enumerate(zip(said, lines, strict=False)):
        right = "".join(text.split()) == "".join(truth.split())  # the tokenizer puts blanks around commas
        _write(told, f"   > {text}", 2 * number + 1, (0, 120, 0) if right else (190, 0, 0))
    return np.vstack([pictures, told])


def _padded(strip: npt.NDArray[np.uint8], height: int) -> npt.NDArray[np.uint8]:
    return np.pad(strip, ((0, height - len(strip)), (0, 8), (0, 0)), constant_values=255)


def _write(told: npt.NDArray[np.uint8], text: str, line: int, colour: tuple[int, int, int]) -> None:
    cv2.putText(told, text, (4, 12 + 14 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, 1, cv2.LINE_AA)


def write_sheet(path: Path, strips: Sequence[npt.NDArray[np.uint8]], credits: Sequence[str], columns: int = 2) -> None:
    """Strips of several clips as a PNG or JPEG for people to look at, and beside it a .md with whom to credit.

    Raises:
        InputError: it cannot be written there.
    """
    if path.suffix not in (".png", ".jpg"):
        raise InputError(f"{path}: expected a name that ends in .png or .jpg")
    even = [*strips, *[np.full_like(strips[0], 255)] * (-len(strips) % columns)]
    rows = []
    for start in range(0, len(even), columns):
        beside = even[start : start + columns]
        tallest = max(len(strip) for strip in beside)
        rows.append(np.hstack([_padded(strip, tallest) for strip in beside]))
    header = f"Photographs in {path.name}, row by row, and whom to credit; the drawings: Apache-2.0"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, np.vstack(rows)[:, :, ::-1])[1].tobytes())
        text = "\n".join([header, "", *(f"- {credit}" for credit in credits), ""])
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem


__all__ = [
    "BACKGROUND_SIDE", "CLIP_KINDS", "CLIP_QUESTION_KINDS", "ClipScene", "HeldOutClip", "Thing", "clip_strip",
    "compose_clip", "held_out_clips", "training_questions", "write_sheet",
]  # fmt: skip
