"""The public generate() rules, on cases worked out by hand and against a slow restatement with the identical groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.generation_openmammut import OpenMammutOptions, generate, sampling_probs

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

PAD, A, B, C, START, END = range(6)


def table(rows: dict[tuple[int, ...], dict[int, float]], default: float = -50.0) -> Callable[[Ids], Logits]:
    """Logits by the ids so far; what is not said is `default`."""

    def next_logits(ids: Ids) -> Logits:
        logits = np.full((len(ids), 6), default, np.float32)
        for out, prefix in zip(logits, ids.tolist(), strict=True):
            for token, value in rows.get(tuple(prefix), {END: 0.0}).items():
                out[token] = value
        return logits

    return next_logits


def options(**changes: object) -> OpenMammutOptions:
    values = {
        "sot_token_id": START,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "seq_len": 8,
        "min_seq_len": 1,
        "generation_type": "top_k",
    }
    return OpenMammutOptions(**(values | changes))  # type: ignore[arg-type]


def beams(n: int, groups: int = 1, **changes: object) -> OpenMammutOptions:
    return options(generation_type="beam_search", num_beams=n * groups, num_beam_groups=groups, **changes)


# ---- greedy (top_k with 1) ----

CHAIN = {(START,): {A: 1.0}, (START, A): {B: 1.0}, (START, A, B): {END: 1.0, C: 0.5}}


def test_greedy_keeps_start_and_end() -> None:
    assert generate(table(CHAIN), 1, options()).tolist() == [[START, A, B, END]]


def test_end_is_blocked_below_min_seq_len() -> None:
    """With 4, the end may not follow three ids: C is next best. With 3 (control) it may."""
    longer = CHAIN | {(START, A, B, C): {END: 1.0}}
    assert generate(table(longer), 1, options(min_seq_len=4)).tolist() == [[START, A, B, C, END]]
    assert generate(table(longer), 1, options(min_seq_len=3)).tolist() == [[START, A, B, END]]


def test_end_is_forced_at_seq_len() -> None:
    assert generate(table(CHAIN), 1, options(seq_len=3)).tolist() == [[START, A, END]]


def test_a_pad_ends_a_caption() -> None:
    rows = {(START,): {A: 1.0}, (START, A): {PAD: 1.0}}
    assert generate(table(rows), 1, options()).tolist() == [[START, A, PAD]]
    assert generate(table(rows), 1, options(pad_token_id=C)).tolist() == [[START, A, PAD, END]]


def test_fixed_output_length_appends_pads() -> None:
    expected = [[START, A, B, END, C, C, C, C]]
    assert generate(table(CHAIN), 1, options(fixed_output_length=True, pad_token_id=C)).tolist() == expected


def test_prompt_counts() -> None:
    text = np.array([[START, A]], np.int64)
    assert generate(table(CHAIN), 1, options(), text).tolist() == [[START, A, B, END]]
    assert generate(table(CHAIN), 1, options(seq_len=3), text).tolist() == [[START, A, END]]
    assert generate(table(CHAIN), 1, options(), np.array([START, A, END])).tolist() == [[START, A, END]]


def test_rows_of_a_batch_end_on_their_own() -> None:
    """The public code cannot do this at all; a row that is done gets pads."""
    text = np.array([[START, A], [START, C]], np.int64)
    rows = CHAIN | {(START, C): {END: 1.0}}
    assert generate(table(rows), 2, options(), text).tolist() == [[START, A, B, END], [START, C, END, PAD]]


def test_repetition_penalty_on_raw_logits() -> None:
    """Positive logits are divided, negative ones multiplied; the start counts as an id already there."""
    rows = {(START,): {A: 3.0, B: 2.9}, (START, A): {A: 3.0, B: 2.0, END: 1.9}, (START, A, B): {END: 9.0}}
    assert generate(table(rows), 1, options(repetition_penalty=2.0)).tolist() == [[START, A, B, END]]
    assert generate(table(rows), 1, options(seq_len=4)).tolist() == [[START, A, A, END]]
    negative = sampling_probs(
        np.array([[-1.0, -1.5]], np.float32),
        np.array([[0]]),
        top_k=1,
        repetition_penalty=2.0,
        eos_token_id=1,
        min_seq_len=0,
    )
    assert negative.tolist() == [[0.0, 1.0]]


def test_window_of_the_last_ids() -> None:
    """Beyond max_seq_len the oldest ids fall out, and then the end is not forced any more."""
    seen: list[list[int]] = []

    def next_logits(ids: Ids) -> Logits:
        seen.append(ids[0].tolist())
        return np.eye(6, dtype=np.float32)[[A]]

    ids = generate(next_logits, 1, options(seq_len=6, max_seq_len=3))
    assert ids.tolist() == [[START, A, A, A, A, A]] and seen[-1] == [A, A, A]


# ---- sampling probabilities ----


def probs(**spec: object) -> list[float]:
    logits = np.log(np.array([[8.0, 4.0, 2.0, 1.0, 1.0]], np.float32))
    values = {"min_seq_len": 0, "eos_token_id": 0} | spec
    return sampling_probs(logits, np.array([[4]]), **values)[0].tolist()  # type: ignore[arg-type]


def test_top_k_then_temperature() -> None:
    assert probs(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    assert probs(top_k=2, temperature=0.5) == pytest.approx([0.8, 0.2, 0, 0, 0])
    assert probs(top_k=4) == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.0625]), "ties at the edge stay"
    assert probs(top_k=99) == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.0625])


def test_top_p_looks_at_probabilities_without_temperature() -> None:
    assert probs(generation_type="top_p", top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    assert probs(generation_type="top_p", top_p=0.7, temperature=2.0) == pytest.approx(
        [0.586, 0.414, 0, 0, 0], abs=1e-3
    )
    assert probs(generation_type="top_p", top_p=0.1) == pytest.approx([1, 0, 0, 0, 0])
    assert probs(generation_type="top_p", top_p=0.0) == pytest.approx([1, 0, 0, 0, 0]), "one token always stays"


def test_min_length_in_probabilities() -> None:
    assert probs(top_k=1, min_seq_len=2) == pytest.approx([0, 1, 0, 0, 0])
    assert probs(top_k=1, min_seq_len=1) == pytest.approx([1, 0, 0, 0, 0])


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = np.log(np.array([1.0, 5.0, 3.0, 1.0, 1e-9, 1e-9], np.float32))
    setting = options(top_k=3, seq_len=1000, max_seq_len=2000, seed=3, pad_token_id=99, eos_token_id=5)

    def run(seed: int) -> list[int]:
        return generate(lambda ids: logits[None], 1, options(**vars(setting) | {"seed": seed}))[0].tolist()

    first = run(3)
    assert first == run(3) and first != run(4)
    share = np.bincount(first[1:-1], minlength=6) / 998
    assert share[:4] == pytest.approx([0.1, 0.5, 0.3, 0.1], abs=0.06), "a tie at the edge of top-3 stays"


# ---- beam search ----


def test_sums_of_raw_logits_decide() -> None:
    """A B scores (2+2)/3 ids, END after A (2+1)/3; log-probabilities would see the same, lengths would not."""
    rows = {
        (START,): {A: 2.0, B: 1.0},
        (START, A): {END: 1.0, B: 0.9},
        (START, A, B): {END: 2.0},
        (START, B): {END: 4.0},
    }
    # closed: [B] (1+4)/3 = 1.67; [A] (2+1)/3 = 1; [A, B] (2+0.9+2)/4 = 1.2
    assert generate(table(rows), 1, beams(2)).tolist() == [[START, B, END]]


def test_end_of_rank_n_or_worse_is_dropped() -> None:
    """2 beams. Second step: A END 5, A C 4.5, B END 4, B C 3. The first end closes, the second (third in rank) must
    not: with two closed captions the search would be over at the next step, where nothing is above 3.9 / 4."""
    rows = {
        (START,): {A: 2.0, B: 1.0},
        (START, A): {END: 3.0, C: 2.5},
        (START, B): {END: 3.0, C: 2.0},
        (START, A, C): {A: -0.6, B: -0.7},
        (START, B, C): {A: -9.0},
        (START, A, C, A): {END: 10.0, B: -9.0},
        (START, A, C, B): {B: -9.0},
    }
    assert generate(table(rows), 1, beams(2)).tolist() == [[START, A, C, A, END]]
    rows[(START, A)][C] = 1.5  # control: now the ends are first and second, both close, and that is the end
    assert generate(table(rows), 1, beams(2)).tolist() == [[START, A, END]]


def test_open_beams_compete_at_the_limit_without_an_end() -> None:
    endless = {prefix: {A: 1.0, B: 0.5} for n in range(5) for prefix in _prefixes(n)}
    assert generate(table(endless), 1, beams(2, seq_len=4)).tolist() == [[START, A, A, A]]


def _prefixes(length: int) -> list[tuple[int, ...]]:
    return [(START, *rest) for rest in itertools.product((A, B), repeat=length)]


def test_output_is_as_wide_as_the_longest_and_padded() -> None:
    """Two pictures in one batch, told apart by their rows: rows 0, 1 belong to the first, 2, 3 to the second."""

    def next_logits(ids: Ids) -> Logits:
        assert len(ids) == 4
        logits = np.full((4, 6), -50.0, np.float32)
        logits[:2, END] = 1.0
        logits[2:, END if ids.shape[1] >= 3 else A] = 1.0
        logits[:, B] = -1.0
        return logits

    found = generate(next_logits, 2, beams(2, pad_token_id=C))
    assert found.tolist() == [[START, END, C, C], [START, A, A, END]]
    fixed = generate(next_logits, 2, beams(2, pad_token_id=C, fixed_output_length=True), model_pad_id=PAD)
    assert fixed.tolist() == [[START, END, C, C, PAD, PAD, PAD, PAD], [START, A, A, END, PAD, PAD, PAD, PAD]]


def test_beam_search_ignores_text() -> None:
    text = np.array([[START, C]], np.int64)
    assert generate(table(CHAIN), 1, beams(2), text).tolist() == generate(table(CHAIN), 1, beams(2)).tolist()


def test_beyond_the_context_length_is_an_error() -> None:
    endless = {prefix: {A: 1.0, B: 0.5} for n in range(6) for prefix in _prefixes(n)}
    with pytest.raises(InputError, match="beam search reached 4 ids, the decoder takes 3"):
        generate(table(endless), 1, beams(2, seq_len=6, max_seq_len=3))
    assert generate(table(endless), 1, beams(2, seq_len=4, max_seq_len=3)).shape == (1, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_beam_search_against_a_slow_restatement(
    seed: int, n: int, groups: int, pictures: int, min_seq_len: int, fixed: bool
) -> None:
    """All groups, all rows, full sorts, Python numbers: the rules as openmammut's public code words them."""
    if n * groups < 2:
        return
    vocabulary, source = 12, np.random.default_rng(seed)
    end, pad = (int(each) for each in source.integers(0, vocabulary, 2))
    setting = OpenMammutOptions(
        num_beams=n * groups,
        num_beam_groups=groups,
        seq_len=10,
        min_seq_len=min_seq_len,
        repetition_penalty=float(source.choice([1.0, 1.3])),
        sot_token_id=1,
        eos_token_id=end,
        pad_token_id=pad,
        fixed_output_length=fixed,
    )
    weights = source.standard_normal((vocabulary, 16)), source.standard_normal((16, vocabulary)) * 2
    bonus = float(source.choice([0.0, 4.0]))

    def logits_of(ids: tuple[int, ...], picture: int) -> Logits:
        mixed = (weights[0][list(ids)] * np.cos(np.arange(len(ids)) + picture)[:, None]).sum(axis=0)
        logits = np.tanh(mixed) @ weights[1]
        logits[end] += bonus
        return logits.astype(np.float32)

    def next_logits(ids: Ids) -> Logits:
        rows = len(ids) // pictures
        return np.array([logits_of(tuple(row), r // rows) for r, row in enumerate(ids.tolist())])

    found = generate(next_logits, pictures, setting, model_pad_id=3)
    slow = [_slow(lambda ids, p=picture: logits_of(ids, p), setting) for picture in range(pictures)]
    width = min(max(map(len, slow)) + 1, 10)
    for row, ids in zip(found.tolist(), slow, strict=True):
        closed = [*ids, end] if len(ids) < width else ids
        assert row[: len(closed)] == closed
        assert row[len(closed) :] == [pad] * (width - len(closed)) + [3] * (len(row) - width)
    assert found.shape[1] == (10 if fixed else width)


def _slow(logits_of: Callable[[tuple[int, ...]], Logits], setting: OpenMammutOptions) -> list[int]:
    """One picture: ids with the start, without the end."""
    start, end, _ = setting.special
    n = setting.rows_per_picture
    groups = []
    for _ in range(setting.num_beam_groups):
        beams = [((start,), np.float32(0.0))] + [((start,), np.float32(-1e9))] * (n - 1)
        closed: list[tuple[float, tuple[int, ...]]] = []
        done = False
        while not done and len(beams[0][0]) < setting.seq_len:
            candidates = []
            for index, (ids, total) in enumerate(beams):
                scores = logits_of(ids).copy()
                if len(ids) < setting.min_seq_len:
                    scores[end] = -np.inf
                for token in set(ids):
                    penalty = np.float32(setting.repetition_penalty)
                    scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
                candidates += [(-float(np.float32(total + s)), index, t) for t, s in enumerate(scores)]
            candidates = sorted(candidates)[: 2 * n]
            following = []
            for rank, (negative, index, token) in enumerate(candidates):
                ids = beams[index][0]
                if token != end:
                    following.append(((*ids, token), np.float32(-negative)))
                elif rank < n:
                    closed.append((-negative / (len(ids) + 1), ids))
                    closed = sorted(closed, key=lambda each: -each[0])[:n]
                if len(following) == n:
                    break
            length = len(beams[0][0])
            done = len(closed) == n and closed[-1][0] >= -candidates[0][0] / (length + 1)
            beams = following
        if not done:
            closed += [(float(total) / len(ids), ids) for ids, total in beams]
        groups.append(max(closed, key=lambda each: each[0]))
    return list(max(groups, key=lambda each: each[0])[1])


# ---- options ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_type": "nucleus"}, "generation_type must be one of beam_search, top_k, top_p, got 'nucleus'"),
        ({"seq_len": 5, "min_seq_len": 5}, "seq_len must be larger than min_seq_len, got 5 and 5"),
        ({"min_seq_len": -1}, "min_seq_len must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"num_beams": 1}, "num_beams must be at least 2, got 1"),
        ({"num_beam_groups": 4}, r"num_beam_groups must be a divisor of num_beams \(6\), got 4"),
    ],
)
def test_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OpenMammutOptions(**changes)  # type: ignore[arg-type]


def test_defaults_and_ids() -> None:
    setting = OpenMammutOptions()
    assert setting.special == (49406, 49407, 0) and setting.rows_per_picture == 2
    assert setting.with_ids(1, 2, 3).special == (1, 2, 3)
    assert OpenMammutOptions(eos_token_id=9).with_ids(1, 2, 3).special == (1, 9, 3)


@pytest.mark.parametrize("text", [np.zeros((2, 3), np.int64), np.zeros((1, 0), np.int64), [[1, 2], [3]]])
def test_text_of_another_shape_is_refused(text: Ids) -> None:
    with pytest.raises(InputError, match="text must be"):
        generate(table(CHAIN), 1, options(), text)
    with pytest.raises(InputError, match="at least 1 picture"):
        generate(table(CHAIN), 0, options())
