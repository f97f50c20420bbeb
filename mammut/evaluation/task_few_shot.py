"""Few-shot classification on the embeddings: a linear probe and nearest neighbours from k pictures of each class."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from mammut.evaluation.bootstrap import mean_of
from mammut.evaluation.examples import EvalSet, Example
from mammut.evaluation.outcome import F64, Ints, Measure, Outcome, Shown, TaskOptions, picture_batches
from mammut.evaluation.predictor import F32, CorruptedPredictor, Predictor
from mammut.evaluation.probe import linear_probe, nearest_neighbours
from mammut_runtime.errors import InputError

METHODS = {"linear probe": linear_probe, "nearest neighbours": nearest_neighbours}


def few_shot(
    predictor: Predictor, data: EvalSet, options: TaskOptions, labels: Sequence[str], trained: EvalSet
) -> Outcome:
    """Top-1 for each number of pictures and method: the mean over `draws` random choices of the pictures.

    trained: where the k pictures of each class come from. Raises InputError where a class has none there.
    """
    if len(labels) < 2:
        raise InputError(f"{data.name}: expected pictures with 2 or more labels, got {', '.join(labels) or 'none'}")
    pool = {label: [example for example in trained if example.label == label] for label in labels}
    without = [label for label, examples in pool.items() if not examples]
    if without:
        raise InputError(f"{trained.name}: no pictures to learn {', '.join(without[:3])} from; expected 1 or more each")
    draws = [_shuffled(pool, f"{options.seed}/{draw}") for draw in range(options.draws)]
    judged, embeddings = _embedded(predictor, data.where(lambda each: each.label is not None), options)
    if not judged:
        raise InputError(f"{data.name}: no picture with a label; expected at least one")
    number = {label: index for index, label in enumerate(labels)}
    right = np.array([number[str(example.label)] for example in judged])
    # What is learned from is clean, also where what is judged is corrupted.
    known = _Known(predictor.inner if isinstance(predictor, CorruptedPredictor) else predictor, options)
    measures, last = [], np.zeros(len(judged), np.int64)
    for shots in options.shots:
        found: dict[str, list[Ints]] = {method: [] for method in METHODS}
        for draw in draws:
            chosen = [example for examples in draw.values() for example in examples[:shots]]
            rows, used = known.embed(chosen)
            own = np.array([number[str(example.label)] for example in used])
            for method, learn in METHODS.items():
                found[method].append(learn(rows, own, len(labels), embeddings))
        for method, classes in found.items():
            hits: F64 = np.stack([each == right for each in classes]).mean(axis=0)
            measures.append(Measure(f"{method}, {shots} a class", mean_of(hits), len(judged), chance=1 / len(labels),
                                    main=shots == options.shots[-1]))  # fmt: skip
        last = found["linear probe"][0]

    def show(index: int) -> Shown:
        said = (labels[last[index]],)
        return Shown(judged[index].picture, "", (labels[right[index]],), said, float(last[index] == right[index]))

    small = min(len(examples) for examples in pool.values())
    short = f"a class has only {small} pictures to learn from; it counts with those"
    notes = (short,) if small < options.shots[-1] else ()
    facts = {"pictures": len(judged), "classes": len(labels), "draws": options.draws}
    return Outcome(tuple(measures), (last == right).astype(np.float64), show, facts, notes)


def _shuffled(pool: dict[str, list[Example]], seed: str) -> dict[str, list[Example]]:
    """The first k of each are the draw of k: a larger draw contains the smaller ones."""
    generator = random.Random(seed)
    return {label: generator.sample(examples, len(examples)) for label, examples in pool.items()}


def _embedded(predictor: Predictor, data: EvalSet, options: TaskOptions) -> tuple[list[Example], F32]:
    kept: list[Example] = []
    rows = [np.empty((0, 0), np.float32)]
    for examples, images in picture_batches(data, options):
        kept += examples
        rows.append(predictor.embed_pictures(images))
    return kept, np.concatenate(rows[1:]) if kept else rows[0]


class _Known:
    """Embeddings of pictures to learn from, each computed once."""

    def __init__(self, predictor: Predictor, options: TaskOptions) -> None:
        self._predictor, self._options = predictor, options
        self._rows: dict[Example, F32 | None] = {}

    def embed(self, examples: list[Example]) -> tuple[F32, list[Example]]:
        """Rows of the examples that can be read, and which those are."""
        new = EvalSet.of("", [example for example in examples if example not in self._rows])
        kept, rows = _embedded(self._predictor, new, self._options)
        self._rows.update(dict.fromkeys(new, None))
        self._rows.update(zip(kept, rows, strict=True))
        used = [(row, example) for example in examples if (row := self._rows[example]) is not None]
        if not used:
            raise InputError("few-shot: none of the pictures to learn from can be read; check the data")
        return np.stack([row for row, _ in used]), [example for _, example in used]
