"""A checkpoint's boxes are those that the runtime finds with the same detector and words."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut.detection.config import detector_for
from mammut.detection.detector import Detector
from mammut.evaluation.checkpoint_predictor import CheckpointPredictor, TorchGraph
from mammut.evaluation.predictor import PredictorOptions, found_of
from mammut_runtime.detection.detector import PictureDetector
from mammut_runtime.detection.rule import DetectionRule
from mammut_runtime.errors import CheckpointError
from mammut_runtime.graphs import Graphs

TESTS = Path(__file__).parents[1]
OPTIONS = PredictorOptions(batch_size=2, threads=1)
NAMES = ["cat", "red dog", "Emu"]
MOST = 20


def _tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_bundle", TESTS / "make_tiny_bundle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random weights; "emu" is a name with boxes in training."""
    plain: Checkpoint = _tiny().tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    config = dataclasses.replace(detector_for(plain.model.config, ("a {}.", "the {}.")), base_names=("emu",))
    torch.manual_seed(3)
    detector = Detector(config, plain.model)
    for name, value in detector.own_state().items():  # heads begin at zero, where all boxes are alike
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
        assert torch.isfinite(value).all(), name
    return dataclasses.replace(plain, detector=detector.eval())


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (30 + 37 * place, 90, 3), np.uint8) for place in range(3)]


def runtime_detector(checkpoint: Checkpoint) -> PictureDetector:
    """The runtime's own, with the checkpoint's detector as its graph."""
    predictor = CheckpointPredictor(checkpoint, OPTIONS)
    detector, config = checkpoint.detector, checkpoint.detector.config
    rule = DetectionRule(
        config.image_size, checkpoint.preprocess.mean, checkpoint.preprocess.std, config.fill, config.proposals,
        config.nms_iou, config.threshold, config.templates, config.base_names, config.base_weight, config.novel_weight,
        config.objectness_power,
    )  # fmt: skip

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(("boxes", "scores"), detector(feeds["pixels"], feeds["classes"], feeds["novel"]), strict=True))

    model = SimpleNamespace(name="tiny", embed_dim=checkpoint.model.config.embed_dim)
    manifest = SimpleNamespace(detection=rule, model=model, profiles={}, graphs={})
    bundle = SimpleNamespace(manifest=manifest, content_hash="x" * 64, path=Path("x"))
    graphs = Graphs(("detector",), lambda name: TorchGraph(run, torch.device("cpu")))
    return PictureDetector(graphs, bundle, lambda: predictor._text)  # type: ignore[arg-type]


def test_the_runtime_finds_the_same(checkpoint: Checkpoint, images: list[np.ndarray]) -> None:
    found = CheckpointPredictor(checkpoint, OPTIONS).detect(images, NAMES, MOST)
    runtime = runtime_detector(checkpoint)
    words = runtime.vocabulary(NAMES, (), ())
    squares = [runtime.square(image, "rgb") for image in images]
    for own, other in zip(found, runtime.detect(squares, words, 0.0, MOST), strict=True):
        expected = found_of(other, NAMES, MOST)
        assert len(own.scores) == len(expected.scores) == MOST
        np.testing.assert_allclose(own.scores, expected.scores, atol=1e-6)
        np.testing.assert_allclose(own.boxes, expected.boxes, atol=1e-3)
        assert (own.labels == expected.labels).mean() > 0.9  # of equal scores the order is free
    assert len({box for each in found for box in map(tuple, each.boxes.round())}) > MOST  # control: not all alike


def test_names_with_boxes_in_training_are_scored_as_such(checkpoint: Checkpoint, images: list[np.ndarray]) -> None:
    without = dataclasses.replace(checkpoint.detector.config, base_names=())
    detector = Detector(without, checkpoint.model).eval()
    detector.load_own(checkpoint.detector.own_state())
    other = dataclasses.replace(checkpoint, detector=detector)
    first, second = (
        CheckpointPredictor(each, OPTIONS).detect(images[:1], ["emu"], 5)[0] for each in (checkpoint, other)
    )
    assert np.abs(first.scores - second.scores).max() > 1e-4
    assert len(first.scores) == 5


def test_a_checkpoint_without_a_detector(checkpoint: Checkpoint, images: list[np.ndarray]) -> None:
    plain = dataclasses.replace(checkpoint, detector=None)
    with pytest.raises(CheckpointError, match="has no detector, which finding boxes needs"):
        CheckpointPredictor(plain, OPTIONS).detect(images, NAMES, MOST)
