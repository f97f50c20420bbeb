"""The figures of a trained detector that its model card gives, on data that was held out: `mammut-train detect-eval`.

AP50 on composed scenes (on photographs that were not trained on) for names with boxes in training, from drawings of
another vendor, and for names that had none; there against a control, the same boxes scored with the names' embeddings
in another order, which is what a detector reaches that does not know what the names mean. And on photographs with
boxes that a user names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mammut.checkpoint import Checkpoint
from mammut.demo.scenes import SCENE_NAMES, SCENE_NOVEL, backgrounds, scene_drawings
from mammut.detection.box_files import BoxCounts, BoxFile, Category, PictureBoxes
from mammut.detection.box_specs import parse_box_spec
from mammut.detection.coco_results import Found
from mammut.detection.detector import Detector, fused, refined
from mammut.detection.names import class_embeddings
from mammut.detection.proposals import best, peaks
from mammut.detection.samples import U8, BoxedSet
from mammut.detection.scene_source import held_out_scenes
from mammut.evaluation.average_precision import HALF, Precision, match
from mammut.evaluation.bootstrap import point
from mammut_runtime.detection.boxes import clipped
from mammut_runtime.detection.letterbox import Letterbox
from mammut_runtime.detection.nms import class_wise_nms
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.preprocess import PreprocessRule

AT_ONCE = 16
MOST = 100
"""Boxes of a picture and name."""
CONTROLS = 5
"""Orders of the embeddings that the control is the mean of."""


@dataclass(frozen=True)
class Vocabulary:
    """Names as the detector is asked for them."""

    classes: Tensor
    """float32[K, E], unit length."""
    novel: Tensor
    """float32[K], 1 for names without boxes in training."""


@torch.no_grad()
def find(
    detector: Detector, images: Sequence[U8], vocabularies: Mapping[str, Vocabulary], rule: PreprocessRule
) -> dict[str, list[Found]]:
    """What is found in uint8[H, W, 3] pictures with each vocabulary, in their pixels; a picture is seen once."""
    config = detector.config
    found: dict[str, list[Found]] = {name: [] for name in vocabularies}
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (rule.mean, rule.std))
    for start in range(0, len(images), AT_ONCE):
        part = images[start : start + AT_ONCE]
        places = [Letterbox.fit(image.shape[0], image.shape[1], config.image_size) for image in part]
        squares = np.stack([place.apply(image, config.fill) for place, image in zip(places, part, strict=True)])
        pixels = (torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255 - mean) / std
        features = detector.features(pixels.to(detector.places.device))
        logits, boxes = detector.proposals(features)
        centerness, boxes = best(peaks(torch.sigmoid(logits), config), boxes, config.proposals)
        pooled = detector.pool(features, boxes)
        seen = detector.encoder_embeddings(pooled)
        deltas, embeddings = detector.describe(features, boxes, pooled, seen)
        final = refined(boxes, deltas, config.image_size).cpu().numpy()
        for name, words in vocabularies.items():
            own = detector.class_logits(embeddings, words.classes)
            other = detector.encoder_logits(seen, words.classes)
            scores = fused(own, other, words.novel, centerness, config).cpu().numpy()
            for place, row, score in zip(places, final, scores, strict=True):
                inside = clipped(place.to_picture(row), place.height, place.width)
                lowest = np.full(score.shape[1], 1e-3, np.float32)
                kept = class_wise_nms(inside, score, lowest, config.nms_iou, MOST)
                found[name].append(Found.of_corners(inside[kept.proposals], kept.scores, kept.names))
    return found


def average_precision_50(boxed: BoxedSet, found: Sequence[Found], names: Sequence[str] | None = None) -> float:
    """AP50 over the names that occur (or those of `names`). found: labels are places in boxed.names."""
    precision = Precision(match(as_file(boxed), found))
    chosen = None if names is None else [place for place, name in enumerate(boxed.names) if name in names]
    return round(point(precision.average(HALF, names=chosen), len(found)), 4)


def as_file(boxed: BoxedSet) -> BoxFile:
    """A set as the matcher takes it: every name that has no box in a picture is absent from it."""
    places = {name: place for place, name in enumerate(boxed.names)}
    pictures = []
    for number, picture in enumerate(boxed.pictures):
        low, high = picture.boxes[:, :2].astype(np.float64), picture.boxes[:, 2:].astype(np.float64)
        boxes = np.concatenate([low, high - low], axis=1)
        labels = np.array([places[label] for label in picture.labels], np.int64)
        pictures.append(
            PictureBoxes(number + 1, picture.name, 1, 1, boxes, labels, boxes[:, 2:].prod(axis=1), picture.ignore)
        )
    categories = tuple(Category(place + 1, name) for name, place in places.items())
    return BoxFile(Path(boxed.name), False, categories, tuple(pictures), BoxCounts())


@dataclass(frozen=True)
class SceneJudge:
    """The scenes that detectors are judged on: fixed by the data folder and these numbers."""

    data: Path
    scenes: int = 200
    size: int = 192
    seed: int = 7

    def sets(self) -> dict[str, BoxedSet]:
        """ "seen": names with boxes in training; "vendor": such names, drawings by another vendor than the trained
        ones; "novel": names without boxes in training. Errors as scene_drawings'."""
        photographs = backgrounds(self.data, "val", self.size)
        trained, other = scene_drawings(self.data), scene_drawings(self.data, held_out=True)
        kinds = {
            "seen": [drawing for drawing in trained if drawing.name not in SCENE_NOVEL],
            "vendor": [drawing for drawing in other if drawing.name not in SCENE_NOVEL],
            "novel": [drawing for drawing in (*trained, *other) if drawing.name in SCENE_NOVEL],
        }
        return {
            kind: held_out_scenes(drawings, photographs, self.size, self.scenes, self.seed + number)
            for number, (kind, drawings) in enumerate(kinds.items())
        }

    def figures(self, checkpoint: Checkpoint, sets: Mapping[str, BoxedSet] | None = None) -> dict[str, float]:
        """AP50 of each set: names among all that were trained, novel names among themselves and among all names, and
        their control."""
        detector = _detector(checkpoint)
        sets = self.sets() if sets is None else sets
        every = sorted(SCENE_NAMES)
        base, novel = sorted(SCENE_NAMES - SCENE_NOVEL), sorted(SCENE_NOVEL)
        classes = class_embeddings(checkpoint.model, checkpoint.tokenizer, every, detector.config.templates)
        new = torch.tensor([float(name not in detector.config.base_names) for name in every], device=classes.device)

        def words(names: Sequence[str]) -> Vocabulary:
            rows = [every.index(name) for name in names]
            return Vocabulary(classes[rows], new[rows])

        found = {}
        for kind in ("seen", "vendor"):
            found[f"{kind}_ap50"] = self._of(detector, checkpoint, sets[kind], base, {"": words(base)})[""]
        asked = {"": words(novel)}
        for number in range(CONTROLS):
            order = other_order(len(novel), self.seed + number)
            asked[f"control {number}"] = Vocabulary(words(novel).classes[order], words(novel).novel)
        each = self._of(detector, checkpoint, sets["novel"], novel, asked)
        found["novel_ap50"] = each[""]
        controls = [value for name, value in each.items() if name]
        found["novel_control_ap50"] = round(float(np.mean(controls)), 4)
        found["novel_control_best_ap50"] = max(controls)
        among = self._of(detector, checkpoint, sets["novel"], every, {"": words(every)}, novel)[""]
        found["novel_among_all_ap50"] = among
        return found

    def _of(
        self, detector: Detector, checkpoint: Checkpoint, boxed: BoxedSet, names: Sequence[str],
        asked: Mapping[str, Vocabulary], judged: Sequence[str] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        named = BoxedSet(boxed.name, tuple(names), boxed.pictures)
        images = [picture.rgb() for picture in boxed.pictures]
        found = find(detector, images, asked, checkpoint.preprocess)
        return {name: average_precision_50(named, each, judged) for name, each in found.items()}


def other_order(count: int, seed: int) -> list[int]:
    """An order in which nothing keeps its place. InputError for fewer than two."""
    if count < 2:
        raise InputError(f"a control needs at least two names, got {count}")
    order = np.random.default_rng(seed).permutation(count)
    followed: list[int] = [0] * count
    for one, other in zip(order, np.roll(order, 1), strict=True):
        followed[int(one)] = int(other)
    return followed


def box_figures(checkpoint: Checkpoint, spec: str) -> dict[str, float]:
    """AP50 of a user's boxes, coco:FILE:IMAGES or lvis:FILE:IMAGES: mean over names, and of each name where there are
    at most 20. InputError for a file that cannot be read."""
    detector = _detector(checkpoint)
    parsed = parse_box_spec(spec)
    file = parsed.read()
    boxed = file.boxed_set(parsed.images or parsed.file.parent)
    classes = class_embeddings(checkpoint.model, checkpoint.tokenizer, boxed.names, detector.config.templates)
    new = torch.tensor([float(name not in detector.config.base_names) for name in boxed.names], device=classes.device)
    found: list[Found] = []
    for start in range(0, len(boxed.pictures), AT_ONCE):  # a user's set need not fit into memory
        images = [picture.rgb() for picture in boxed.pictures[start : start + AT_ONCE]]
        found += find(detector, images, {"": Vocabulary(classes, new)}, checkpoint.preprocess)[""]
    precision = Precision(match(file, found))
    figures = {"ap50": round(point(precision.average(HALF), len(found)), 4)}
    for place in precision.names_with_things() if len(boxed.names) <= 20 else []:
        figures[boxed.names[place]] = round(point(precision.average(HALF, names=[place]), len(found)), 4)
    return figures


def _detector(checkpoint: Checkpoint) -> Detector:
    if checkpoint.detector is None:
        raise CheckpointError(f"{checkpoint.source}: has no detector; train one with mammut-train detect")
    return checkpoint.detector
