"""VQAv2's published rules, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut.evaluation.vqa_accuracy import CONTRACTIONS, exact_match, normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("the cat", "cat"),
        ("a an the", ""),
        ("Two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("it's", "it's"),
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("no.", "no"),
        ("u.s.a", "usa"),
        ("t-shirt", "t shirt"),
        ("5:30", "5:30"),
        ("  red   car ", "red car"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_normalised(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_contractions_lack_one_apostrophe() -> None:
    assert CONTRACTIONS["youre"] == "you're"
    assert CONTRACTIONS["y'allll"] == "y'all'll"
    assert "shed" not in CONTRACTIONS  # a word of its own; the official list leaves it alone


@pytest.mark.parametrize(("people", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_how_many_agree(people: int, expected: float) -> None:
    answers = ["red"] * people + [f"other {index}" for index in range(10 - people)]
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


def test_answers_are_made_alike_unless_all_are_the_same() -> None:
    assert vqa_accuracy("The Red.", ["red"] * 9 + ["blue"]) == 1
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert vqa_accuracy("The Red.", ["red"] * 10) == 0  # the official rule, odd as it is
    assert vqa_accuracy("red\n", ["red"] * 10) == 1


def test_exact_match_ignores_capitals_and_space_only() -> None:
    assert exact_match(" Playing  Guitar", "playing guitar") == 1
    assert exact_match("guitar", "playing guitar") == 0
    assert exact_match("a man", "man") == 0


@given(st.text(max_size=30), st.lists(st.text(max_size=10), min_size=10, max_size=10))
def test_any_text_has_an_accuracy(answer: str, people: list[str]) -> None:
    assert 0 <= vqa_accuracy(answer, people) <= 1
    assert 0 <= vqa_accuracy(people[0], people) <= 1
