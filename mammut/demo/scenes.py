"""The scenes of the demo: which emoji are placed, and on which photographs. Composing is mammut.data.scenes'."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mammut.data.pairs import Pair, read_drawing, square
from mammut.data.scenes import Bytes, Drawing, Placed, Scene, compose, trimmed
from mammut.demo.recipe import emoji_pairs, held_out_drawing, held_out_photos, photo_pairs
from mammut.demo.scene_names import SCENE_NAMES, SCENE_NOVEL


def scene_drawings(
    data: Path, vendor: Literal["noto", "blobmoji"] | None = None, *, held_out: bool = False
) -> list[Drawing]:
    """The drawings that may be trained on, or those `held_out` (one vendor's, of a sixth of the names).

    Errors as recipe.training_pairs'.
    """
    chosen = (pair for pair in emoji_pairs(data) if held_out_drawing(pair) == held_out)
    return drawings_of(pair for pair in chosen if vendor in (None, pair.name.partition("/")[0]))


def drawings_of(pairs: Iterable[Pair]) -> list[Drawing]:
    """Those with a name in SCENE_NAMES. InputError for a damaged picture."""
    found = []
    for pair in pairs:
        name = pair.matches[1]
        if name in SCENE_NAMES:
            found.append(Drawing(name, pair.name.partition("/")[0], trimmed(read_drawing(pair.data))))
    return found


def backgrounds(data: Path, split: Literal["train", "val"], side: int) -> list[Bytes]:
    """The photographs of one split, uint8[side, side, 3] each, squashed. Errors as recipe.training_pairs'."""
    pairs = photo_pairs(data, "train") if split == "train" else held_out_photos(data)
    return [square(pair.data, side, alpha=False) for pair in pairs]


__all__ = [
    "SCENE_NAMES", "SCENE_NOVEL", "Drawing", "Placed", "Scene", "backgrounds", "compose", "drawings_of",
    "scene_drawings",
]  # fmt: skip
