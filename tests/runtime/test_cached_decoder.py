"""The cache follows its sequences: expanded, reordered, dropped, forked."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_any_sequence_of_operations_equals_no_cache(toy: Any, seed: int) -> None:
    source = np.random.default_rng(seed)
    language, pictures = toy(seed=seed), [0.5, -1.0, 2.0]
    decoder = language.decoder(pictures)
    texts: list[list[list[int]]] = [[[]] for _ in pictures]
    for _ in range(8):
        action = source.choice(["feed", "select", "keep"], p=[0.5, 0.35, 0.15])
        sequences = len(texts[0])
        if action == "feed":
            new = source.integers(0, 8, (len(pictures), sequences, int(source.integers(1, 4))))
            logits = decoder.feed(new)
            texts = [[[*k, *n] for k, n in zip(p, m, strict=True)] for p, m in zip(texts, new.tolist(), strict=True)]
            expected = [[language.logits(k, number) for k in p] for p, number in zip(texts, pictures, strict=True)]
            np.testing.assert_allclose(logits, expected, atol=1e-5)
        elif action == "select":
            parents = source.integers(0, sequences, (len(pictures), int(source.integers(1, 5))))
            decoder.select(parents)
            texts = [[p[k] for k in row] for p, row in zip(texts, parents.tolist(), strict=True)]
        else:
            kept = np.flatnonzero(source.random(len(pictures)) < 0.7)
            kept = kept if len(kept) else np.array([0])
            decoder.keep(kept)
            texts, pictures = [texts[i] for i in kept], [pictures[i] for i in kept]
        assert decoder.pictures == len(pictures) and decoder.sequences == len(texts[0])
        assert decoder.length == len(texts[0][0])


def test_fork_goes_its_own_way(toy: Any) -> None:
    decoder = toy().decoder([1.0])
    decoder.feed(np.array([[[0, 2]]]))
    other = decoder.fork()
    other.select(np.zeros((1, 3), np.int64))
    other.feed(np.array([[[3], [4], [5]]]))
    assert (decoder.sequences, decoder.length) == (1, 2) and (other.sequences, other.length) == (3, 3)
    np.testing.assert_array_equal(decoder.feed(np.array([[[3]]]))[0, 0], toy().logits([0, 2, 3], 1.0))


def test_selecting_the_same_order_copies_nothing(toy: Any) -> None:
    decoder = toy().decoder([1.0, 2.0])
    decoder.feed(np.zeros((2, 1, 1), np.int64))
    decoder.select(np.array([[0, 0], [0, 0]]))
    before = decoder._past["k.0"]
    decoder.select(np.array([[0, 1], [0, 1]]))
    assert decoder._past["k.0"] is before
    decoder.select(np.array([[0, 1], [1, 0]]))
    assert decoder._past["k.0"] is not before
