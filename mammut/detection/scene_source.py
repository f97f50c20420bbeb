"""Composed scenes as pictures with boxes: what the demo's detector is trained and judged on.

Everything in a scene is known, so every name that has no box in it is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mammut.data.scenes import Bytes, Drawing, Scene, compose
from mammut.demo.scenes import SCENE_NOVEL, backgrounds, scene_drawings
from mammut.detection.samples import BoxedPicture, BoxedSet


@dataclass(frozen=True, eq=False)
class SceneSource:
    """Scenes of these drawings on these photographs.

    all_names: of every source that is trained beside it; none of them is in a scene unless it has a box.
    """

    drawings: Sequence[Drawing]
    photographs: Sequence[Bytes]
    size: int
    all_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "scenes"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({drawing.name for drawing in self.drawings}))

    def draw(self, rng: np.random.Generator) -> BoxedPicture:
        photograph = self.photographs[int(rng.integers(len(self.photographs)))]
        scene = compose(rng, self.drawings, photograph, self.size)
        return boxed(scene, "scene", (*self.names, *self.all_names))


def boxed(scene: Scene, name: str, names: Iterable[str]) -> BoxedPicture:
    """A scene as a picture with boxes; all `names` that it does not show are absent from it."""
    labels = tuple(placed.name for placed in scene.placed)
    return BoxedPicture(
        name=name,
        picture=scene.pixels,
        boxes=np.array([placed.box for placed in scene.placed], np.float32).reshape(-1, 4),
        labels=labels,
        ignore=np.zeros(len(labels), bool),
        absent=tuple(set(names) - set(labels)),
    )


def training_scenes(data: Path, size: int, all_names: tuple[str, ...] = ()) -> SceneSource:
    """All drawings that may be trained on but those of SCENE_NOVEL, on training photographs. Errors as
    scene_drawings'."""
    drawings = [drawing for drawing in scene_drawings(data) if drawing.name not in SCENE_NOVEL]
    return SceneSource(drawings, backgrounds(data, "train", size), size, all_names)


def held_out_scenes(drawings: Sequence[Drawing], photographs: Sequence[Bytes], size: int, count: int,
                    seed: int) -> BoxedSet:  # fmt: skip
    """A fixed set of scenes, which the seed decides."""
    rng = np.random.default_rng([seed, count])
    names = tuple(sorted({drawing.name for drawing in drawings}))
    pictures = []
    for number in range(count):
        scene = compose(rng, drawings, photographs[number % len(photographs)], size)
        pictures.append(boxed(scene, f"scene {number}", names))
    return BoxedSet(f"scenes {seed}", names, pictures)
