"""The forward of the detector, its scores, its config, and its place in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint, save_checkpoint
from mammut.detection.config import DetectorConfig, detector_for
from mammut.detection.detector import Detector, fused, refined
from mammut.detection.names import class_embeddings
from mammut.detection.proposals import best, decode, peaks, place_centers, place_sides
from mammut.model import Mammut
from mammut.presets import demo, openmammut, paper_base, tiny
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

Config = Callable[..., DetectorConfig]
Made = Callable[..., Detector]
RULE = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)


def names(count: int, width: int = 24) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(count)), dim=-1)


@torch.no_grad()
def test_boxes_and_scores(dialect: str, make_detector: Made) -> None:
    detector = make_detector(dialect)
    for count in (1, 3, 40):
        boxes, scores = detector(torch.randn(2, 3, 64, 64), names(count), torch.zeros(count))
        assert boxes.shape == (2, 12, 4)
        assert scores.shape == (2, 12, count)
        assert bool((boxes >= 0).all() and (boxes <= 64).all() and (boxes[..., 2:] >= boxes[..., :2]).all())
        assert bool((scores >= 0).all() and (scores.sum(dim=-1) <= 1 + 1e-5).all())


@torch.no_grad()
def test_boxes_do_not_depend_on_names(make_detector: Made) -> None:
    detector = make_detector("paper")
    pixels = torch.randn(1, 3, 64, 64)
    one, other = (detector(pixels, names(count), torch.zeros(count))[0] for count in (2, 7))
    torch.testing.assert_close(one, other)


@torch.no_grad()
def test_pictures_of_a_batch_are_apart(make_detector: Made) -> None:
    detector = make_detector("paper", window=2, global_layers=(1,))
    pixels = torch.randn(3, 3, 64, 64)
    boxes, scores = detector(pixels, names(4), torch.zeros(4))
    for row in range(3):
        own_boxes, own_scores = detector(pixels[row : row + 1], names(4), torch.zeros(4))
        torch.testing.assert_close(own_boxes[0], boxes[row], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(own_scores[0], scores[row], atol=1e-5, rtol=1e-3)


def slow_scores(p: np.ndarray, z: np.ndarray, w: np.ndarray, centerness: float, power: float) -> np.ndarray:
    """As the formula is written: p and z are probabilities, p with the background first."""
    joined = p[1:] ** (1 - w) * z**w
    found: np.ndarray = joined / (joined.sum() + p[0]) * centerness**power
    return found


def test_fusion_is_the_formula(make_config: Config) -> None:
    config = make_config(base_weight=0.35, novel_weight=0.65, objectness_power=3.0)
    rng = np.random.default_rng(0)
    logits, seen, novel = rng.normal(size=6) * 3, rng.normal(size=5) * 3, np.array([0, 1, 0, 1, 1.0])
    p, z = np.exp(logits) / np.exp(logits).sum(), np.exp(seen) / np.exp(seen).sum()
    wanted = slow_scores(p, z, np.where(novel > 0, 0.65, 0.35), 0.8, 3.0)
    tensors = [torch.from_numpy(each)[None, None] for each in (logits, seen)]
    found = fused(tensors[0], tensors[1], torch.from_numpy(novel), torch.tensor([[0.8]]).double(), config)
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, rtol=1e-6)
    swapped = slow_scores(p, z, np.where(novel > 0, 0.35, 0.65), 0.8, 3.0)  # the control
    assert np.abs(swapped - wanted).max() > 1e-3


def test_places_and_decoding(make_config: Config) -> None:
    config = make_config()
    centers, sides = place_centers(config), place_sides(config)
    assert config.places == len(centers) == len(sides) == 64 + 16 + 4
    assert centers[1].tolist() == [12.0, 4.0]
    assert centers[64].tolist() == [8.0, 8.0]
    boxes = decode(torch.zeros(1, config.places, 4), centers, sides, 64)
    assert boxes[0, 9].tolist() == [4.0, 4.0, 20.0, 20.0]  # the anchor of stride 8 around (12, 12)
    assert boxes[0, 0].tolist() == [0.0, 0.0, 12.0, 12.0]  # cut at the edge


def test_peaks_keep_one_of_neighbours(make_config: Config) -> None:
    config = make_config()
    centerness = torch.rand(2, config.places, generator=torch.Generator().manual_seed(0)) * 0.5
    centerness[0, 27] = 0.9
    kept = peaks(centerness, config)
    grid, level = kept[0, :64].reshape(8, 8), centerness[0, :64].reshape(8, 8)
    for y in range(8):
        for x in range(8):
            around = level[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            assert float(grid[y, x]) == pytest.approx(
                float(level[y, x]) * (1.0 if level[y, x] == around.max() else 0.1)
            )
    values, boxes = best(kept, torch.arange(config.places).float()[None, :, None].expand(2, -1, 4), 3)
    assert values.shape == (2, 3)
    assert float(boxes[0, 0, 0]) == 27


def test_refinement() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert refined(boxes, torch.zeros(1, 4), 64).tolist() == boxes.tolist()
    moved = refined(boxes, torch.tensor([[5.0, -5.0, 5 * np.log(2), 0.0]]), 64)[0]
    np.testing.assert_allclose(moved.numpy(), [10.0, 0.0, 50.0, 40.0], atol=1e-4)


def test_presets_fit_their_models() -> None:
    """The demo's head must keep the shipped file within 20 MB; the large ones take ViTDet's windows."""
    with torch.device("meta"):
        detector = Detector(detector_for(demo(), ("{}",)), Mammut(demo()))
        assert sum(value.numel() for value in detector.own_parameters().values()) <= 2_600_000
        for config in (paper_base(), openmammut("B-32"), openmammut("L-14")):
            found = detector_for(config, ("a photo of a {}.",))
            Detector(found, Mammut(config))
            assert abs(found.image_size - 1024) <= 16
            assert 4 * found.window * config.vision.patch_size == found.image_size
            assert len(found.global_layers) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 72}, "whole number of patches"),
        ({"strides": (8, 24)}, "powers of two"),
        ({"strides": (16, 8)}, "must ascend"),
        ({"image_size": 48}, "coarsest stride 32"),
        ({"window": 3}, "does not divide the grid of 4"),
        ({"taps": (0, 2)}, "ascending blocks below 2"),
        ({"taps": ()}, "at least one"),
        ({"global_layers": (5,)}, "blocks below 2"),
        ({"proposals": 500}, "more than the 84 places"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], words: str, make_detector: Made) -> None:
    with pytest.raises(CheckpointError, match=words):
        make_detector("paper", **changes)


# --- names ----------------------------------------------------------------------------------------------------


def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(train_tokenizer(["a red thing", "a picture of a thing"] * 3, 600))


def test_templates_are_averaged() -> None:
    torch.manual_seed(0)
    model, words = Mammut(tiny(600)).eval(), tokenizer()
    forms = ("{}", "a picture of {}")
    found = class_embeddings(model, words, ["red", "thing"], forms)
    for row, name in enumerate(("red", "thing")):
        each = [
            model.encode_text(torch.from_numpy(words.tokenize([form.replace("{}", name)], 24)))[0] for form in forms
        ]
        torch.testing.assert_close(found[row], F.normalize(torch.stack(each).mean(dim=0), dim=-1))
    assert not torch.allclose(found, class_embeddings(model, words, ["red", "thing"]))


@pytest.mark.parametrize(
    ("given", "templates", "words"),
    [
        ([], ("{}",), "at least one name"),
        (["a", " "], ("{}",), "name is empty"),
        (["a"], ("thing",), "expected {} once"),
    ],
)
def test_bad_names(given: list[str], templates: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        class_embeddings(Mammut(tiny(600)), tokenizer(), given, templates)


# --- checkpoints ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, make_detector: Made) -> None:
    detector = make_detector("paper", base_names=("red thing",))
    save_checkpoint(tmp_path / "one", detector.model, train_tokenizer(["a b"], 600), RULE, {"zero_shot": "{}"},
                    detector=detector)  # fmt: skip
    loaded = load_checkpoint(tmp_path / "one")
    assert loaded.detector is not None
    assert loaded.detector.config == detector.config
    assert loaded.detector.model is loaded.model
    assert not any(value.requires_grad for value in loaded.detector.parameters())
    pixels, classes = torch.randn(1, 3, 64, 64), names(3)
    for one, other in zip(detector(pixels, classes, torch.zeros(3)), loaded.detector(pixels, classes, torch.zeros(3)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)
    # Another picture size of the model does not change what the detector sees.
    other_size = load_checkpoint(tmp_path / "one", image_size=48)
    assert other_size.detector is not None
    torch.testing.assert_close(other_size.detector.positions, loaded.detector.positions)


def test_without_a_detector_nothing_changes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one", Mammut(tiny(600)), train_tokenizer(["a b"], 600), RULE, {"zero_shot": "{}"})
    assert "detector" not in json.loads((tmp_path / "one" / "config.json").read_text())
    assert load_checkpoint(tmp_path / "one").detector is None


def test_weights_that_do_not_fit_are_named(tmp_path: Path, make_detector: Made) -> None:
    detector = make_detector("paper")
    save_checkpoint(tmp_path / "one", detector.model, train_tokenizer(["a b"], 600), RULE, {"zero_shot": "{}"},
                    detector=detector)  # fmt: skip
    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text())
    config["detector"]["width"] = 24
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"detector\..*expected"):
        load_checkpoint(tmp_path / "one")
    config["detector"]["widht"] = config["detector"].pop("width")
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"detector.*widht"):
        load_checkpoint(tmp_path / "one")


def test_config_is_read_as_it_was_written(make_config: Config) -> None:
    config = make_config(base_names=("a", "b"))
    assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(CheckpointError, match="proposals"):
        DetectorConfig.from_dict(config.to_dict() | {"proposals": 0})
    assert dataclasses.replace(config, base_names=()) != config
