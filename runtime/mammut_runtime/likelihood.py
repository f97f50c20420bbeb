"""How likely given answers are: the decoder reads each candidate instead of choosing tokens.

A candidate's score is the natural logarithm of the probability that exactly this text follows the prompt and then ends:
the sum over its tokens and the end id. There is no division by length: with the end counted, these are probabilities of
distinct events, so they compare as they are, and a long answer is as unlikely as the model says. `normalise=True` gives
the mean per token instead, for candidates whose lengths differ without meaning.

Legend: P pictures, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.cached_decoder import CachedDecoder
from mammut_runtime.errors import InputError
from mammut_runtime.probabilities import log_softmax

CANDIDATES_AT_ONCE = 32
"""Candidates scored side by side; bounds the memory of their caches and logits."""


def score_continuations(
    decoder: CachedDecoder,
    prompt: Sequence[int],
    candidates: Sequence[Sequence[int]],
    end_id: int,
    *,
    normalise: bool = False,
) -> NDArray[np.float64]:
    """Log-likelihood of each candidate after the prompt, for each picture of a fresh decoder: float64[P, C], <= 0.

    prompt: ids, at least one. candidates: ids each, without the end id, at least one id each. normalise: divide by the
    number of tokens, the end counted. Raises InputError for an empty prompt, list or candidate.
    """
    if not prompt or not candidates or not all(len(each) for each in candidates):
        raise InputError("scoring needs a prompt and one or more candidates, each with at least one token")
    prompt_ids = np.tile(np.array(prompt, np.int64), (decoder.pictures, 1, 1))
    first = log_softmax(decoder.feed(prompt_ids))[:, 0]
    scores = np.empty((decoder.pictures, len(candidates)), np.float64)
    by_length = sorted(range(len(candidates)), key=lambda c: len(candidates[c]))
    at_once = min(CANDIDATES_AT_ONCE, decoder.most_sequences or CANDIDATES_AT_ONCE)
    for start in range(0, len(by_length), at_once):
        chosen = by_length[start : start + at_once]
        whole = [(*candidates[c], end_id) for c in chosen]
        scores[:, chosen] = first[:, [ids[0] for ids in whole]]
        for c, total in zip(chosen, _rest(decoder.fork(), whole).T, strict=True):
            scores[:, c] += total
    if normalise:
        scores /= [len(each) + 1 for each in candidates]
    return scores


def _rest(decoder: CachedDecoder, candidates: list[tuple[int, ...]]) -> NDArray[np.float64]:
    """Sum of log-probabilities of all but the first token, float64[P, C]. Candidates are ordered by length."""
    totals = np.zeros((decoder.pictures, len(candidates)), np.float64)
    decoder.select(np.zeros((decoder.pictures, len(candidates)), np.int64))
    begin = 0  # candidates before this one are read to their end
    for position in range(1, len(candidates[-1])):
        ended = sum(len(ids) <= position for ids in candidates) - begin
        if ended:
            begin += ended
            decoder.select(np.tile(np.arange(ended, decoder.sequences), (decoder.pictures, 1)))
        reading = candidates[begin:]
        read = np.array([ids[position - 1] for ids in reading], np.int64)
        following = np.array([ids[position] for ids in reading], np.int64)
        log_probabilities = log_softmax(decoder.feed(np.tile(read[:, None], (decoder.pictures, 1, 1))))
        totals[:, begin:] += log_probabilities[:, np.arange(len(reading)), following]
    return totals
