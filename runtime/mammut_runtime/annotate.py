"""Writes words onto pictures: a caption, an answer or scores in a band under a picture, or over its lower part.

Drawn with OpenCV alone. OpenCV 5 brings a font for Latin, Greek, Cyrillic and Chinese; OpenCV 4 draws ASCII only. What
the font lacks is replaced (see `drawable`), never a reason to fail: the exact words are in the result, not in pixels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError

FONT = cv2.FONT_HERSHEY_SIMPLEX
MIN_WIDTH = 320
"""Pixels. Narrower pictures are enlarged by a whole factor, so that words have room."""
MAX_LINES = 12
"""More lines than this end in "...": a runaway text must not make a runaway picture."""
BAND_RGB = (24, 24, 24)
TEXT_RGB = (240, 240, 240)
OVER_OPACITY = 0.7
"""How much of the picture the band hides with place="over"."""

_FONT_HAS_UNICODE = int(cv2.__version__.split(".")[0]) >= 5


def annotate(
    pixels: NDArray[np.uint8], lines: Sequence[str], place: Literal["under", "over"] = "under"
) -> NDArray[np.uint8]:
    """Draw lines of text with a picture; long lines are wrapped.

    Args:
        pixels: uint8[H, W, 3], RGB. Not changed.
        lines: each begins on a line of its own; line ends inside count as spaces.
        place: "under" adds a band below the picture, "over" darkens its lower part and keeps the size.

    Returns:
        uint8[H', W', 3], RGB; W' = k * W with the smallest whole k that gives at least 320 pixels.

    Raises:
        InputError: pixels is not uint8[H, W, 3], or has no pixels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(
            f"expected a picture uint8[H, W, 3] in RGB, got {pixels.dtype}{list(pixels.shape)}; Picture.rgb() gives one"
        )
    factor = -(-MIN_WIDTH // pixels.shape[1]) if pixels.shape[1] < MIN_WIDTH else 1
    picture = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = picture.shape[:2]
    letter = int(np.clip(width / 36, 10, 28))  # height of a capital letter, pixels
    scale = letter / 21  # the font's capitals are 21 pixels high at scale 1
    margin, step = letter, round(letter * 1.9)
    wrapped = wrap([drawable(line) for line in lines], width - 2 * margin, scale)
    band_height = len(wrapped) * step + margin if wrapped else 0
    if place == "under":
        band: NDArray[np.uint8] = np.full((band_height, width, 3), BAND_RGB, np.uint8)
        canvas = np.concatenate([picture, band])
    else:
        band_height = min(band_height, height)
        canvas = picture.copy()
        lower = canvas[height - band_height :]
        lower[:] = np.rint(lower * (1 - OVER_OPACITY) + np.array(BAND_RGB) * OVER_OPACITY)
    canvas = np.ascontiguousarray(canvas)
    top = canvas.shape[0] - band_height
    for index, line in enumerate(wrapped):
        origin = (margin, top + margin // 2 + index * step + letter + letter // 4)
        cv2.putText(canvas, line, origin, FONT, scale, TEXT_RGB, max(1, round(letter / 14)), cv2.LINE_AA)
    return canvas


def drawable(text: str, font_has_unicode: bool = _FONT_HAS_UNICODE) -> str:
    """The text on one line, with what the font cannot draw replaced: accents are dropped, the rest becomes "?".

    font_has_unicode: False for OpenCV 4, whose font has ASCII only. OpenCV 5 puts its own "?" for what its font lacks.
    """
    text = " ".join(text.split())
    text = "".join(each for each in text if each.isprintable())
    if font_has_unicode or text.isascii():
        return text.encode("utf-8", "replace").decode("utf-8")
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(each for each in decomposed if not unicodedata.combining(each)).encode("ascii", "replace").decode()


def wrap(lines: Sequence[str], width: int, scale: float) -> list[str]:
    """Break lines at spaces so that each is at most `width` pixels at this font scale; longer words are broken."""
    wrapped: list[str] = []
    for line in lines:
        current = ""
        for word in line.split():
            for piece in _pieces(word, width, scale):
                longer = f"{current} {piece}" if current else piece
                if current and _text_width(longer, scale) > width:
                    wrapped.append(current)
                    longer = piece
                current = longer
        if current:
            wrapped.append(current)
    if len(wrapped) > MAX_LINES:
        wrapped = [*wrapped[: MAX_LINES - 1], "..."]
    return wrapped


def write_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write uint8[H, W, 3] RGB as the format that the file name ends in (.png, .jpg, .webp, .bmp).

    Raises:
        InputError: the ending names no such format.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        raise InputError(f"{path}: expected a name that ends in .png, .jpg, .webp or .bmp, got {path.suffix!r}")
    settings = [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix.lower() in (".jpg", ".jpeg") else []
    whole, data = cv2.imencode(path.suffix.lower(), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), settings)
    if not whole:
        raise InputError(f"{path}: OpenCV cannot encode {pixels.shape[1]}x{pixels.shape[0]} pixels in this format")
    path.write_bytes(data.tobytes())


def _pieces(word: str, width: int, scale: float) -> list[str]:
    """The word, or where it is wider than the line, parts of it that fit (at least one character each)."""
    pieces: list[str] = []
    while word and _text_width(word, scale) > width:
        fits = 1
        while fits < len(word) and _text_width(word[: fits + 1], scale) <= width:
            fits += 1
        pieces.append(word[:fits])
        word = word[fits:]
    return [*pieces, word] if word else pieces


def _text_width(text: str, scale: float) -> int:
    size: Any = cv2.getTextSize(text, FONT, scale, 1)
    return int(size[0][0])
