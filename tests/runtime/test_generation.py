"""The fast, cached, batched generation against slow and obvious restatements over a toy language."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.errors import EngineError, InputError
from mammut_runtime.generation import Generated, Sampler, StopRule, beam_search, filters_of, generate, stream

START, END = 0, 1
PROMPT = [START, 3]
seeds = st.integers(0, 10**6)
few = settings(max_examples=40, deadline=None)


def greedy(toy: Any, picture: float, options: CaptionOptions, max_tokens: int) -> Generated:
    """One token after another, the whole prefix every time."""
    ids: list[int] = []
    total = 0.0
    while len(ids) < max_tokens:
        own = toy.log_probabilities([*PROMPT, *ids], picture)
        token = int(np.argmax(rewritten(own, ids, options)))
        total += own[token]
        if token == END:
            return Generated(tuple(ids), total, True)
        ids.append(token)
    return Generated(tuple(ids), total, False)


def rewritten(own: np.ndarray, ids: Sequence[int], options: CaptionOptions) -> np.ndarray:
    scores = own.copy()
    for token in set(ids):
        scores[token] *= options.repetition_penalty
    for token in options.forbidden_ids:
        scores[token] = -math.inf
    if len(ids) < options.min_tokens:
        scores[END] = -math.inf
    return scores


def slow_beams(toy: Any, picture: float, options: CaptionOptions, max_tokens: int) -> Generated:
    """Beam search with full sorts and no cache."""
    width, closed = options.width, []
    beams = [((), 0.0, 0.0)]
    for length in range(1, max_tokens + 1):
        candidates = []
        for parent, (ids, total, _) in enumerate(beams):
            scores = rewritten(toy.log_probabilities([*PROMPT, *ids], picture), ids, options)
            candidates += [(total + s, parent, t) for t, s in enumerate(scores) if s > -math.inf]
        candidates.sort(key=lambda each: (-each[0], each[1], each[2]))
        following = []
        for rank, (total, parent, token) in enumerate(candidates[: 2 * width]):
            ids, _, own = beams[parent]
            own += toy.log_probabilities([*PROMPT, *ids], picture)[token]
            if token != END:
                following.append(((*ids, token), total, own))
            elif rank < width:
                closed.append((total / length**options.length_penalty, Generated(ids, own, True)))
            if len(following) == width:
                break
        closed = sorted(closed, key=lambda each: -each[0])[:width]
        beams = following
        best_open = max((total for _, total, _ in beams), default=-math.inf) / length**options.length_penalty
        if len(closed) == width and closed[-1][0] >= best_open:
            return closed[0][1]
    closed += [(total / max_tokens**options.length_penalty, Generated(ids, own, False)) for ids, total, own in beams]
    return max(closed, key=lambda each: each[0])[1]


def same(found: Generated, expected: Generated) -> None:
    assert (found.ids, found.finished) == (expected.ids, expected.finished)
    assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-4)


# ---- greedy ----


@few
@given(
    seeds,
    st.integers(1, 12),
    st.integers(0, 5),
    st.sampled_from([1.0, 1.4, 0.7]),
    st.sets(st.integers(2, 7), max_size=2),
)
def test_cached_greedy_equals_uncached(
    toy: Any, seed: int, max_tokens: int, min_tokens: int, penalty: float, forbidden: set[int]
) -> None:
    options = CaptionOptions(beams=1, min_tokens=min_tokens, repetition_penalty=penalty, forbidden_ids=tuple(forbidden))
    language, pictures = toy(seed=seed), [0.5, -1.0, 2.0]
    found = generate(language.decoder(pictures), PROMPT, options, StopRule(END, max_tokens))
    for text, picture in zip(found, pictures, strict=True):
        same(text, greedy(language, picture, options, max_tokens))


def test_prefill_is_one_call_and_steps_feed_one_token(toy: Any) -> None:
    language = toy(seed=2)
    options = CaptionOptions(beams=1, min_tokens=5)
    generate(language.decoder([1.0]), PROMPT, options, StopRule(END, 6))
    assert [call["ids"].shape for call in language.engine.calls] == [(1, 1, 2)] + [(1, 1, 1)] * 5
    assert [call["past_k.0"].shape[3] for call in language.engine.calls] == [0, 2, 3, 4, 5, 6]


def test_batch_shrinks_when_half_is_done(toy: Any) -> None:
    """Four pictures that end at different steps; what is finished costs nothing for long."""
    for seed in range(100):
        language = toy(seed=seed)
        found = generate(language.decoder([0, 1, 2, 3]), PROMPT, CaptionOptions(beams=1), StopRule(END, 20))
        ends = sorted(text.tokens for text in found)
        if len(set(ends)) == 4:
            break
    sizes = [call["ids"].shape[0] for call in language.engine.calls]
    assert len(sizes) == ends[-1], "no step after the last text has ended"
    live = [sum(end > step for end in ends) for step in range(ends[-1])]
    assert all(now <= size < 2 * now or size == 4 for now, size in zip(live, sizes, strict=True))
    assert sizes[-1] == 1 and sizes[0] == 4


# ---- beam search ----


@settings(max_examples=120, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 8), st.sampled_from([0.0, 0.6, 1.0, 2.0]), st.integers(0, 3))
def test_beam_search_equals_uncached(
    toy: Any, seed: int, beams: int, max_tokens: int, length_penalty: float, min_tokens: int
) -> None:
    source = np.random.default_rng(seed)
    options = CaptionOptions(
        beams=beams,
        length_penalty=length_penalty,
        min_tokens=min_tokens,
        repetition_penalty=float(source.choice([1.0, 1.5])),
        forbidden_ids=(5,) if source.random() < 0.3 else (),
    )
    # an end that is likely everywhere: several beams end at once, and searches are over early
    language, pictures = toy(seed=seed, end_bonus=float(source.choice([0.0, 2.0, 4.0]))), [0.5, -1.0, 2.0]
    found = beam_search(language.decoder(pictures), PROMPT, options, StopRule(END, max_tokens))
    for text, picture in zip(found, pictures, strict=True):
        same(text, slow_beams(language, picture, options, max_tokens))


def test_an_end_behind_the_first_k_is_dropped(toy: Any) -> None:
    """2 beams, by hand. Second step: A END .30, A C .27, B END .24, B C .12. The end of rank 3 must not close a text:
    with two closed the search would be over at the next step, and "A" (mean of logarithms -.60) would win. It goes on,
    and finds "A C A" (-.56)."""
    a, b, c = 2, 3, 4
    after = {
        (): {a: 0.6, b: 0.4},
        (a,): {END: 0.5, c: 0.45, a: 0.05},
        (b,): {END: 0.6, c: 0.3, a: 0.1},
        (a, c): {a: 0.4, b: 0.3, c: 0.3},
        (a, c, a): {END: 1.0},
    }

    class Spoken(toy):  # type: ignore[misc]
        def logits(self, ids: Sequence[int], picture: float) -> np.ndarray:
            chances = after.get(tuple(int(each) for each in ids[len(PROMPT) :]), {a: 0.5, b: 0.5})
            with np.errstate(divide="ignore"):
                return np.log([chances.get(token, 0.0) for token in range(8)]).astype(np.float32)

    def best(ids: dict[int, float]) -> tuple[int, ...]:
        after[(a,)] = ids
        return generate(Spoken().decoder([1.0]), PROMPT, CaptionOptions(beams=2), StopRule(END, 8))[0].ids

    assert best({END: 0.5, c: 0.45, a: 0.05}) == (a, c, a)
    assert best({END: 0.5, c: 0.39, a: 0.11}) == (a,), "control: now that end is among the first two"


@few
@given(seeds, st.sampled_from([0.0, 1.0, 2.0]))
def test_enough_beams_find_the_best_of_all_texts(toy: Any, seed: int, length_penalty: float) -> None:
    """4 tokens, at most 3 of them: 13 texts that end and 27 that are cut. 64 beams hold them all."""
    language, max_tokens, best = toy(vocabulary=4, seed=seed), 3, (-math.inf, Generated((), 0.0, False))
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(range(4), repeat=length):
            if END in ids[:-1] or (length < max_tokens and ids[-1] != END):
                continue
            total = sum(language.log_probabilities([*PROMPT, *ids[:i]], 1.0)[token] for i, token in enumerate(ids))
            text = Generated(tuple(each for each in ids if each != END), total, ids[-1] == END)
            best = max(best, (total / length**length_penalty, text), key=lambda each: each[0])
    options = CaptionOptions(beams=64, length_penalty=length_penalty)
    (found,) = generate(language.decoder([1.0]), PROMPT, options, StopRule(END, max_tokens))
    same(found, best[1])


@few
@given(seeds, st.integers(1, 12))
def test_one_beam_is_greedy(toy: Any, seed: int, max_tokens: int) -> None:
    language = toy(seed=seed)
    stop, options = StopRule(END, max_tokens), CaptionOptions(beams=1)
    (found,) = beam_search(language.decoder([1.0]), PROMPT, options, stop)
    (expected,) = generate(language.decoder([1.0]), PROMPT, options, stop)
    same(found, expected)


def test_beams_share_the_picture(toy: Any) -> None:
    """The prompt runs once, not once per beam, and the picture's keys and values are never repeated."""
    language = toy(seed=4)
    generate(language.decoder([1.0, 2.0]), PROMPT, CaptionOptions(beams=3, min_tokens=4), StopRule(END, 5))
    shapes = [call["ids"].shape for call in language.engine.calls]
    assert shapes[:2] == [(2, 1, 2), (2, 3, 1)]
    assert all(call["cross_k.0"].shape[0] == call["ids"].shape[0] for call in language.engine.calls)


