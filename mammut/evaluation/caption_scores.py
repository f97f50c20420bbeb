"""BLEU, ROUGE-L and CIDEr-D of captions, number for number as the COCO caption evaluation computes them.

BLEU     Papineni et al. 2002: corpus level, closest reference length (of two equally close the shorter)
ROUGE-L  Lin 2004: best precision and best recall among the references, beta 1.2, mean over pictures
CIDEr-D  Vedantam et al. 2015: n-grams to 4 weighted by rarity among the references of this very set, clipped, with a
         Gaussian penalty on the difference in length (sigma 6), times 10

Words come from caption_words.py; equality is promised, and tested, for equal words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Words = Sequence[str]

ORDERS = 4
"""Longest n-grams."""
_SIGMA = 6.0
_BETA = 1.2
_TINY, _SMALL = 1e-15, 1e-9
"""What the reference implementation adds to numerators and denominators."""


def ngrams(words: Words) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n = 1 to 4."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, ORDERS + 1)]


# ---- BLEU ----


def bleu_counts(candidate: Words, references: Sequence[Words]) -> F64:
    """What one picture adds to BLEU, float64[10]: 4 clipped matches, 4 n-grams, candidate and reference length."""
    own = ngrams(candidate)
    others = [ngrams(reference) for reference in references]
    matches = [
        sum(min(count, max(other[n][gram] for other in others)) for gram, count in own[n].items())
        for n in range(ORDERS)
    ]
    length = len(candidate)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return np.array([*matches, *(max(0, length - n) for n in range(ORDERS)), length, closest], np.float64)


def bleu(counts: F64, order: int) -> F64:
    """BLEU of summed counts float64[..., 10]: float64[...]."""
    precisions = (counts[..., :order] + _TINY) / (counts[..., ORDERS : ORDERS + order] + _SMALL)
    score = np.prod(precisions, axis=-1) ** (1 / order)
    ratio = (counts[..., 8] + _TINY) / (counts[..., 9] + _SMALL)
    shortened: F64 = score * np.where(ratio < 1, np.exp(np.minimum(0.0, 1 - 1 / ratio)), 1.0)
    return shortened


# ---- ROUGE-L ----


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """One picture's score, 0 to 1."""
    common = [(_longest_common(candidate, reference), len(reference)) for reference in references]
    precision = max(length / max(1, len(candidate)) for length, _ in common)
    recall = max(length / max(1, size) for length, size in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        above = 0  # row[j - 1] of the word before
        for j, other in enumerate(second, 1):
            above, row[j] = row[j], above + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


# ---- CIDEr-D ----


class CiderD:
    """CIDEr-D against the references of a whole set: how rare an n-gram is, is counted over its pictures."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        """references: for each picture one or more. A set of one picture has no rare n-grams: all its scores are 0."""
        self._counted = [[ngrams(reference) for reference in texts] for texts in references]
        pictures = ({gram for counts in texts for count in counts for gram in count} for texts in self._counted)
        self._pictures_with = Counter(gram for grams in pictures for gram in grams)
        self._log_pictures = math.log(len(references)) if references else 0.0

    def score(self, index: int, candidate: Words) -> float:
        """The score of a candidate for picture `index`, 0 to 10."""
        own = self._vectors(ngrams(candidate))
        total = 0.0
        for counts, reference in ((counts, self._vectors(counts)) for counts in self._counted[index]):
            # The reference implementation measures length in 2-grams.
            delta = max(0, len(candidate) - 1) - counts[1].total()
            total += math.exp(-(delta**2) / (2 * _SIGMA**2)) * sum(map(_similarity, own, reference)) / ORDERS
        return 10 * total / len(self._counted[index])

    def _vectors(self, counts: list[Counter[tuple[str, ...]]]) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: n * (self._log_pictures - math.log(max(1, self._pictures_with[gram]))) for gram, n in each.items()}
            for each in counts
        ]


def _similarity(own: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine of two weighted counts, those of the candidate clipped to the reference's."""
    norms = math.sqrt(sum(v * v for v in own.values())) * math.sqrt(sum(v * v for v in reference.values()))
    product = sum(min(value, reference[gram]) * reference[gram] for gram, value in own.items() if gram in reference)
    return product / norms if norms else product
