"""What the user's data say about a picture: captions, a class name, questions. Read from JSON or plain text.

Keys that are looked at: "caption", "captions", "label", "question" with "answer" and "candidates", and "questions", a
list of such objects. Data sets hold all sorts of other keys; they are left alone. A key that is known and holds
something else than it should is an error: to go on without the texts that the user meant to give would be a quiet loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mammut_runtime.errors import InputError
from mammut_runtime.strict import parse_json

MAX_NOTE_BYTES = 1_000_000
"""Of one picture's JSON or text."""
MAX_TEXT_CHARS = 10_000


@dataclass(frozen=True)
class Question:
    """Something to ask about a picture."""

    text: str
    answer: str | None = None
    """The right answer, where it is known. Agreement of two models does not need it."""
    candidates: tuple[str, ...] = ()
    """Answers to choose from; empty: the answer is generated."""


@dataclass(frozen=True)
class Notes:
    """All that is said about one picture."""

    captions: tuple[str, ...] = ()
    label: str | None = None
    """Name of the class of what is shown."""
    questions: tuple[Question, ...] = ()

    def with_more(self, other: Notes) -> Notes:
        """Both together, each text once."""
        return Notes(
            tuple(dict.fromkeys((*self.captions, *other.captions))),
            self.label or other.label,
            tuple(dict.fromkeys((*self.questions, *other.questions))),
        )


def notes_from_json(data: bytes, where: str) -> Notes:
    """Raises InputError for what is not a JSON object, or holds a known key with another type."""
    row = parse_json(data, where, InputError, MAX_NOTE_BYTES)
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with keys such as caption or label, got {str(row)[:40]!r}")
    return notes_from_row(row, where)


def notes_from_row(row: Mapping[str, Any], where: str) -> Notes:
    """See notes_from_json."""
    captions = row.get("captions", [])
    if not isinstance(captions, list):
        raise InputError(f"{where}: captions: expected a list of texts, got {type(captions).__name__}")
    if "caption" in row:
        captions = [row["caption"], *captions]
    questions = row.get("questions", [])
    if not isinstance(questions, list) or not all(isinstance(each, dict) for each in questions):
        raise InputError(f'{where}: questions: expected a list of objects such as {{"question": "what is this?"}}')
    if "question" in row:
        questions = [row, *questions]
    return Notes(
        tuple(dict.fromkeys(_text(each, f"{where}: caption") for each in captions)),
        _text(row["label"], f"{where}: label") if "label" in row else None,
        tuple(_question(each, where) for each in questions),
    )


def notes_from_text(data: bytes, where: str) -> Notes:
    """A caption from a plain text file. Raises InputError for what is not UTF-8, empty, or too long."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(f"{where}: expected UTF-8 text, a caption ({problem.reason})") from problem
    return Notes((_text(text, where),))


def _question(row: Mapping[str, Any], where: str) -> Question:
    candidates = row.get("candidates", [])
    if not isinstance(candidates, list) or len(set(map(str, candidates))) != len(candidates):
        raise InputError(f"{where}: candidates: expected a list of different texts")
    return Question(
        _text(row.get("question"), f"{where}: question"),
        _text(row["answer"], f"{where}: answer") if "answer" in row else None,
        tuple(_text(each, f"{where}: candidate") for each in candidates),
    )


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected a text with words, got {str(value)[:40]!r}")
    if len(value) > MAX_TEXT_CHARS:
        raise InputError(f"{where}: expected a text of at most {MAX_TEXT_CHARS:,} characters, got {len(value):,}")
    return " ".join(value.split())