def test_fewer_tokens_than_beams(toy: Any) -> None:
    """8 tokens, 6 of them forbidden: at first only two beams exist, the others are filled up and never win."""
    options = CaptionOptions(beams=5, forbidden_ids=(0, 2, 3, 4, 5, 6))
    language = toy(seed=1)
    (found,) = generate(language.decoder([1.0]), PROMPT, options, StopRule(END, 6))
    same(found, slow_beams(language, 1.0, options, 6))
    assert set(found.ids) <= {7}


# ---- sampling ----


@few
@given(seeds, st.integers(0, 2**40))
def test_a_batch_gives_what_each_picture_gives_alone(toy: Any, seed: int, draw: int) -> None:
    language, pictures, stop = toy(seed=seed), [0.5, -1.0, 2.0, 0.1, 3.0], StopRule(END, 9)
    for options in (
        CaptionOptions(beams=1),
        CaptionOptions(beams=3),
        CaptionOptions(temperature=1.5, seed=draw),
        CaptionOptions(top_p=0.9, top_k=5, seed=draw),
    ):
        together = generate(language.decoder(pictures), PROMPT, options, stop)
        for text, picture in zip(together, pictures, strict=True):
            (alone,) = generate(language.decoder([picture]), PROMPT, options, stop)
            same(text, alone)


