"""What comes out: frozen, comparable, and plain with `to_dict` (objects, lists, numbers and texts, ready for JSON).

Scores of generated text are natural logarithms of probabilities, so 0 is certain and -2.3 one in ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mammut_runtime.strict import to_dict


@dataclass(frozen=True)
class Caption:
    """A generated text."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, without prompt, start and end."""
    score: float
    """Mean log-probability per token, the end counted; <= 0, comparable between texts of different length."""
    log_probability: float
    """Sum of the log-probabilities of the tokens, the end included."""
    finished: bool
    """Whether the model ended the text; if not, the length limit cut it."""
    notices: tuple[str, ...] = ()
    """What was done otherwise than asked, in words; usually nothing."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


@dataclass(frozen=True)
class Candidate:
    """A given answer and how likely it is."""

    text: str
    log_likelihood: float
    """Logarithm of the probability that the model answers exactly this and then ends."""
    probability: float
    """Among the given candidates; they sum to 1."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


@dataclass(frozen=True)
class Answer:
    """The answer to a question: generated, or the most likely of given candidates."""

    question: str
    text: str
    ids: tuple[int, ...]
    score: float
    """Mean log-probability per token, the end counted."""
    log_probability: float
    """Sum of the log-probabilities of the tokens, the end included."""
    finished: bool
    """Whether the model ended the answer; always so for a candidate."""
    candidates: tuple[Candidate, ...] = ()
    """The given candidates, most likely first; empty for a free answer."""
    notices: tuple[str, ...] = ()
    """What was done otherwise than asked, in words; usually nothing."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


@dataclass(frozen=True)
class Match:
    """A text and how well it fits a picture."""

    text: str
    cosine: float
    """Of the two embeddings, -1 to 1."""
    probability: float
    """0 to 1. Bundles with similarity "softmax": among all texts and negatives of the call, which sum to 1. "sigmoid":
    each on its own."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


@dataclass(frozen=True)
class Matches:
    """Texts compared with a picture."""

    matches: tuple[Match, ...]
    """Best first."""
    negatives: tuple[Match, ...] = ()
    """The texts that stand for "none of these", best first."""
    notices: tuple[str, ...] = ()
    """What was done otherwise than asked, such as tokens cut from texts that are too long."""

    @property
    def best(self) -> Match | None:
        """The best text, or None where a negative fits better."""
        first = self.matches[0]
        return None if self.negatives and self.negatives[0].cosine > first.cosine else first

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `best`."""
        plain: dict[str, Any] = to_dict(self)
        return {"best": to_dict(self.best), **plain}
