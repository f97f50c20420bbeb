"""How a text is to be generated: what a user can set, checked, in one place.

What the options do is generation.py's; which prompt and length a bundle wants is in its manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mammut_runtime.errors import InputError

MAX_BEAMS = 64
DEFAULT_BEAMS = 3


@dataclass(frozen=True)
class CaptionOptions:
    """How a text is generated. The defaults suit captions; raises InputError for values out of range.

    Beam search unless `beams` is 1 (greedy: always the most probable token) or one of temperature, top_k, top_p is
    given (sampling).
    """

    max_tokens: int | None = None
    """Most tokens to generate, the end counted. None: what the bundle was made for. Cut to what the decoder holds."""
    min_tokens: int = 0
    """Tokens before which the text may not end."""
    beams: int | None = None
    """Sequences searched side by side. None: 3, or 1 when sampling and when streaming."""
    length_penalty: float = 1.0
    """Beam search ranks by sum of log-probabilities / tokens ** length_penalty. 0 prefers short texts, 1 (the mean) is
    neutral, more prefers long ones."""
    temperature: float | None = None
    """Sampling: divides the log-probabilities before top_k and top_p. Below 1 more careful, above 1 more varied."""
    top_k: int | None = None
    """Sampling: only the k most probable tokens."""
    top_p: float | None = None
    """Sampling: only the fewest most probable tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Multiplies the log-probability of tokens already generated; above 1 they become less likely. The prompt's tokens
    do not count."""
    forbidden_ids: tuple[int, ...] = ()
    """Token ids that are never generated."""
    seed: int | None = None
    """Sampling: the same seed gives the same text for a picture, alone or in a batch. None: different every time."""
    prompt: str | None = None
    """Text that the caption continues; it is not part of the result. None: the bundle's own."""

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, lambda v: _whole(v) and v >= 1, "a whole number of at least 1")
        _check("min_tokens", self.min_tokens, lambda v: _whole(v) and v >= 0, "a whole number of at least 0")
        _check("beams", self.beams, lambda v: _whole(v) and 1 <= v <= MAX_BEAMS, f"a whole number, 1 to {MAX_BEAMS}")
        _check("length_penalty", self.length_penalty, lambda v: 0 <= v <= 10, "from 0 to 10")
        _check("temperature", self.temperature, lambda v: 0 < v <= 100, "above 0 and at most 100")
        _check("top_k", self.top_k, lambda v: _whole(v) and v >= 1, "a whole number of at least 1")
        _check("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _check("repetition_penalty", self.repetition_penalty, lambda v: 0 < v <= 100, "above 0 and at most 100")
        _check("seed", self.seed, lambda v: _whole(v) and 0 <= v < 2**63, "a whole number of at least 0")
        if any(not _whole(each) or each < 0 for each in self.forbidden_ids):
            raise InputError(f"forbidden_ids must be token ids, whole numbers of at least 0, got {self.forbidden_ids}")
        if self.max_tokens is not None and self.min_tokens >= self.max_tokens:
            raise InputError(f"min_tokens must be below max_tokens, got {self.min_tokens} and {self.max_tokens}")
        if self.sampled and (self.beams or 1) > 1:
            raise InputError(
                f"beams={self.beams} and sampling (temperature, top_k, top_p) exclude each other; give one of them"
            )

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return not (self.temperature is None and self.top_k is None and self.top_p is None)

    @property
    def width(self) -> int:
        """K, sequences per picture."""
        return self.beams or (1 if self.sampled else DEFAULT_BEAMS)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: float | None, right: Callable[[float], bool], expected: str) -> None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and right(value)):
        raise InputError(f"{name} must be {expected}, got {value}")
