"""A model as the five things that tasks need of it, whether it is a bundle or a checkpoint.

Both go through the runtime's preprocessing, tokenizer, text tower and generation; they differ in who computes the
graphs. That is what makes a bundle's figures comparable with its checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mammut.detection.coco_results import Found
from mammut.evaluation.corruptions import corrupted
from mammut.evaluation.examples import Image
from mammut_runtime.bundle import Manifest
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.detection.boxes import Detections
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import BundleError, EngineError, InputError
from mammut_runtime.model import Model, Seen
from mammut_runtime.pictures import Picture

F32 = NDArray[np.float32]
Need = Literal["pictures", "texts", "words", "boxes"]
"""What a task asks of a model: embeddings of pictures, embeddings of texts, captions and answers, boxes of names."""
GRAPHS: dict[Need, tuple[str, ...]] = {
    "pictures": ("vision",), "texts": ("text",), "words": ("memory", "decoder"), "boxes": ("detector", "text"),
}  # fmt: skip
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PredictorOptions:
    """How a model computes."""

    batch_size: int = 32
    """Pictures at once."""
    threads: int = 0
    """0: as many as there are cores."""
    beams: int = 1
    """1: the most probable token each time."""
    max_tokens: int = 30
    """Of a caption or answer, the end counted; a bundle that was made for fewer writes fewer."""
    device: str = "cpu"
    """Of a checkpoint, as PyTorch names it."""

    def caption(self, prompt: str | None = None) -> CaptionOptions:
        return CaptionOptions(max_tokens=self.max_tokens, beams=self.beams, prompt=prompt)


class Predictor(Protocol):
    """What tasks need of a model."""

    @property
    def name(self) -> str:
        """What stands in tables, such as "demo (checkpoint)"."""
        ...

    @property
    def templates(self) -> tuple[str, ...]:
        """The model's own prompt templates for names of classes, each with one {}."""
        ...

    @property
    def facts(self) -> dict[str, str]:
        """What identifies the model, for the report."""
        ...

    @property
    def frames(self) -> int:
        """Of a clip, which it takes in the place of a picture as uint8[frames, H, W, 3]; 0: it sees pictures only."""
        ...

    def embed_pictures(self, images: Sequence[Image]) -> F32:
        """float32[N, E], unit length."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> F32:
        """float32[N, E], unit length, comparable with the pictures'."""
        ...

    def caption(self, images: Sequence[Image]) -> list[str]:
        """A description of each picture."""
        ...

    def answer(self, images: Sequence[Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """For each picture the free answers to its questions."""
        ...

    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        """The `most` best boxes of each picture over all names, in its pixels, whatever their scores."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def open_predictor(spec: str, needs: Sequence[Need], options: PredictorOptions | None = None) -> Predictor:
    """A bundle's folder, or a checkpoint in any form that load_checkpoint takes.

    Raises BundleError where the bundle lacks a graph that is needed, EngineError where PyTorch is missing for a
    checkpoint, and what loading raises.
    """
    options = options or PredictorOptions()
    if (Path(spec) / MANIFEST).exists():
        return BundlePredictor(spec, needs, options)
    try:
        from mammut.evaluation.checkpoint_predictor import CheckpointPredictor  # needs PyTorch; a bundle does not
    except ImportError as problem:
        raise EngineError(
            f"{spec}: is no bundle (no {MANIFEST}), and {problem.name} is not there to read it as a checkpoint; "
            f"pip install mammut-edge[train]"
        ) from problem
    return CheckpointPredictor(spec, options)


class BundlePredictor:
    """A bundle, by the runtime."""

    def __init__(self, spec: str, needs: Sequence[Need], options: PredictorOptions) -> None:
        self._model = Model.load(spec, EngineOptions(threads=options.threads))
        self._spec, self._options = spec, options
        manifest = self._model.manifest
        missing = [graph for need in needs for graph in GRAPHS[need] if graph not in manifest.graphs]
        if missing:
            raise BundleError(
                f"{spec}: has no {' and no '.join(missing)} graph, which this task needs; it has "
                f"{', '.join(manifest.graphs)}; export it with the tasks you evaluate"
            )

    @property
    def name(self) -> str:
        manifest = self._model.manifest
        return f"{Path(self._spec).resolve().name} ({manifest.target} {precision_of(manifest)})"

    @property
    def templates(self) -> tuple[str, ...]:
        return self._model.templates

    @property
    def facts(self) -> dict[str, str]:
        manifest = self._model.manifest
        return {
            "kind": "bundle", "spec": self._spec, "model": manifest.model.name, "target": manifest.target,
            "precision": precision_of(manifest), "content": self._model.bundle.content_hash,
        }  # fmt: skip

    @property
    def frames(self) -> int:
        return self._model.manifest.model.video_frames if self._model.watches else 0

    def embed_pictures(self, images: Sequence[Image]) -> F32:
        return np.stack([seen.embedding for seen in self._see(images)])

    def embed_texts(self, texts: Sequence[str]) -> F32:
        return self._model.embed_texts(texts)

    def caption(self, images: Sequence[Image]) -> list[str]:
        seen = self._see(images)
        return [each.text for each in self._model.caption_batch(seen, self._options.caption(), self._batch)]

    def answer(self, images: Sequence[Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        seen = self._see(images)

        def write(rows: list[int], prompt: str) -> list[str]:
            options = self._options.caption(prompt)
            return [each.text for each in self._model.caption_batch([seen[row] for row in rows], options, self._batch)]

        return answers(write, questions, self._model.manifest.text.prompts.get("ask", "{question}"))

    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        found = self._model.detect_batch(images, names, threshold=0, max_per_class=most, batch_size=self._batch)
        return [found_of(each, names, most) for each in found]

    def close(self) -> None:
        self._model.close()

    def _see(self, images: Sequence[Image]) -> list[Seen]:
        pictures = [image for image in images if not is_clip(image)]
        seen = iter(self._model.encode_batch(pictures, batch_size=self._batch) if pictures else [])
        return [self._model.encode_frames(list(image)) if is_clip(image) else next(seen) for image in images]

    @property
    def _batch(self) -> int:
        return self._options.batch_size


def found_of(detections: Detections, names: Sequence[str], most: int) -> Found:
    """The runtime's detections as they are judged."""
    place = {name: index for index, name in enumerate(names)}
    best = detections.detections[:most]
    boxes = np.array([each.box.xyxy for each in best], np.float64).reshape(-1, 4)
    scores, labels = [each.score for each in best], [place[each.name] for each in best]
    return Found.of_corners(boxes, np.array(scores, np.float64), np.array(labels, np.int64))


def is_clip(image: Image) -> TypeGuard[NDArray[np.uint8]]:
    """Whether these are the frames of a clip."""
    return isinstance(image, np.ndarray) and image.ndim == 4


def precision_of(manifest: Manifest) -> str:
    """The bundle's precision in a word or a few."""
    return str(manifest.precision)


def answers(
    write: Callable[[list[int], str], list[str]], questions: Sequence[Sequence[str]], form: str
) -> list[list[str]]:
    """The answers to each picture's questions. Equal questions of a batch are asked of their pictures at once.

    write: pictures by number, and one prompt for them, to texts. form: the prompt, with {question}.
    """
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for row, asked in enumerate(questions):
        for place, question in enumerate(asked):
            rows_of.setdefault(question, []).append((row, place))
    found = [[""] * len(asked) for asked in questions]
    for question, places in rows_of.items():
        try:
            texts = write([row for row, _ in places], form.replace("{question}", question))
        except InputError as problem:
            raise InputError(f"question {question[:60]!r}: {problem}") from problem
        for (row, place), text in zip(places, texts, strict=True):
            found[row][place] = text
    return found


class CorruptedPredictor:
    """Another predictor that sees its pictures corrupted. Texts are embedded once and remembered."""

    def __init__(self, inner: Predictor, kind: str, severity: int, texts: dict[str, F32]) -> None:
        """texts: remembered embeddings, shared between the corruptions of one model."""
        self.inner, self._kind, self._severity, self._texts = inner, kind, severity, texts

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def templates(self) -> tuple[str, ...]:
        return self.inner.templates

    @property
    def facts(self) -> dict[str, str]:
        return {**self.inner.facts, "corruption": self._kind, "severity": str(self._severity)}

    @property
    def frames(self) -> int:
        return self.inner.frames

    def embed_pictures(self, images: Sequence[Image]) -> F32:
        return self.inner.embed_pictures(self._corrupted(images))

    def embed_texts(self, texts: Sequence[str]) -> F32:
        key = json.dumps(list(texts))
        if key not in self._texts:
            self._texts[key] = self.inner.embed_texts(texts)
        return self._texts[key]

    def caption(self, images: Sequence[Image]) -> list[str]:
        return self.inner.caption(self._corrupted(images))

    def answer(self, images: Sequence[Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        return self.inner.answer(self._corrupted(images), questions)

    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        worse = self._corrupted(images)  # which may also be smaller: boxes are of the picture as it was
        found = self.inner.detect(worse, names, most)
        return [_enlarged(each, _size(image), _size(small))
                for each, image, small in zip(found, images, worse, strict=True)]  # fmt: skip

    def close(self) -> None:
        """The inner one is closed by who opened it."""

    def _corrupted(self, images: Sequence[Image]) -> list[Image]:
        pixels = [image.rgb() if isinstance(image, Picture) else image for image in images]
        return [self._clip(each) if is_clip(each) else corrupted(each, self._kind, self._severity) for each in pixels]

    def _clip(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.stack([corrupted(each, self._kind, self._severity) for each in frames])


def _size(image: Image) -> tuple[int, int]:
    """Width and height."""
    pixels = image.pixels if isinstance(image, Picture) else image
    return pixels.shape[1], pixels.shape[0]


def _enlarged(found: Found, to: tuple[int, int], of: tuple[int, int]) -> Found:
    factor = np.array([to[0] / of[0], to[1] / of[1]] * 2)
    return Found(found.boxes * factor, found.scores, found.labels)