def test_same_seed_same_text(toy: Any) -> None:
    def run(seed: int | None) -> tuple[int, ...]:
        options = CaptionOptions(temperature=3.0, seed=seed, min_tokens=19)
        (text,) = generate(toy(seed=3).decoder([1.0]), PROMPT, options, StopRule(END, 20))
        return text.ids

    assert run(1) == run(1)
    assert run(1) != run(2) and run(None) != run(None)


def candidates(**options: Any) -> dict[int, float]:
    scores = np.log(np.array([0.4, 0.1, 0.3, 0.2, 0.0], np.float64) + 1e-300).astype(np.float32)
    scores[4] = -np.inf
    ids, probabilities = Sampler(CaptionOptions(**options)).candidates(scores)
    assert probabilities.sum() == pytest.approx(1)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def test_sampling_candidates_in_closed_form() -> None:
    squared = np.array([0.16, 0.01, 0.09, 0.04]) / 0.30
    assert candidates(temperature=1.0) == pytest.approx({0: 0.4, 1: 0.1, 2: 0.3, 3: 0.2})
    assert candidates(temperature=0.5) == pytest.approx(dict(enumerate(squared)))
    assert candidates(top_k=2) == pytest.approx({0: 4 / 7, 2: 3 / 7})
    assert candidates(top_k=99) == pytest.approx({0: 0.4, 1: 0.1, 2: 0.3, 3: 0.2})
    assert candidates(top_p=0.6) == pytest.approx({0: 4 / 7, 2: 3 / 7})
    assert candidates(top_p=0.75) == pytest.approx({0: 4 / 9, 2: 3 / 9, 3: 2 / 9})
    assert candidates(top_p=0.01) == pytest.approx({0: 1.0})
    assert candidates(top_p=1.0) == pytest.approx({0: 0.4, 1: 0.1, 2: 0.3, 3: 0.2})
    assert candidates(top_k=3, top_p=0.7) == pytest.approx({0: 4 / 7, 2: 3 / 7}), "top_p of what top_k left"


