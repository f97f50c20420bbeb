"""Chooses the bundle's canary: inputs whose outputs every device can reproduce, whatever its rounding.

Embeddings are compared with a tolerance, but a caption is compared token by token. So the picture is one whose greedy
caption is never a close call: of a few seeds the one where the narrowest lead of the best token is the widest.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mammut.checkpoint import Checkpoint
from mammut.detection.detector import Detector
from mammut.model import Mammut
from mammut_export.measure import open_here
from mammut_export.samples import TEXTS
from mammut_export.weights import half_rounded
from mammut_runtime.bundle import Bundle
from mammut_runtime.canary import (
    box_distance,
    canary_classes,
    canary_picture,
    moving_crops,
    proposed,
)
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.detection.letterbox import Letterbox
from mammut_runtime.engines import Engine
from mammut_runtime.manifest import Canary, CanaryBox, TextRule
from mammut_runtime.model import Model
from mammut_runtime.preprocess import Preprocessor, PreprocessRule

Module = TypeVar("Module", bound=nn.Module)
SEEDS = 8
COMFORTABLE_LEAD = 2e-3
"""Of the largest logit; 40 times the tolerance of fp32. A seed that leads by this much throughout is taken at once."""
TOLERANCE = {"fp32": 2e-4, "fp16": 2e-3, "mixed": 2e-3}
"""Precision → largest difference of a component of a unit vector. Wide enough for a device that computes with other
instructions (fp16: in float16 throughout), far below what a wrong picture path or a broken operator does."""
QUANTIZED_TOLERANCE = 2e-2
"""The same for a quantized bundle. Rounding to 8 bits happens at other places in other engines and processors."""
PICTURE_HW = (192, 256)
BOXES, STEADY = 4, 2e-2
"""See steady_boxes; the latter is a part of the input's side, and a difference of scores."""


@dataclass(frozen=True)
class _Greedy:
    ids: tuple[int, ...]
    lead: float
    """The narrowest lead of a chosen token's logit over the next best one, as a part of the largest logit."""


def make_canary(checkpoint: Checkpoint, graphs: tuple[str, ...], rule: TextRule, precision: str) -> Canary:
    """The canary, computed by PyTorch with the weights that the bundle stores."""
    model = _as_stored(checkpoint.model, precision)
    preprocess = Preprocessor(checkpoint.preprocess)
    prompt = [rule.start_id, *checkpoint.tokenizer.encode(rule.prompts.get("caption", ""))]
    best, lead = 0, -1.0
    caption: tuple[int, ...] = ()
    embedding: tuple[float, ...] = ()
    with torch.no_grad():
        for seed in range(SEEDS if "decoder" in graphs else 1):
            pixels = torch.from_numpy(preprocess(canary_picture(seed, PICTURE_HW)))[None]
            tokens, vector = model.encode_image(pixels)
            found = _greedy(model, tokens, prompt, rule) if "decoder" in graphs else _Greedy((), 0.0)
            if found.lead > lead:
                best, lead, caption, embedding = seed, found.lead, found.ids, _floats(vector[0])
            if lead >= COMFORTABLE_LEAD:
                break
        ids = _canary_ids(checkpoint, rule) if "text" in graphs else []
        text_embedding = _floats(model.encode_text(torch.tensor([ids]))[0]) if ids else ()
        clip_embedding = _clip_embedding(model, preprocess, best) if "video" in graphs else ()
    tolerance = TOLERANCE[precision]
    canary = Canary(best, tuple(ids), embedding, text_embedding, caption, tolerance, PICTURE_HW, clip_embedding)
    if checkpoint.detector is None or "detector" not in graphs:
        return canary
    return dataclasses.replace(canary, boxes=_boxes(checkpoint, _as_stored(checkpoint.detector, precision), canary))


