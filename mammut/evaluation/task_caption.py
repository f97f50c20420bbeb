"""Captions against what people wrote: BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D."""

from __future__ import annotations

import numpy as np

from mammut.evaluation.bootstrap import F64, Statistic, mean_of
from mammut.evaluation.caption_scores import ORDERS, CiderD, bleu, bleu_counts, rouge_l
from mammut.evaluation.caption_words import caption_words
from mammut.evaluation.examples import EvalSet, Example
from mammut.evaluation.outcome import Measure, Outcome, Shown, TaskOptions, clip_notes, picture_batches
from mammut.evaluation.predictor import Predictor
from mammut_runtime.errors import InputError

FEW = 2
"""Below this many pictures CIDEr-D is 0 whatever is written: nothing is rare."""


def caption(predictor: Predictor, data: EvalSet, options: TaskOptions) -> Outcome:
    """Scores of the model's captions. Raises InputError for a set without captions."""
    kept: list[Example] = []
    written: list[str] = []
    for examples, images in picture_batches(data.where(lambda each: bool(each.captions)), options, predictor.frames):
        written += predictor.caption(images)
        kept += examples
    if not kept:
        raise InputError(f"{data.name}: no picture with a caption; expected at least one")
    measures, ciders = caption_measures(written, [example.captions for example in kept])
    better = ciders > np.median(ciders)  # right and wrong are of no use here: a page shows the two halves

    def show(index: int) -> Shown:
        example = kept[index]
        said = f"CIDEr-D {100 * ciders[index]:.0f}"
        return Shown(example.picture, said, example.captions, (written[index],), float(better[index]))

    notes = ["CIDEr-D: how rare words are is counted in this set, so sets of other pictures or sizes do not compare"]
    if len(kept) < FEW:
        notes.append(f"CIDEr-D means nothing with {len(kept)} picture")
    notes += clip_notes(sum(example.picture.is_clip for example in kept), predictor.frames)
    facts = {"pictures": len(kept), "captions": sum(len(example.captions) for example in kept)}
    return Outcome(measures, better.astype(np.float64), show, facts, tuple(notes))


def caption_measures(written: list[str], references: list[tuple[str, ...]]) -> tuple[tuple[Measure, ...], F64]:
    """The measures, and CIDEr-D of each picture (0 to 10)."""
    candidates = [caption_words(text) for text in written]
    words = [[caption_words(text) for text in texts] for texts in references]
    counts = np.stack([bleu_counts(own, others) for own, others in zip(candidates, words, strict=True)])
    rouge = np.array([rouge_l(own, others) for own, others in zip(candidates, words, strict=True)])
    cider = CiderD(words)
    ciders = np.array([cider.score(index, own) for index, own in enumerate(candidates)])
    size = len(written)
    bleus = [
        Measure(f"BLEU-{order}", _bleu_of(counts, order), size, main=order == ORDERS) for order in range(1, ORDERS + 1)
    ]
    rest = (
        Measure("ROUGE-L", mean_of(rouge), size),
        Measure("CIDEr-D", mean_of(ciders), size, main=True),
    )
    return (*bleus, *rest), ciders


def _bleu_of(counts: F64, order: int) -> Statistic:
    return lambda weights: bleu(weights @ counts, order)