@few
@given(seeds, st.floats(0.01, 1), st.integers(1, 60) | st.none())
def test_top_p_keeps_the_smallest_set(seed: int, top_p: float, top_k: int | None) -> None:
    """The shortcut before the sort changes nothing."""
    scores = np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 3
    ids, _ = Sampler(CaptionOptions(top_p=top_p, top_k=top_k)).candidates(scores)
    order = np.argsort(-scores, kind="stable")[:top_k]
    whole = np.exp(scores[order].astype(np.float64))
    whole /= whole.sum()
    count = int(np.sum(np.cumsum(whole) - whole < top_p - 1e-12))
    assert abs(len(ids) - count) <= (0 if abs(np.cumsum(whole)[count - 1] - top_p) > 1e-9 else 1)
    if top_p < 1:
        assert ids.tolist() == order[: len(ids)].tolist()


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(CaptionOptions(temperature=1.0, seed=5))
    scores = np.log(np.array([0.4, 0.1, 0.3, 0.2], np.float32))
    drawn = Counter(sampler.choose(scores) for _ in range(4000))
    assert [drawn[token] / 4000 for token in range(4)] == pytest.approx([0.4, 0.1, 0.3, 0.2], abs=0.03)


# ---- scores, streaming, errors ----


@few
@given(seeds, st.sampled_from([{"beams": 1}, {"beams": 4}, {"temperature": 2.0, "seed": 1}]))
def test_log_probability_is_the_sum_over_its_tokens(toy: Any, seed: int, choice: dict[str, Any]) -> None:
    """Also under a temperature, a repetition penalty and a minimal length, which change what is chosen."""
    language = toy(seed=seed)
    options = CaptionOptions(**choice, repetition_penalty=1.5, min_tokens=2)
    (text,) = generate(language.decoder([1.0]), PROMPT, options, StopRule(END, 7))
    ids = [*text.ids, END] if text.finished else list(text.ids)
    total = sum(language.log_probabilities([*PROMPT, *ids[:i]], 1.0)[token] for i, token in enumerate(ids))
    assert text.log_probability == pytest.approx(total, abs=1e-4)
    assert text.tokens == len(ids) and text.mean_log_probability == pytest.approx(total / len(ids), abs=1e-4)


@few
@given(seeds, st.sampled_from([{}, {"beams": 1}, {"temperature": 1.5, "seed": 2}]))
def test_stream_gives_the_same_ids(toy: Any, seed: int, choice: dict[str, Any]) -> None:
    language, stop = toy(seed=seed), StopRule(END, 8)
    streamed = list(stream(language.decoder([1.0]), PROMPT, CaptionOptions(**choice), stop))
    (text,) = generate(language.decoder([1.0]), PROMPT, CaptionOptions(**{"beams": 1} | choice), stop)
    assert tuple(streamed) == text.ids


def test_stream_is_lazy(toy: Any) -> None:
    language = toy(seed=4)
    tokens = stream(language.decoder([1.0]), PROMPT, CaptionOptions(min_tokens=5), StopRule(END, 6))
    assert not language.engine.calls
    next(tokens)
    assert len(language.engine.calls) == 1


def test_stream_refuses_beams_and_batches(toy: Any) -> None:
    with pytest.raises(InputError, match="beam search chooses at the end"):
        stream(toy().decoder([1.0]), PROMPT, CaptionOptions(beams=2), StopRule(END, 3))
    with pytest.raises(InputError, match="streaming is for one picture, got 2"):
        stream(toy().decoder([1.0, 2.0]), PROMPT, CaptionOptions(), StopRule(END, 3))


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_left_to_say_is_an_error(toy: Any, beams: int) -> None:
    options = CaptionOptions(beams=beams, forbidden_ids=tuple(range(8)))
    with pytest.raises(InputError, match="leave no token that may follow"):
        generate(toy().decoder([1.0]), PROMPT, options, StopRule(END, 3))


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_is_an_error(toy: Any, beams: int) -> None:
    class Broken(toy):  # type: ignore[misc]
        def logits(self, ids: Sequence[int], picture: float) -> np.ndarray:
            return np.full(8, np.nan, np.float32)

    with pytest.raises(EngineError, match="the decoder gave NaN in place of logits"):
        generate(Broken().decoder([1.0]), PROMPT, CaptionOptions(beams=beams), StopRule(END, 3))


def test_empty_prompt_and_no_room_are_errors(toy: Any) -> None:
    with pytest.raises(InputError, match="at least one id"):
        generate(toy().decoder([1.0]), [], CaptionOptions(), StopRule(END, 3))
    with pytest.raises(InputError, match="room for at least 1 new token, got 0"):
        StopRule(END, 0)


def test_filters_only_where_asked() -> None:
    assert filters_of(CaptionOptions(), END) == ()
    assert len(filters_of(CaptionOptions(min_tokens=1, repetition_penalty=1.1, forbidden_ids=(3,)), END)) == 3
