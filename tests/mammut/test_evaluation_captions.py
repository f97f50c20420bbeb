"""BLEU, ROUGE-L, CIDEr-D: golden figures, properties, and a case small enough to work out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut.evaluation.bootstrap import point
from mammut.evaluation.caption_scores import ORDERS, CiderD, bleu, bleu_counts, rouge_l
from mammut.evaluation.caption_words import caption_words
from mammut.evaluation.task_caption import caption_measures

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "metrics" / "caption"
WORDS = st.lists(st.sampled_from(["a", "red", "cat", "sat", "on", "the", "mat"]), min_size=1, max_size=9)


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/data/metrics/caption, which is no part of a clone")
def test_golden_corpus() -> None:
    written, *references = [(GOLDEN / name).read_text().splitlines() for name in ("hyp.txt", "ref1.txt", "ref2.txt")]
    measures, _ = caption_measures(written, list(zip(*references, strict=True)))
    found = {each.name: point(each.statistic, each.items) for each in measures}
    expected = {"BLEU-1": 0.55, "BLEU-2": 0.428174, "BLEU-3": 0.284043, "BLEU-4": 0.201143, "ROUGE-L": 0.522104,
                "CIDEr-D": 1.242192}  # fmt: skip
    assert found == pytest.approx(expected, abs=5e-7)


def test_cider_d_worked_by_hand() -> None:
    """Two pictures: every n-gram of a reference is in one of two, so all weigh log 2, which cancels in the cosine."""
    cider = CiderD([[["red", "cat"]], [["blue", "dog"]]])
    assert cider.score(0, ["red", "cat"]) == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)
    assert cider.score(0, ["red", "dog"]) == pytest.approx(10 * 0.5 / 4)
    # one 2-gram more than the reference: exp(-1 / (2 * 36)); three words, two of them right
    longer = 10 * math.exp(-1 / 72) * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4
    assert cider.score(0, ["red", "cat", "sat"]) == pytest.approx(longer)
    assert cider.score(1, ["red", "cat"]) == 0


def test_cider_d_clips_repetitions() -> None:
    cider = CiderD([[["red", "cat"]], [["blue", "dog"]]])
    assert cider.score(0, ["red", "red", "red"]) < cider.score(0, ["red"])


def test_cider_d_of_a_single_picture_is_zero() -> None:
    assert CiderD([[["red", "cat"]]]).score(0, ["red", "cat"]) == 0


@given(WORDS, st.lists(WORDS, max_size=3))
def test_an_identical_caption_is_perfect(words: list[str], others: list[list[str]]) -> None:
    counts = bleu_counts(words, [words, *others])
    for order in range(1, min(ORDERS, len(words)) + 1):
        assert float(bleu(counts, order)) == pytest.approx(1, abs=1e-6)
    assert rouge_l(words, [words, *others]) == pytest.approx(1)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_scores_are_between_0_and_1(words: list[str], references: list[list[str]]) -> None:
    assert 0 <= rouge_l(words, references) <= 1 + 1e-12
    assert all(0 <= float(bleu(bleu_counts(words, references), order)) <= 1 for order in range(1, 5))


def test_bleu_is_over_the_corpus_not_a_mean() -> None:
    first, second = bleu_counts(["a"], [["a"]]), bleu_counts(["b", "c", "d"], [["x", "y", "z"]])
    assert float(bleu(first + second, 1)) == pytest.approx(1 / 4)
    assert (float(bleu(first, 1)) + float(bleu(second, 1))) / 2 == pytest.approx(0.5)  # control: the mean differs


def test_bleu_of_short_captions_is_lowered_and_the_closest_reference_counts() -> None:
    short = float(bleu(bleu_counts(["a", "b"], [["a", "b", "c", "d"]]), 1))
    assert short == pytest.approx(math.exp(1 - 4 / 2))
    assert float(bleu(bleu_counts(["a", "b"], [["a", "b", "c", "d"], ["a", "b"]]), 1)) == pytest.approx(1)


def test_rouge_l_follows_order() -> None:
    assert rouge_l(["a", "b", "c"], [["a", "x", "c"]]) == pytest.approx(2 / 3)
    assert rouge_l(["c", "b", "a"], [["a", "b", "c"]]) == pytest.approx(1 / 3)


def test_an_empty_caption_scores_nothing() -> None:
    assert rouge_l([], [["a"]]) == 0
    assert float(bleu(bleu_counts([], [["a"]]), 1)) == pytest.approx(0, abs=1e-5)
    assert CiderD([[["red"]], [["blue"]]]).score(0, []) == 0


def test_weights_of_the_bootstrap_are_repetitions() -> None:
    written, references = ["a red cat", "a dog", "two cats sat"], [("a red cat",), ("a blue dog",), ("two dogs sat",)]
    once, _ = caption_measures(written, references)
    drawn = [0, 2, 2]
    again, _ = caption_measures([written[i] for i in drawn], [references[i] for i in drawn])
    for one, other in list(zip(once, again, strict=True))[:5]:  # CIDEr-D counts rarity anew
        assert float(one.statistic(np.array([[1.0, 0.0, 2.0]]))[0]) == pytest.approx(point(other.statistic, 3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog.", "a dog"),
        ("It's a close-up!", "it 's a close-up"),
        ("He isn't here; can't see", "he is n't here ca n't see"),
        ("Two men, one (old).", "two men one -lrb- old -rrb-"),
        ("at 10:30 for 3,000 people", "at 10:30 for 3,000 people"),
        ("the dogs' bowl", "the dogs bowl"),
        ('a sign saying "stop"...', "a sign saying stop"),
        ("U.S. flag -- Mr. Smith’s", "u.s. flag mr. smith 's"),
        ("cannot", "can not"),
        ("ein Café №5", "ein café № 5"),
        ("", ""),
    ],
)
def test_words_of_a_caption(text: str, words: str) -> None:
    assert " ".join(caption_words(text)) == words
