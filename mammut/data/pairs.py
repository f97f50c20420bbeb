"""What a training sample says, apart from its wording, and how its picture is read.

`captions` are what the model shall write, `matches` other ways to name the same thing, `questions` what can be asked.
Cropping, colours and backgrounds are the business of augment.py, streams of samples that of shards.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mammut.data.shards import samples_of
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture


@dataclass(frozen=True)
class Pair:
    """One encoded picture and what is said about it."""

    name: str
    """Where it came from, for messages: "shard.tar: KEY" or a path."""
    data: bytes
    """The picture as it is stored: JPEG, PNG, WebP or BMP."""
    captions: tuple[str, ...] = ()
    """What the model shall write under the picture; one is drawn each time."""
    matches: tuple[str, ...] = ()
    """Texts for the contrastive pass, one drawn each time. Empty: the captions serve."""
    questions: tuple[tuple[str, str], ...] = ()
    """(question, answer)."""
    credit: str = ""
    """Whom to name when the picture is shown, and its licence."""

    def __post_init__(self) -> None:
        if not self.captions and not self.questions:
            raise InputError(f"{self.name}: expected a caption or a question with its answer, got neither")


def read_tars(paths: Iterable[Path], to_pair: Callable[[str, bytes, dict[str, Any]], Pair | None]) -> Iterator[Pair]:
    """Pairs from WebDataset tars: KEY.jpg (or another picture suffix) beside KEY.json, or KEY.txt with a caption.

    Args:
        paths: the shards, read in this order.
        to_pair: makes a pair from its name, the encoded picture and the JSON; None leaves the sample out.

    Raises:
        InputError: a shard is missing or unreadable, or a JSON member is not an object.
    """
    for sample in samples_of([str(path) for path in paths]):
        if not sample.data:
            continue
        if sample.problem:
            raise InputError(f"{sample.name}: {sample.problem}")
        pair = to_pair(sample.name, sample.data, sample.row)
        if pair is not None:
            yield pair


def plain_pair(name: str, data: bytes, row: dict[str, Any]) -> Pair:
    """A pair from the keys "caption" or "captions", "matches", and "question" with "answer" or "questions" (a list of
    [question, answer]). Other keys are not looked at.

    Raises:
        InputError: none of them is there, or a value is not a text.
    """
    for key in ("captions", "matches", "questions"):
        if not isinstance(row.get(key, []), list):
            raise InputError(f"{name}: {key}: expected a list, got {str(row[key])[:40]}")
    captions = row.get("captions", [row["caption"]] if "caption" in row else [])
    if ("question" in row) != ("answer" in row):
        raise InputError(f'{name}: "question" and "answer" need each other')
    questions = [*row.get("questions", []), *([[row["question"], row["answer"]]] if "question" in row else [])]
    if any(not isinstance(asked, list) or len(asked) != 2 for asked in questions):
        raise InputError(f"{name}: questions: expected [question, answer] each")
    matches = row.get("matches", [])
    for text in [*captions, *matches, *(text for asked in questions for text in asked)]:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{name}: expected captions, questions and answers to be texts, got {text!r}")
    return Pair(name, data, tuple(captions), tuple(matches), tuple((q, a) for q, a in questions))


def read_drawing(data: bytes) -> npt.NDArray[np.uint8]:
    """uint8[H, W, 4] RGBA of a PNG or WebP, opaque where it has no transparency. InputError as read_picture's.

    The runtime's pictures leave out the transparency of palettes, which drawings are often stored with.
    """
    pixels = read_picture(data).rgb()  # names any damage
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.ndim == 3 and found.shape[2] == 4 and found.dtype == np.uint8:
        return np.ascontiguousarray(found[:, :, [2, 1, 0, 3]])
    return np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])


def square(data: bytes, side: int, alpha: bool) -> npt.NDArray[np.uint8]:
    """uint8[side, side, 3], or 4 with `alpha`: the whole picture, whatever its shape. Errors as read_picture's."""
    pixels = read_drawing(data) if alpha else read_picture(data).rgb()
    shrinks = max(pixels.shape[:2]) > side
    resized = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized)
