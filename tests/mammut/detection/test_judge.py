"""The judge: perfect boxes get 1, the control is no lucky order, and the scenes are fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mammut.demo.scenes import SCENE_NOVEL
from mammut.detection.coco_results import Found
from mammut.detection.detector import Detector
from mammut.detection.judge import SceneJudge, Vocabulary, average_precision_50, find, other_order
from mammut.detection.samples import BoxedPicture, BoxedSet
from mammut.detection.scene_source import training_scenes
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule

Made = Callable[..., Detector]
RULE = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)
DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
NAMES = ("a", "b", "c")


def some_set(pictures: int = 4) -> BoxedSet:
    rng = np.random.default_rng(0)
    found = []
    for number in range(pictures):
        low = rng.uniform(0, 30, (2, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 30, (2, 2))], axis=1).astype(np.float32)
        labels = tuple(NAMES[int(k)] for k in rng.integers(3, size=2))
        found.append(BoxedPicture(str(number), np.zeros((64, 64, 3), np.uint8), boxes, labels, np.zeros(2, bool)))
    return BoxedSet("some", NAMES, found)


def test_right_boxes_get_one() -> None:
    boxed = some_set()
    right = [
        Found.of_corners(each.boxes, np.full(2, 0.9), np.array([NAMES.index(label) for label in each.labels]))
        for each in boxed.pictures
    ]
    assert average_precision_50(boxed, right) == 1.0
    wrong = [Found(each.boxes, each.scores, (each.labels + 1) % 3) for each in right]
    assert average_precision_50(boxed, wrong) < 0.5


def test_a_control_keeps_nothing_in_place() -> None:
    for count in (2, 3, 35):
        orders = [other_order(count, seed) for seed in range(5)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert all(place != other for order in orders for place, other in enumerate(order))
    with pytest.raises(InputError, match="at least two names"):
        other_order(1, 0)


@torch.no_grad()
def test_find_is_the_forward(make_detector: Made) -> None:
    """What the judge computes step by step is what the detector gives at once, in the picture's own pixels."""
    detector = make_detector("paper", nms_iou=1.0, threshold=0.0)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)]
    rows = F.normalize(torch.randn(3, 24), dim=-1)
    found = find(detector, images, {"x": Vocabulary(rows, torch.tensor([0, 1.0, 0]))}, RULE)["x"]
    pixels = (torch.from_numpy(images[1]).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    boxes, scores = detector(pixels, rows, torch.tensor([0, 1.0, 0]))
    for box, label, score in zip(found[1].boxes, found[1].labels, found[1].scores, strict=True):
        row = int((scores[0, :, label] - score).abs().argmin())
        np.testing.assert_allclose(float(scores[0, row, label]), score, rtol=1e-4)
        np.testing.assert_allclose(box[:2], boxes[0, row, :2].numpy(), atol=1e-2)
    for each, side in zip(found, (32, 64), strict=True):
        assert (each.boxes[:, :2] + each.boxes[:, 2:] <= side + 1e-3).all()


@pytest.mark.shared
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not part of a clone")
def test_scenes_are_fixed_and_held_out() -> None:
    judge = SceneJudge(DATA, scenes=6, size=96)
    sets, again = judge.sets(), judge.sets()
    for kind, boxed in sets.items():
        for one, other in zip(boxed.pictures, again[kind].pictures, strict=True):
            assert np.array_equal(one.rgb(), other.rgb())
        assert all((name in SCENE_NOVEL) == (kind == "novel") for name in boxed.names)
    trained = training_scenes(DATA, 96, ("ace",))
    assert not set(trained.names) & SCENE_NOVEL
    picture = trained.draw(np.random.default_rng(0))
    assert picture.absent is not None
    assert "ace" in picture.absent
    assert set(picture.absent) | set(picture.labels) == {*trained.names, "ace"}
