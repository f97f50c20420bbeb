"""Options out of range are refused by name; combinations that contradict each other too."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mammut_runtime.caption_options import DEFAULT_BEAMS, CaptionOptions
from mammut_runtime.errors import InputError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ({"min_tokens": -1}, "min_tokens must be a whole number of at least 0, got -1"),
        ({"min_tokens": 5, "max_tokens": 5}, "min_tokens must be below max_tokens, got 5 and 5"),
        ({"beams": 0}, "beams must be a whole number, 1 to 64, got 0"),
        ({"beams": 65}, "beams must be a whole number, 1 to 64, got 65"),
        ({"beams": True}, "beams must be"),
        ({"length_penalty": -0.1}, "length_penalty must be from 0 to 10"),
        ({"length_penalty": math.nan}, "length_penalty must be from 0 to 10, got nan"),
        ({"temperature": 0.0}, "temperature must be above 0 and at most 100, got 0.0"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"forbidden_ids": (-1,)}, "forbidden_ids must be token ids"),
        ({"beams": 2, "temperature": 0.5}, "beams=2 and sampling .* exclude each other"),
        ({"temperature": "hot"}, "temperature must be .* got hot"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CaptionOptions(**changes)


def test_edges_are_allowed() -> None:
    CaptionOptions(max_tokens=1, beams=64, length_penalty=10, seed=0)
    CaptionOptions(beams=1, temperature=100, top_k=1, top_p=1)


def test_width() -> None:
    assert CaptionOptions().width == DEFAULT_BEAMS and not CaptionOptions().sampled
    assert CaptionOptions(beams=5).width == 5
    assert CaptionOptions(top_p=0.5).width == 1 and CaptionOptions(top_p=0.5).sampled
    assert not CaptionOptions(seed=4).sampled
