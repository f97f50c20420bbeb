"""Zero-shot retrieval: which text belongs to a picture, and which picture to a text, among all of the set."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from mammut.evaluation.bootstrap import mean_of
from mammut.evaluation.examples import EvalSet, Example, PictureRef
from mammut.evaluation.outcome import DiskList, Ints, Measure, Outcome, Shown, TaskOptions, picture_batches
from mammut.evaluation.predictor import Predictor
from mammut.evaluation.recall import EmbeddingFile, nearest, ranks
from mammut_runtime.errors import InputError

DEPTHS = (1, 5, 10)
_SHOWN_TEXTS = 3


class _Stored:
    """Everything a set needs for retrieval, on disk; in memory some 40 bytes for each picture and text."""

    def __init__(self, options: TaskOptions) -> None:
        folder = options.workspace
        self.pictures, self.texts = EmbeddingFile(folder / "pictures.f32"), EmbeddingFile(folder / "texts.f32")
        self.names, self.paths = DiskList(folder / "names"), DiskList(folder / "paths")
        self.captions = DiskList(folder / "captions")
        self.picture_of, self.places = array("q"), array("q")
        self.without = 0

    def fill(self, predictor: Predictor, data: EvalSet, options: TaskOptions) -> None:
        for examples, images in picture_batches(data.where(self._has_caption), options, predictor.frames):
            self.pictures.append(predictor.embed_pictures(images))
            texts = [caption for example in examples for caption in example.captions]
            self.texts.append(predictor.embed_texts(texts))
            for example in examples:
                ref = example.picture
                self.picture_of.extend([len(self.names)] * len(example.captions))
                self.names.append(ref.name)
                self.paths.append(str(ref.path))
                self.places.extend([ref.offset, -1 if ref.size is None else ref.size])
                for caption in example.captions:
                    self.captions.append(caption)
        if not len(self.names):
            raise InputError(f"{data.name}: no picture with a caption; expected at least one")

    def _has_caption(self, example: Example) -> bool:
        has = bool(example.captions)
        self.without += not has
        return has

    def ref(self, index: int) -> PictureRef:
        offset, size = self.places[2 * index : 2 * index + 2]
        return PictureRef(self.names[index], Path(self.paths[index]), offset, None if size < 0 else size)


def retrieval(predictor: Predictor, data: EvalSet, options: TaskOptions) -> Outcome:
    """R@1, R@5 and R@10 both ways. Raises InputError for a set without captions."""
    stored = _Stored(options)
    stored.fill(predictor, data, options)
    picture_of = np.frombuffer(stored.picture_of, np.int64)
    picture_ranks, text_ranks = ranks(stored.pictures, stored.texts, picture_of, progress=options.ranked)
    counts = np.bincount(picture_of, minlength=len(stored.names))
    measures = [
        Measure(
            f"picture to text R@{depth}",
            mean_of((picture_ranks < depth).astype(np.float64)),
            len(picture_ranks),
            chance=_chance(counts, len(stored.captions), depth),
            main=depth == 1,
        )
        for depth in DEPTHS
    ] + [
        Measure(
            f"text to picture R@{depth}",
            mean_of((text_ranks < depth).astype(np.float64)),
            len(text_ranks),
            picture_of,
            chance=min(1.0, depth / len(stored.names)),
            main=depth == 1,
        )
        for depth in DEPTHS
    ]

    def show(index: int) -> Shown:
        query = stored.pictures[index : index + 1][0]
        best = nearest(query, stored.texts, _SHOWN_TEXTS)
        own = np.flatnonzero(picture_of == index)
        rank = f"best own text is number {int(picture_ranks[index]) + 1:,} of {len(stored.captions):,}"
        return Shown(
            stored.ref(index),
            rank,
            tuple(stored.captions[int(row)] for row in own),
            tuple(stored.captions[int(row)] for row in best),
            float(picture_ranks[index] == 0),
        )

    notes = (f"{stored.without:,} pictures without a caption were left out",) if stored.without else ()
    facts = {"pictures": len(stored.names), "texts": len(stored.captions)}
    return Outcome(tuple(measures), (picture_ranks == 0).astype(np.float64), show, facts, notes)


def _chance(counts: Ints, texts: int, depth: int) -> float:
    """How often one of a picture's texts is among `depth` of all texts drawn by chance."""
    sizes, how_many = np.unique(counts, return_counts=True)
    drawn = np.arange(min(depth, texts))
    missed = [float(np.prod(np.maximum(0, texts - size - drawn) / (texts - drawn))) for size in sizes]
    return 1 - float(np.dot(missed, how_many)) / len(counts)
