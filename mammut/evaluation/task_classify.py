"""Zero-shot classification: the class whose name, put into prompt templates, fits the picture best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mammut.evaluation.bootstrap import F64, Statistic, mean_of
from mammut.evaluation.examples import EvalSet, Example
from mammut.evaluation.outcome import Ints, Measure, Outcome, Shown, TaskOptions, picture_batches
from mammut.evaluation.predictor import F32, Predictor
from mammut_runtime.errors import InputError

_SHOWN = 3
_TOP = 5


def classify(predictor: Predictor, data: EvalSet, options: TaskOptions, labels: Sequence[str]) -> Outcome:
    """Top-1, top-5 where there are more than 5 classes, and the mean over classes.

    labels: every class that can be named, also those without a picture here. Raises InputError for fewer than 2.
    """
    if len(labels) < 2:
        raise InputError(f"{data.name}: expected pictures with 2 or more labels, got {', '.join(labels) or 'none'}")
    classes = class_embeddings(predictor, [options.names.get(label, label) for label in labels], options.templates)
    number = {label: index for index, label in enumerate(labels)}
    kept: list[Example] = []
    ranked, truth = [], []
    for examples, images in picture_batches(data.where(lambda each: each.label is not None), options):
        scores = predictor.embed_pictures(images) @ classes.T
        own = np.array([number[str(example.label)] for example in examples])
        ranked.append(np.argsort(-scores, axis=1, kind="stable")[:, : max(_TOP, _SHOWN)])
        truth.append(own)
        kept += examples
    if not kept:
        raise InputError(f"{data.name}: no picture with a label; expected at least one")
    best, right = np.concatenate(ranked), np.concatenate(truth)
    hits = (best[:, 0] == right).astype(np.float64)
    measures = [Measure("top-1", mean_of(hits), len(kept), chance=1 / len(labels), main=True)]
    if len(labels) > _TOP:
        among = (best[:, :_TOP] == right[:, None]).any(axis=1).astype(np.float64)
        measures.append(Measure(f"top-{_TOP}", mean_of(among), len(kept), chance=_TOP / len(labels)))
    measures.append(Measure("mean of classes", mean_of_groups(hits, right), len(kept), chance=1 / len(labels)))

    def show(index: int) -> Shown:
        names = tuple(options.names.get(labels[place], labels[place]) for place in best[index, :_SHOWN])
        label = labels[right[index]]
        return Shown(kept[index].picture, "", (options.names.get(label, label),), names, float(hits[index]))

    templates = len(options.templates or predictor.templates)
    facts = {"pictures": len(kept), "classes": len(labels), "templates": templates}
    return Outcome(tuple(measures), hits, show, facts)


def class_embeddings(predictor: Predictor, names: Sequence[str], templates: Sequence[str] | None) -> F32:
    """float32[C, E]: for each name the mean of its prompts' unit vectors, again of unit length."""
    templates = templates or predictor.templates
    rows = []
    for name in names:
        mean = predictor.embed_texts([template.replace("{}", name) for template in templates]).mean(axis=0)
        rows.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    return np.stack(rows).astype(np.float32)


def mean_of_groups(values: F64, group: Ints) -> Statistic:
    """The mean over groups of the mean in each, so that frequent classes do not count more."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    ordered = values[order]

    def statistic(weights: F64) -> F64:
        ordered_weights = weights[:, order]
        sums = np.add.reduceat(ordered_weights * ordered, starts, axis=1)
        counts = np.add.reduceat(ordered_weights, starts, axis=1)
        with np.errstate(invalid="ignore"):
            found: F64 = np.nanmean(np.where(counts > 0, sums / counts, np.nan), axis=1)
        return found

    return statistic
