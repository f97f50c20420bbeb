"""Few-shot from the tasks' side: what is learned from, and that it is clean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammut.evaluation.bootstrap import point
from mammut.evaluation.examples import EvalSet, Example, Image, PictureRef
from mammut.evaluation.outcome import TaskOptions
from mammut.evaluation.predictor import CorruptedPredictor
from mammut.evaluation.task_few_shot import few_shot
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture

LABELS = ["blue", "green", "red"]


class ColourPredictor:
    """Embeds a picture as its mean colour, and remembers how many it has seen."""

    name, templates = "colours", ("{}",)
    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.seen = 0

    def embed_pictures(self, images: Sequence[Image]) -> np.ndarray:
        self.seen += len(images)
        means = [(image.rgb() if isinstance(image, Picture) else image).mean(axis=(0, 1)) + 1 for image in images]
        return np.stack([mean / np.linalg.norm(mean) for mean in means]).astype(np.float32)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError

    def caption(self, images: Sequence[Image]) -> list[str]:
        raise NotImplementedError

    def answer(self, images: Sequence[Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture
def sets(tmp_path: Path) -> tuple[EvalSet, EvalSet]:
    """(judged, learned from): coloured pictures, four of each colour in both."""
    examples = []
    for index in range(24):
        pixels = np.full((8, 8, 3), 20, np.uint8)
        pixels[:, :, index % 3] = 120 + 5 * index  # OpenCV: blue, green, red
        cv2.imwrite(str(tmp_path / f"{index}.png"), pixels)
        examples.append(Example(PictureRef(str(index), tmp_path / f"{index}.png"), label=LABELS[index % 3]))
    return EvalSet.of("judged", examples[:12]), EvalSet.of("learned", examples[12:])


def options(tmp_path: Path, *shots: int) -> TaskOptions:
    return TaskOptions(workspace=tmp_path, shots=shots, draws=3, batch_size=5)


def test_colours_are_learned_from_one_picture_each(sets: tuple[EvalSet, EvalSet], tmp_path: Path) -> None:
    found = few_shot(ColourPredictor(), sets[0], options(tmp_path, 1, 2), LABELS, sets[1])
    assert [point(each.statistic, each.items) for each in found.measures] == [1.0] * 4
    assert found.show(4).truth == found.show(4).given == ("green",)
    assert found.notes == ()


def test_each_picture_is_embedded_once(sets: tuple[EvalSet, EvalSet], tmp_path: Path) -> None:
    predictor = ColourPredictor()
    few_shot(predictor, sets[0], options(tmp_path, 1, 2, 4), LABELS, sets[1])
    assert predictor.seen == 24


def test_classes_with_too_few_pictures_are_noted_and_with_none_refused(
    sets: tuple[EvalSet, EvalSet], tmp_path: Path
) -> None:
    assert "only 4 pictures" in few_shot(ColourPredictor(), sets[0], options(tmp_path, 9), LABELS, sets[1]).notes[0]
    with pytest.raises(InputError, match="no pictures to learn red from"):
        few_shot(ColourPredictor(), sets[0], options(tmp_path, 1), LABELS, sets[1].where(lambda e: e.label != "red"))


def test_what_is_learned_from_stays_clean(sets: tuple[EvalSet, EvalSet], tmp_path: Path) -> None:
    inner = ColourPredictor()
    worse = CorruptedPredictor(inner, "fog", 5, {})
    clean = few_shot(inner, sets[0], options(tmp_path, 4), LABELS, sets[1])
    fogged = few_shot(worse, sets[0], options(tmp_path, 4), LABELS, sets[1])
    assert point(clean.measures[0].statistic, 12) == 1.0
    # Fog makes all nearly grey: compared with clean colours they cannot all be right by their own means.
    images = [example.picture.read() for example in sets[0]]
    assert np.abs(worse.embed_pictures(images) - inner.embed_pictures(images)).max() > 0.1
    assert 0 <= point(fogged.measures[0].statistic, 12) <= 1
