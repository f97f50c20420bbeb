"""How well the demo answers questions about composed scenes that it has not seen. Synthetic pictures, exact truth.

Backgrounds are held-out photographs. The drawings are those of training, or one vendor's drawings that were held out
(of things that the other vendor's drawing was trained on).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mammut.checkpoint import Checkpoint
from mammut.data.scenes import QUESTION_KINDS, Drawing, Scene, compose, plural, relation_captions
from mammut.demo.evaluate import CHUNK, Judge
from mammut.demo.scenes import backgrounds, scene_drawings
from mammut.evaluation.bootstrap import Bootstrap, mean_of
from mammut_runtime.preprocess import Preprocessor

SCENES = 400


def evaluate_scenes(checkpoint: Checkpoint, data: Path, scenes: int = SCENES, seed: int = 0) -> dict[str, Any]:
    """Figures for both sets of drawings, as shares from 0 to 1. Errors as scene_drawings'."""
    judge, size = Judge(checkpoint), checkpoint.model.config.vision.image_size
    photos = backgrounds(data, "val", size * 3 // 2)
    return {
        name: _figures(judge, held_out_scenes(drawings, photos, size, scenes, seed), drawings)
        for name, drawings in (
            ("drawings_of_training", scene_drawings(data)),
            ("drawings_held_out", scene_drawings(data, held_out=True)),
        )
    }


def held_out_scenes(
    drawings: Sequence[Drawing], photos: Sequence[Any], size: int, number: int, seed: int
) -> list[Scene]:
    """The same scenes each time, on photographs uint8[H, W, 3] in turn."""
    seeds = np.random.SeedSequence(seed).spawn(number)
    return [compose(np.random.default_rng(s), drawings, photos[i % len(photos)], size) for i, s in enumerate(seeds)]


def _figures(judge: Judge, scenes: Sequence[Scene], drawings: Sequence[Drawing]) -> dict[str, Any]:
    preprocess = Preprocessor(judge.checkpoint.preprocess)
    pixels = torch.from_numpy(np.stack([preprocess(scene.pixels) for scene in scenes]))
    with torch.no_grad():
        tokens = torch.cat([judge.model.encode_image(part)[0] for part in torch.split(pixels, CHUNK)])
    asked = [(row, *question) for row, scene in enumerate(scenes) for question in scene.questions]
    answers = judge.ask(tokens[[row for row, *_ in asked]], [question for _, _, question, _ in asked])
    captions = judge.write(tokens, [""] * len(scenes))
    exact = [c in _right_captions(judge, s) for c, s in zip(captions, scenes, strict=True)]
    named = [_names(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    names = {drawing.name for drawing in drawings}
    kinds = {}
    for kind in QUESTION_KINDS:
        rows = [
            (row, given == judge.spell(answer), _form(question, names), answer)
            for (row, k, question, answer), given in zip(asked, answers, strict=True)
            if k == kind
        ]
        if rows:
            right = share_with_interval([right for _, right, _, _ in rows], [row for row, *_ in rows])
            kinds[kind] = {**right, "most_frequent_answer": _most_frequent([(form, a) for *_, form, a in rows])}
    return {
        "scenes": len(scenes),
        "drawings": len(drawings),
        "caption_exact": share_with_interval(exact),
        "things_named_in_caption": round(sum(named) / len(named), 4),
        "questions": kinds,
    }


def _right_captions(judge: Judge, scene: Scene) -> set[str]:
    """Either of two things may come first."""
    both: tuple[str, ...] = ()
    if len(scene.placed) == 2 and len({placed.name for placed in scene.placed}) == 2:
        both = relation_captions((scene.placed[0], scene.placed[1]), len(scene.pixels))
    return {judge.spell(text) for text in (*scene.captions, *both)}


def _form(question: str, names: Collection[str]) -> str:
    """The question without names of things, be they there or not."""
    known = sorted({*names, *map(plural, names)}, key=len, reverse=True)
    return re.sub(rf"\b(an? )?({'|'.join(map(re.escape, known))})\b", "X", question)


def _most_frequent(rows: Sequence[tuple[str, str]]) -> float:
    """What who always gives a form's most frequent answer gets right. rows: (form, answer)."""
    forms: dict[str, Counter[str]] = {}
    for form, answer in rows:
        forms.setdefault(form, Counter())[answer] += 1
    return round(sum(max(counts.values()) for counts in forms.values()) / len(rows), 4)


def _names(caption: str, scene: Scene) -> float:
    """The share of the things in a scene that a caption names."""
    names = {placed.name for placed in scene.placed}
    said = (rf"\b({re.escape(name)}|{re.escape(plural(name))})\b" for name in names)
    return sum(re.search(each, caption) is not None for each in said) / len(names)


def share_with_interval(right: Sequence[bool], groups: Sequence[int] | None = None) -> dict[str, float]:
    """The share that is right, its 95 % interval (items of one group are drawn together), and of how many."""
    values = np.array(right, np.float64)
    inverse = None if groups is None else np.unique(groups, return_inverse=True)[1]

    interval = Bootstrap().interval(mean_of(values), len(values), inverse)
    return {
        "share": round(float(values.mean()), 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "of": len(values),
    }
