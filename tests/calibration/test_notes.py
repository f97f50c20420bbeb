from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut_calibration.notes import Notes, Question, notes_from_json, notes_from_text
from mammut_runtime.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["caption", "captions", "label", "question", "questions", "answer", "candidates", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def read(row: object) -> Notes:
    return notes_from_json(json.dumps(row).encode(), "a.json")


@given(JSON)
def test_whatever_stands_there_gives_notes_or_one_error(row: object) -> None:
    try:
        found = read(row)
    except InputError as problem:
        assert "a.json" in str(problem)
    else:
        assert all(text.strip() for text in (*found.captions, *(each.text for each in found.questions)))


@given(st.binary(max_size=40))
def test_any_bytes_give_notes_or_one_error(data: bytes) -> None:
    for reader in (notes_from_json, notes_from_text):
        try:
            reader(data, "a")
        except InputError as problem:
            assert str(problem).startswith("a: ")


def test_reads_all_known_keys_and_leaves_others_alone() -> None:
    row = {
        "caption": " a  cat ",
        "captions": ["two cats", "a cat"],
        "label": "cat",
        "question": "what?",
        "answer": "a cat",
        "questions": [{"question": "how many?", "candidates": ["one", "two"]}],
        "credit": 7,
    }
    assert read(row) == Notes(
        ("a cat", "two cats"), "cat", (Question("what?", "a cat"), Question("how many?", None, ("one", "two")))
    )
    assert read({"credit": [1]}) == Notes()
    assert notes_from_text("\ufeffa dog\n".encode(), "a.txt") == Notes(("a dog",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected a JSON object"),
        ({"caption": 3}, "caption: expected a text with words, got '3'"),
        ({"captions": "a cat"}, "captions: expected a list of texts"),
        ({"label": " "}, "label: expected a text"),
        ({"questions": ["why?"]}, "questions: expected a list of objects"),
        ({"question": "why?", "candidates": ["a", "a"]}, "candidates: expected a list of different texts"),
        ({"questions": [{"answer": "yes"}]}, "question: expected a text"),
        ({"caption": "a" * 10_001}, "at most 10,000 characters"),
    ],
)
def test_a_known_key_with_something_else_is_an_error(row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(row)
    assert read({"caption": "a cat"}).captions == ("a cat",)  # control


def test_notes_add_up_without_repeats() -> None:
    one, other = Notes(("a", "b"), None, (Question("q"),)), Notes(("b", "c"), "x", (Question("q"),))
    assert one.with_more(other) == Notes(("a", "b", "c"), "x", (Question("q"),))
