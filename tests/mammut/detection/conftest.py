"""Tiny detectors with random weights, on the paper's dialect and on openMaMMUT's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from mammut.detection.config import DetectorConfig, detector_for
from mammut.detection.detector import Detector
from mammut.model import Mammut
from mammut.presets import openmammut_config, tiny

VOCABULARY = 600


def _config(**changes: object) -> DetectorConfig:
    """64 px, strides 8, 16 and 32."""
    config = detector_for(tiny(), ("{}",))
    small = replace(
        config, image_size=64, width=16, stem_width=16, proposals=12, roi_size=3, roi_convs=1, roi_width=24,
        anchor_scale=2.0,
    )  # fmt: skip
    return replace(small, **changes)  # type: ignore[arg-type]


def _model(dialect: str) -> Mammut:
    """ "paper" or "openmammut"; weights random everywhere, norms and positions too."""
    torch.manual_seed(3)
    if dialect == "paper":
        model = Mammut(tiny(VOCABULARY))
    else:
        model = Mammut(
            openmammut_config(
                name="open", image_size=32, patch_size=16, vision=(2, 32, 2, 64), text=(2, 24, 2),
                mlp_in_crossed_blocks=True, context_length=24, vocab_size=VOCABULARY, embedding_rows=VOCABULARY,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def _detector(dialect: str = "paper", **changes: object) -> Detector:
    """With a box head that does something."""
    detector = Detector(_config(**changes), _model(dialect))
    with torch.no_grad():
        for head in (detector.regions.refine, detector.propose.centerness, detector.propose.distances):
            nn.init.normal_(head.weight, std=0.5)
    return detector.eval()


@pytest.fixture(params=["paper", "openmammut"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_config() -> Callable[..., DetectorConfig]:
    return _config


@pytest.fixture
def make_model() -> Callable[[str], Mammut]:
    return _model


@pytest.fixture
def make_detector() -> Callable[..., Detector]:
    return _detector


@pytest.fixture(scope="session")
def make_any_detector() -> Callable[..., Detector]:
    """make_detector for fixtures that live longer than a test."""
    return _detector
