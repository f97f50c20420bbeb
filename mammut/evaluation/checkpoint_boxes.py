"""A checkpoint's detector by PyTorch, between the runtime's letterbox, prompts and suppression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mammut.checkpoint import Checkpoint
from mammut.detection.coco_results import Found
from mammut.evaluation.examples import Image
from mammut.evaluation.predictor import F32
from mammut_runtime.detection.boxes import clipped
from mammut_runtime.detection.letterbox import Letterbox
from mammut_runtime.detection.nms import class_wise_nms
from mammut_runtime.errors import CheckpointError
from mammut_runtime.pictures import Picture
from mammut_runtime.preprocess import Preprocessor, PreprocessRule
from mammut_runtime.text_tower import TextTower


class CheckpointBoxes:
    """What a bundle of the checkpoint would find, by the core in float32."""

    def __init__(self, checkpoint: Checkpoint, text: TextTower, device: torch.device) -> None:
        """Raises CheckpointError for a checkpoint without a detector."""
        if checkpoint.detector is None:
            raise CheckpointError(
                f"{checkpoint.source}: has no detector, which finding boxes needs; train one with mammut-train detect"
            )
        self._detector = checkpoint.detector.to(device).eval()
        self._config, self._device, self._text = checkpoint.detector.config, device, text
        rule = checkpoint.preprocess
        self._preprocess = Preprocessor(PreprocessRule(self._config.image_size, rule.mean, rule.std))
        self._base = {_plain(name) for name in self._config.base_names}
        self._classes: dict[tuple[str, ...], F32] = {}

    @torch.inference_mode()
    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        """The `most` best boxes of each picture over all names, in its pixels."""
        pictures = [image.rgb() if isinstance(image, Picture) else image for image in images]
        letterboxes = [Letterbox.fit(each.shape[0], each.shape[1], self._config.image_size) for each in pictures]
        squares = [box.apply(each, self._config.fill) for box, each in zip(letterboxes, pictures, strict=True)]
        pixels = np.stack([self._preprocess(each) for each in squares])
        novel = np.array([_plain(name) not in self._base for name in names], np.float32)
        given = (torch.from_numpy(each).to(self._device) for each in (pixels, self._embedded(tuple(names)), novel))
        boxes, scores = (each.cpu().numpy() for each in self._detector(*given))
        lowest = np.zeros(len(names), np.float32)
        found = []
        for letterbox, own_boxes, own_scores in zip(letterboxes, boxes, scores, strict=True):
            place = clipped(letterbox.to_picture(own_boxes), letterbox.height, letterbox.width)
            kept = class_wise_nms(place, own_scores, lowest, self._config.nms_iou, most)
            found.append(Found.of_corners(place[kept.proposals], kept.scores, kept.names).best(most))
        return found

    def _embedded(self, names: tuple[str, ...]) -> F32:
        if names not in self._classes:
            self._classes = {names: self._text.classifier(names, self._config.templates).embeddings}
        return self._classes[names]


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
