"""Likelihoods of given answers against adding up log-probabilities one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime import likelihood
from mammut_runtime.errors import InputError
from mammut_runtime.likelihood import score_continuations

START, END = 0, 1
PROMPT = [START, 3, 2]
few = settings(max_examples=40, deadline=None)
texts = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=9)


def one(toy: Any, picture: float, ids: list[int]) -> float:
    whole = [*ids, END]
    return sum(toy.log_probabilities([*PROMPT, *whole[:i]], picture)[token] for i, token in enumerate(whole))


@few
@given(st.integers(0, 10**6), texts, st.booleans(), st.integers(1, 4))
def test_sum_of_log_probabilities(toy: Any, seed: int, ids: list[list[int]], normalise: bool, at_once: int) -> None:
    language, pictures = toy(seed=seed), [0.5, -1.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "CANDIDATES_AT_ONCE", at_once)
        found = score_continuations(language.decoder(pictures), PROMPT, ids, END, normalise=normalise)
    expected = np.array(
        [[one(language, p, each) / (len(each) + 1 if normalise else 1) for each in ids] for p in pictures]
    )
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_all_texts_together_have_probability_one(toy: Any) -> None:
    """Every text of up to 3 tokens that ends, and all that are longer, cover everything the model can say."""
    language = toy(vocabulary=4, seed=3)
    open_texts: list[list[int]] = [[]]
    covered = math.exp(language.log_probabilities(PROMPT, 1.0)[END])
    for _ in range(3):
        open_texts = [[*ids, token] for ids in open_texts for token in (0, 2, 3)]
        covered += np.exp(score_continuations(language.decoder([1.0]), PROMPT, open_texts, END)).sum()
    left = sum(
        math.exp(sum(language.log_probabilities([*PROMPT, *ids[:i]], 1.0)[t] for i, t in enumerate(ids)))
        * (1 - math.exp(language.log_probabilities([*PROMPT, *ids], 1.0)[END]))
        for ids in open_texts
    )
    assert covered + left == pytest.approx(1, abs=1e-5)


def test_the_prompt_is_read_once_and_ended_candidates_are_dropped(toy: Any) -> None:
    language = toy(seed=3)
    score_continuations(language.decoder([1.0]), PROMPT, [[2], [2, 3, 4], [5, 6]], END)
    assert [call["ids"].shape for call in language.engine.calls] == [(1, 1, 3), (1, 3, 1), (1, 2, 1), (1, 1, 1)]


@pytest.mark.parametrize(("prompt", "ids"), [([], [[1]]), ([0], []), ([0], [[2], []])])
def test_nothing_to_score_is_an_error(toy: Any, prompt: list[int], ids: list[list[int]]) -> None:
    with pytest.raises(InputError, match="scoring needs a prompt and one or more candidates"):
        score_continuations(toy().decoder([1.0]), prompt, ids, END)
