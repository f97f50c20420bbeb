"""Generation as four roles, wired in one place: inference, token choice, filters, stop.

    inference     CachedDecoder: the prompt once, then one token per step
    filters       min_tokens, repetition_penalty, forbidden_ids: rewrite the log-probabilities of one sequence
    token choice  greedy, sampling, or beam search over sums of log-probabilities
    stop          the end id, or max_tokens

Pictures of a batch do not influence each other: each has its own sequences, filters and random numbers. A picture that
is finished is carried along until half of the batch is, and then dropped from it.

Not here: texts (model.py), the likelihood of given answers (likelihood.py), the public openMaMMUT rules
(generation_openmammut.py).

Legend: P pictures, K beams, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.cached_decoder import CachedDecoder
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.errors import EngineError, InputError
from mammut_runtime.probabilities import best, log_softmax, softmax

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StopRule:
    """When a text ends."""

    end_id: int
    max_tokens: int
    """Tokens generated at most, the end counted."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"there must be room for at least 1 new token, got {self.max_tokens}")


@dataclass(frozen=True)
class Generated:
    """A generated text as ids."""

    ids: tuple[int, ...]
    """New ids, without prompt and end."""
    log_probability: float
    """Sum of the model's own natural log-probabilities of the new tokens, the end included; filters, temperature and
    penalties do not enter it."""
    finished: bool
    """Whether the end id was generated; if not, max_tokens cut the text."""

    @property
    def tokens(self) -> int:
        """Tokens that were generated, the end counted."""
        return len(self.ids) + int(self.finished)

    @property
    def mean_log_probability(self) -> float:
        """log_probability / tokens, <= 0: comparable between texts of different length."""
        return self.log_probability / max(1, self.tokens)


def generate(decoder: CachedDecoder, prompt: Sequence[int], options: CaptionOptions, stop: StopRule) -> list[Generated]:
    """One text for each picture of a fresh decoder (one sequence per picture, nothing fed yet).

    prompt: ids that every text begins with, at least one. Uses the decoder up. Raises InputError for an empty prompt.
    """
    if options.width > 1:
        return beam_search(decoder, prompt, options, stop)
    rows: list[_Row] = []
    for rows in _steps(decoder, prompt, options, stop):  # noqa: B007 (the last one is what we came for)
        pass
    return [row.result() for row in rows]


def stream(decoder: CachedDecoder, prompt: Sequence[int], options: CaptionOptions, stop: StopRule) -> Iterator[int]:
    """The ids of `generate` for one picture as they come, without the end. Greedy or sampling only (InputError)."""
    if (options.beams or 1) > 1:
        raise InputError(f"beam search chooses at the end, so it cannot stream; use beams=1, got {options.beams}")
    if decoder.pictures != 1:
        raise InputError(f"streaming is for one picture, got {decoder.pictures}")
    steps = _steps(decoder, prompt, options, stop)
    return (row.ids[-1] for (row,) in steps if not row.finished)


# ---- filters: rewrite the log-probabilities [V] of one sequence in place, given its new ids ----

Filter = Callable[[Floats, Sequence[int]], None]


def filters_of(options: CaptionOptions, end_id: int) -> tuple[Filter, ...]:
    """The filters that the options ask for, in the order in which they are applied."""

    def repetition(scores: Floats, ids: Sequence[int]) -> None:
        used = list(set(ids))
        scores[used] *= np.float32(options.repetition_penalty)

    def forbid(scores: Floats, _: Sequence[int]) -> None:
        scores[list(options.forbidden_ids)] = -np.inf

    def minimum(scores: Floats, ids: Sequence[int]) -> None:
        if len(ids) < options.min_tokens:
            scores[end_id] = -np.inf

    wanted = (options.repetition_penalty != 1, bool(options.forbidden_ids), options.min_tokens > 0)
    return tuple(each for each, wants in zip((repetition, forbid, minimum), wanted, strict=True) if wants)


def _filtered(own: Floats, ids: Sequence[int], filters: tuple[Filter, ...]) -> Floats:
    """float32[V] -> float32[V]: a copy when there is something to rewrite."""
    scores = own.copy() if filters else own
    for each in filters:
        each(scores, ids)
    return scores


# ---- token choice for one sequence: filtered log-probabilities float32[V] -> id ----