def _boxes(checkpoint: Checkpoint, detector: Detector, canary: Canary) -> tuple[CanaryBox, ...]:
    config, classes = detector.config, canary_classes(canary, checkpoint.model.config.embed_dim)
    preprocess = Preprocessor(PreprocessRule(config.image_size, checkpoint.preprocess.mean, checkpoint.preprocess.std))
    names = torch.from_numpy(classes), torch.zeros(len(classes))

    def answer(square: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            boxes, scores = detector(torch.from_numpy(preprocess(square))[None], *names)
        return proposed(boxes[0].numpy(), scores[0].numpy(), config.image_size)

    letterbox = Letterbox.fit(*canary.picture_hw, config.image_size)
    return steady_boxes(answer, letterbox.apply(canary_picture(canary.seed, canary.picture_hw), config.fill))


def steady_boxes(
    answer: Callable[[NDArray[np.uint8]], NDArray[np.float32]], square: NDArray[np.uint8]
) -> tuple[CanaryBox, ...]:
    """The best proposals that are still there where every pixel is changed by up to one level, at most BOXES.

    answer: a square picture uint8[D, D, 3] to CanaryAnswers.boxes. Of two places side by side that are about equally
    good only the better one is proposed, and on another device that may be the other one; such are left out.
    """
    rng, found = np.random.default_rng(0), answer(square)
    kept: list[CanaryBox] = []
    changed = [(square.astype(np.int16) + rng.integers(-1, 2, square.shape)).clip(0, 255) for _ in range(2)]
    others = [answer(each.astype(np.uint8)) for each in changed]
    for row in found[np.argsort(-found[:, 4], kind="stable")].clip(0, 1).tolist():
        each = CanaryBox((row[0], row[1], row[2], row[3]), row[4])
        if len(kept) < BOXES and max(box_distance(each, other) for other in others) <= STEADY:
            kept.append(each)
    return tuple(kept)


def _clip_embedding(model: Mammut, preprocess: Preprocessor, seed: int) -> tuple[float, ...]:
    frames = moving_crops(canary_picture(seed, PICTURE_HW), model.config.video.frames if model.config.video else 0)
    clip = torch.from_numpy(np.stack([preprocess(frame) for frame in frames]))
    return _floats(model.encode_video(clip[None])[1][0])


def observed_canary(bundle: Bundle, reference: Canary) -> Canary:
    """The canary of a quantized bundle, computed by the bundle itself on this machine.

    reference: the canary of the same checkpoint in float32, for all that quantizing does not change.
    """
    logits: list[NDArray[np.float32]] = []

    def open_graph(name: str) -> Engine:
        engine = open_here(bundle, name)
        return _Listening(engine, logits) if name == "decoder" else engine

    with Model(bundle, open_graph=open_graph) as model:
        leads = {reference.seed: 0.0}
        if "decoder" in bundle.manifest.graphs:
            for seed in range(SEEDS):
                logits.clear()
                model.encode(canary_picture(seed, PICTURE_HW)).caption(CaptionOptions(beams=1))
                leads[seed] = _lead(logits)
        seed = max(leads, key=lambda each: leads[each])
        canary = dataclasses.replace(reference, seed=seed, tolerance=QUANTIZED_TOLERANCE)
        answers = model.canary_answers(canary)
        found: dict[str, Any] = {
            name: () if vector is None else tuple(map(float, vector)) for name, vector in answers.embeddings.items()
        }
        canary = dataclasses.replace(canary, **found, caption_ids=answers.caption_ids or (), boxes=())
        return dataclasses.replace(canary, boxes=_observed_boxes(model, canary)) if model.detects else canary


def _observed_boxes(model: Model, canary: Canary) -> tuple[CanaryBox, ...]:
    detector, classes = model.detector, canary_classes(canary, model.manifest.model.embed_dim)
    given = detector.square(canary_picture(canary.seed, canary.picture_hw), "rgb")

    def answer(square: NDArray[np.uint8]) -> NDArray[np.float32]:
        changed = dataclasses.replace(given, pixels=square)
        boxes, scores = detector.run([changed], classes, np.zeros(len(classes), np.float32))
        return proposed(boxes[0], scores[0], detector.rule.size)

    return steady_boxes(answer, given.pixels)


class _Listening:
    """The decoder's engine, with an ear for its logits."""

    def __init__(self, engine: Engine, logits: list[NDArray[np.float32]]) -> None:
        self._engine, self._logits = engine, logits

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self._engine.run(feeds)
        self._logits.append(outputs["logits"][0, 0])
        return outputs

    def close(self) -> None:
        self._engine.close()


def _lead(steps: Sequence[NDArray[np.float32]]) -> float:
    """The narrowest lead of the best token over the steps of a caption, as in _Greedy."""
    pairs = [np.partition(logits, -2)[-2:] for logits in steps]
    largest = max(float(np.abs(logits).max()) for logits in steps)
    return min(float(first - second) for second, first in pairs) / max(largest, 1e-30)


def _canary_ids(checkpoint: Checkpoint, rule: TextRule) -> list[int]:
    """A text's row as the text graph takes it: filled to its length where the model counts the pads."""
    row: list[int] = checkpoint.tokenizer.tokenize([TEXTS[0]], rule.text_length or rule.context_length)[0].tolist()
    return row if rule.text_length is not None else row[: row.index(rule.end_id) + 1]


def _greedy(model: Mammut, tokens: Tensor, prompt: list[int], rule: TextRule) -> _Greedy:
    memory, past, new = model.memory(tokens), model.empty_past(1), prompt
    chosen: list[int] = []
    lead, largest = float("inf"), 1e-30
    while len(chosen) < rule.max_tokens and len(prompt) + len(chosen) < rule.context_length:
        logits, past = model.decode_step(torch.tensor([[new]]), past, memory)
        (first, second), (token, _) = (each.tolist() for each in logits[0, 0].topk(2))
        lead, largest = min(lead, first - second), max(largest, float(logits.abs().max()))
        if token == rule.end_id:
            break
        chosen.append(token)
        new = [token]
    return _Greedy(tuple(chosen), lead / largest)


def _as_stored(model: Module, precision: str) -> Module:
    """The model with the values that the bundle holds; a copy only where they differ."""
    if precision != "fp16":
        return model
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(torch.from_numpy(half_rounded(parameter.numpy())))
    return rounded


def _floats(vector: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in vector)
