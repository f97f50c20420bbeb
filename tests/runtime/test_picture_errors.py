"""The three things said about unusable files: each names the file, what is wrong, and what to do."""

from __future__ import annotations

import pytest

from mammut_runtime.errors import InputError
from mammut_runtime.picture_errors import cut_short, damaged, unsupported


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (cut_short("a.png", "no end"), "a.png: the picture is cut short (no end); copy or download the file again"),
        (damaged("a.png", "two heads"), "a.png: two heads; the file is damaged, copy or download it again"),
        (unsupported("a.png", "a thing"), "a.png: a thing cannot be read; save the picture as an ordinary PNG or JPEG"),
    ],
)
def test_messages_say_what_and_what_next(error: InputError, message: str) -> None:
    assert str(error) == message
