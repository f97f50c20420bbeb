"""A bundle whose detector is a function that really finds things: rectangles in pure colours, at their places.

Red is a "cat", green a "dog", blue a "bird": a proposal's score for a name is high when the name's embedding is like
that of its colour's word. So geometry, names and thresholds can be tested from end to end without an engine.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mammut_runtime.bundle import Bundle, graph_contract, hash_files, write_manifest
from mammut_runtime.detection.rule import DetectionRule
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.model import Model

Arrays = dict[str, NDArray[Any]]
COLOURS = {"cat": (230, 20, 20), "dog": (20, 230, 20), "bird": (20, 20, 230)}
RULE = DetectionRule(
    size=64,
    mean=(0.5, 0.4, 0.3),
    std=(0.25, 0.2, 0.3),
    fill=127,
    proposals=9,
    nms_iou=0.5,
    threshold=0.3,
    templates=("{}", "the {}"),
    base_names=("cat",),
    weight_base=0.35,
    weight_novel=0.65,
    objectness_power=3.0,
)


class DetectingToy:
    """The toy bundle of tests/runtime with a detector."""

    def __init__(self, folder: Path, make_bundle: Any, rule: DetectionRule = RULE) -> None:
        self.base = make_bundle(folder)
        self.rule = rule
        (folder / "detector.onnx").write_bytes(b"")
        old = self.base.manifest
        graphs = {
            **old.graphs,
            "detector": graph_contract(old.model, old.preprocess.size, "float32", rule)["detector"],
        }
        self.base.manifest = dataclasses.replace(old, graphs=graphs, detection=rule, files=hash_files(folder))
        write_manifest(folder, self.base.manifest)
        self.folder = folder
        self.engine = FakeEngine(self._detect)
        self.base.engines["detector"] = self.engine
        self._colours: NDArray[np.float32] | None = None
        with self.model() as model:
            self._colours = model.classifier(list(COLOURS), rule.templates).embeddings
        self.base.engines["text"].calls.clear()

    def model(self) -> Model:
        def open_graph(name: str) -> FakeEngine:
            engine: FakeEngine = self.base.engines[name]
            return FakeEngine(engine.run)

        return Model(Bundle.open(self.folder), open_graph=open_graph)

    @property
    def texts(self) -> int:
        """How many texts the text tower has embedded."""
        return sum(len(feeds["ids"]) for feeds in self.base.engines["text"].calls)

    def _detect(self, feeds: Arrays) -> Arrays:
        pixels, classes, novel = feeds["pixels"], feeds["classes"], feeds["novel"]
        size = self.rule.size
        assert pixels.dtype == np.float32 and pixels.shape[1:] == (3, size, size) and len(novel) == len(classes)
        levels = pixels * np.array(self.rule.std)[:, None, None] + np.array(self.rule.mean)[:, None, None]
        boxes = np.zeros((len(pixels), self.rule.proposals, 4), np.float32)
        scores = np.zeros((len(pixels), self.rule.proposals, len(classes)), np.float32)
        assert self._colours is not None
        for index, picture in enumerate(levels):
            for number, (colour, row) in enumerate(zip(COLOURS.values(), self._colours, strict=True)):
                other = np.abs(picture - np.array(colour)[:, None, None] / 255).max(axis=0)
                rows, columns = np.nonzero(other < 0.25)
                if not len(rows):
                    continue
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
                odds = np.exp(np.append(300 * (classes @ row - 1), -4.0))  # the last is the background
                for copy in range(3):  # two worse ones beside it, for the suppression
                    boxes[index, 3 * number + copy] = box + copy * 0.5
                    scores[index, 3 * number + copy] = (odds / odds.sum())[:-1] * (1 - 0.05 * copy)
        return {"boxes": boxes, "scores": scores}


def scene(height: int, width: int, things: dict[str, tuple[int, int, int, int]]) -> NDArray[np.uint8]:
    """uint8[H, W, 3], grey, with a rectangle (xyxy) in the colour of each name."""
    picture = np.full((height, width, 3), 127, np.uint8)
    for name, (x0, y0, x1, y1) in things.items():
        picture[y0:y1, x0:x1] = COLOURS[name]
    return picture


@pytest.fixture
def detecting(tmp_path: Path, make_bundle: Any) -> DetectingToy:
    return DetectingToy(tmp_path / "detecting-toy", make_bundle)


@pytest.fixture(scope="session")
def make_scene() -> Any:
    """The function: `make_scene(height, width, {"cat": (x0, y0, x1, y1)})`."""
    return scene


@pytest.fixture(scope="session")
def make_detecting() -> Any:
    """The class: `make_detecting(folder, make_bundle, rule)`."""
    return DetectingToy