class Greedy:
    """The most probable token; of equal ones the first."""

    def choose(self, scores: Floats) -> int:
        return int(scores.argmax())


class Sampler:
    """A token drawn after temperature, then top_k, then top_p. One uniform number per token."""

    def __init__(self, options: CaptionOptions) -> None:
        self._temperature = np.float32(options.temperature or 1.0)
        self._top_k, self._top_p = options.top_k, options.top_p
        self._source = np.random.default_rng(options.seed)

    def choose(self, scores: Floats) -> int:
        ids, probabilities = self.candidates(scores)
        edges = np.cumsum(probabilities)
        drawn = int(np.searchsorted(edges, self._source.random() * edges[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def candidates(self, scores: Floats) -> tuple[Ids, NDArray[np.float64]]:
        """Possible ids, and their probabilities, which sum to 1. int64[n], float64[n], all above 0."""
        scores = scores / self._temperature
        ids = np.flatnonzero(scores > -np.inf) if self._top_k is None else best(scores, self._top_k)
        probabilities = softmax(scores[ids].astype(np.float64))
        if self._top_p is not None and self._top_p < 1:
            # ids below this line sum to less than 1 - top_p even all together, so they need not be sorted
            likely = probabilities >= (1 - self._top_p) / len(ids)
            ids, probabilities = ids[likely], probabilities[likely]
            order = np.argsort(-probabilities, kind="stable")
            ids, probabilities = ids[order], probabilities[order]
            count = int(np.searchsorted(np.cumsum(probabilities), self._top_p)) + 1
            ids, probabilities = ids[:count], probabilities[:count]
        possible = probabilities > 0
        return ids[possible], probabilities[possible] / probabilities[possible].sum()


# ---- one sequence per picture: greedy and sampling ----


@dataclass
class _Row:
    """The text of one picture while it grows."""

    chooser: Greedy | Sampler
    stop: StopRule
    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    finished: bool = False

    @property
    def done(self) -> bool:
        return self.finished or len(self.ids) >= self.stop.max_tokens

    def extend(self, own: Floats, filters: tuple[Filter, ...]) -> None:
        scores = _filtered(own, self.ids, filters)
        token = self.chooser.choose(_possible(scores))
        self.log_probability += float(own[token])
        self.finished = token == self.stop.end_id
        if not self.finished:
            self.ids.append(token)

    def result(self) -> Generated:
        return Generated(tuple(self.ids), self.log_probability, self.finished)


def _steps(
    decoder: CachedDecoder, prompt: Sequence[int], options: CaptionOptions, stop: StopRule
) -> Iterator[list[_Row]]:
    """After every step the texts of all pictures, in the order of the pictures."""
    filters = filters_of(options, stop.end_id)
    rows = [_Row(Sampler(options) if options.sampled else Greedy(), stop) for _ in range(decoder.pictures)]
    in_decoder = rows
    logits = decoder.feed(_prompt_ids(prompt, decoder.pictures))
    while True:
        for row, own in zip(in_decoder, log_softmax(logits[:, 0]), strict=True):
            if not row.done:
                row.extend(own, filters)
        yield rows
        live = [i for i, row in enumerate(in_decoder) if not row.done]
        if not live:
            return
        if 2 * len(live) <= len(in_decoder):
            decoder.keep(np.array(live))
            in_decoder = [in_decoder[i] for i in live]
        logits = decoder.feed(np.array([[[row.ids[-1] if row.ids else stop.end_id]] for row in in_decoder]))


# ---- beam search ----


@dataclass(frozen=True)
class _Beam:
    """An open sequence: its new ids, the sum it is ranked by, and the sum of the model's own log-probabilities."""

    ids: tuple[int, ...] = ()
    total: float = 0.0
    log_probability: float = 0.0


class _Search:
    """Beam search of one picture."""

    def __init__(self, options: CaptionOptions, stop: StopRule, filters: tuple[Filter, ...]) -> None:
        self._width, self._penalty = options.width, options.length_penalty
        self._stop, self._filters = stop, filters
        self.beams = [_Beam()]
        self.parents: list[int] = []
        """Which of the previous beams each of `beams` continues."""
        self.done = False
        self._closed: list[tuple[float, Generated]] = []

    def extend(self, own_KV: Floats) -> None:
        """One step. Of the best 2K continuations an end among the first K closes a text, the first K others go on."""
        length = len(self.beams[0].ids) + 1
        following: list[_Beam] = []
        parents: list[int] = []
        for rank, (total, parent, token) in enumerate(self._candidates(own_KV)):
            beam = self.beams[parent]
            log_probability = beam.log_probability + float(own_KV[parent, token])
            if token != self._stop.end_id:
                following.append(_Beam((*beam.ids, token), total, log_probability))
                parents.append(parent)
            elif rank < self._width:
                self._close(total, length, Generated(beam.ids, log_probability, finished=True))
            if len(following) == self._width:
                break
        if length == self._stop.max_tokens:
            for beam in following:
                self._close(beam.total, length, Generated(beam.ids, beam.log_probability, finished=False))
        self.beams, self.parents = following, parents
        self.done = length == self._stop.max_tokens or not following or self._cannot_improve(length)

    def best(self) -> Generated:
        return max(self._closed, key=lambda each: each[0])[1]  # of equal ones the first that was closed

    def _candidates(self, own_KV: Floats) -> list[tuple[float, int, int]]:
        """(sum, parent, token) of the best 2K continuations, best first."""
        found: list[tuple[float, int, int]] = []
        for parent, beam in enumerate(self.beams):
            scores = _possible(_filtered(own_KV[parent], beam.ids, self._filters))
            tokens = best(scores, 2 * self._width)
            found += [(beam.total + float(scores[token]), parent, int(token)) for token in tokens]
        found = [each for each in found if each[0] > -math.inf]
        found.sort(key=lambda each: (-each[0], each[1], each[2]))
        return found[: 2 * self._width]

    def _close(self, total: float, length: int, text: Generated) -> None:
        self._closed.append((total / length**self._penalty, text))
        if len(self._closed) > self._width:
            self._closed.remove(min(self._closed, key=lambda each: each[0]))

    def _cannot_improve(self, length: int) -> bool:
        """As is usual, judged by the length so far. Exact for length_penalty 0; a longer text could still rank higher
        otherwise, which would mean searching to max_tokens nearly every time."""
        if len(self._closed) < self._width:
            return False
        attainable: float = max(beam.total for beam in self.beams) / length**self._penalty
        worst = min(score for score, _ in self._closed)
        return worst >= attainable


def beam_search(
    decoder: CachedDecoder, prompt: Sequence[int], options: CaptionOptions, stop: StopRule
) -> list[Generated]:
    """As `generate`, with options.width beams (1 gives what greedy gives)."""
    filters = filters_of(options, stop.end_id)
    searches = [_Search(options, stop, filters) for _ in range(decoder.pictures)]
    in_decoder = searches
    logits = decoder.feed(_prompt_ids(prompt, decoder.pictures))
    while True:
        for search, own_KV in zip(in_decoder, log_softmax(logits), strict=True):
            if not search.done:
                search.extend(own_KV)
        live = [i for i, search in enumerate(in_decoder) if not search.done]
        if not live:
            return [search.best() for search in searches]
        if 2 * len(live) <= len(in_decoder):
            decoder.keep(np.array(live))
            in_decoder = [in_decoder[i] for i in live]
        # all pictures have K rows in the graph; what one has less of is filled up with rows nobody looks at
        parents, tokens = np.zeros((2, len(in_decoder), options.width), np.int64)
        for i, search in enumerate(in_decoder):
            if not search.done:
                parents[i, : len(search.parents)] = search.parents
                tokens[i, : len(search.beams)] = [beam.ids[-1] for beam in search.beams]
        decoder.select(parents)
        logits = decoder.feed(tokens[:, :, None])


def _prompt_ids(prompt: Sequence[int], pictures: int) -> Ids:
    if not prompt:
        raise InputError("the prompt must hold at least one id, usually the start id; got none")
    return np.tile(np.array(prompt, np.int64), (pictures, 1, 1))


def _possible(scores: Floats) -> Floats:
    top = scores.max()
    if np.isnan(top):
        raise EngineError("the decoder gave NaN in place of logits; replay the bundle's canary on this device")
    if top == -np.inf:
        raise InputError("forbidden_ids and min_tokens together leave no token that may follow; forbid fewer ids")
    return scores
