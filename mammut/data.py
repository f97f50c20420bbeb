"""Reads image-text pairs (WebDataset tars, or a folder with a JSON Lines file) into memory, ready to be drawn from.

A small set is decoded once, to squares a little larger than the training size, as uint8: an epoch costs no decoding.
Cropping, colours and backgrounds are the business of augment.py. What a sample says is kept apart from its wording:
`captions` are what the model shall write, `matches` other ways to name the same thing, `questions` what can be asked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
import webdataset
from torch import Tensor

from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")


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


@dataclass(frozen=True)
class Corpus:
    """Decoded pictures that are drawn from and augmented alike."""

    name: str
    pictures: Tensor
    """uint8[N, 3 or 4, S, S], RGB or RGBA. RGBA pictures are drawings that get a new background each time."""
    pairs: tuple[Pair, ...]
    """N pairs in the order of the pictures; their `data` is emptied."""
    weight: float
    """Expected samples of this corpus in a batch, relative to the other corpora."""
    kind: Literal["photo", "drawing", "plain"]
    """How augment.py may change the pictures. plain: position and colour carry meaning, so only small shifts."""
    sample_weights: Tensor
    """float64[N]: how often each sample is drawn, relative to the others."""

    def __len__(self) -> int:
        return len(self.pairs)


def read_tars(paths: Iterable[Path], to_pair: Callable[[str, bytes, dict[str, Any]], Pair | None]) -> Iterator[Pair]:
    """Pairs from WebDataset tars: KEY.jpg (or another picture suffix) beside KEY.json, or KEY.txt with a caption.

    Args:
        paths: the shards, read in this order.
        to_pair: makes a pair from its name, the encoded picture and the JSON; None leaves the sample out.

    Raises:
        InputError: a shard is missing or unreadable, or a JSON member is not an object.
    """
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected a WebDataset tar")
        shards = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        try:
            samples = list(shards)
        except Exception as error:  # tarfile's, the library's own, and OSErrors
            reason = str(error).split("\n")[0]
            raise InputError(f"{path}: cannot be read as a WebDataset tar: {reason}") from error
        for sample in samples:
            suffix = next((s for s in IMAGE_SUFFIXES if s in sample), None)
            if suffix is None:
                continue
            name = f"{path.name}: {sample['__key__']}"
            pair = to_pair(name, sample[suffix], _description(name, sample))
            if pair is not None:
                yield pair


def read_folder(folder: Path, index: str = "pairs.jsonl") -> Iterator[Pair]:
    """Pairs from a folder with a JSON Lines file: {"file", "caption"} or {"file", "question", "answer"} a line.

    Raises:
        InputError: no such file, a line that is not such an object, a picture that is missing or outside the folder.
    """
    path = folder / index
    if not path.is_file():
        raise InputError(
            f'{path}: no such file; expected one JSON object a line, such as {{"file": "a.jpg", "caption": "a cat"}}'
        )
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file"), str):
            raise InputError(f'{where}: expected an object with the key "file", got {line[:80]!r}')
        picture = folder / row["file"]
        if Path(row["file"]).is_absolute() or ".." in Path(row["file"]).parts:
            raise InputError(f"{where}: {row['file']!r} leaves the folder; give paths inside {folder}")
        if not picture.is_file():
            raise InputError(f"{where}: {picture} does not exist")
        yield plain_pair(f"{where} ({row['file']})", picture.read_bytes(), row)


def plain_pair(name: str, data: bytes, row: dict[str, Any]) -> Pair:
    """A pair from the keys "caption" or "captions", and "question" with "answer". Other keys are not looked at.

    Raises:
        InputError: neither is there, or a value is not a text.
    """
    captions = row.get("captions", [row["caption"]] if "caption" in row else [])
    texts = [*captions, *(row[key] for key in ("question", "answer") if key in row)]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{name}: expected captions, question and answer to be texts, got {text!r}")
    if ("question" in row) != ("answer" in row):
        raise InputError(f'{name}: "question" and "answer" need each other')
    questions = ((row["question"], row["answer"]),) if "question" in row else ()
    return Pair(name, data, tuple(captions), (), questions)


def decode(
    name: str,
    pairs: Iterable[Pair],
    side: int,
    *,
    kind: Literal["photo", "drawing", "plain"] = "photo",
    weight: float = 1.0,
    sample_weights: Iterable[float] | None = None,
    max_damaged: float = 0.01,
    warn: Callable[[str], None] = lambda message: None,
) -> Corpus:
    """Decode every picture once to side x side pixels, whatever its shape (squashed: nothing is cut away).

    Args:
        side: pixels; a little more than the training size, so that crops stay sharp.
        weight: of the corpus among others, see Corpus.
        sample_weights: one number a pair (damaged ones included), default 1.
        max_damaged: share of pictures that may be unreadable; those are named through `warn` and left out.

    Raises:
        InputError: no pairs at all, or more damaged pictures than that.
    """
    pictures, kept, weights, damaged = [], [], [], []
    given = list(pairs)
    wanted = [1.0] * len(given) if sample_weights is None else list(sample_weights)
    for pair, share in zip(given, wanted, strict=True):
        try:
            pictures.append(_square(pair, side, alpha=kind == "drawing"))
        except InputError as error:
            damaged.append(f"{pair.name}: {error}")
            warn(f"left out: {damaged[-1]}")
            continue
        kept.append(dataclasses.replace(pair, data=b""))
        weights.append(share)
    if len(damaged) > max_damaged * len(given):
        raise InputError(
            f"{name}: {len(damaged)} of {len(given)} pictures are unreadable, more than the {max_damaged:.1%} that "
            f"may be; the first: {damaged[0]}"
        )
    if not kept:
        raise InputError(f"{name}: holds no image-text pairs")
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Corpus(name, stacked, tuple(kept), weight, kind, torch.tensor(weights, dtype=torch.float64))


def read_drawing(data: bytes) -> npt.NDArray[np.uint8]:
    """uint8[H, W, 4] RGBA of a PNG or WebP, opaque where it has no transparency. InputError as read_picture's.

    The runtime's pictures leave out the transparency of palettes, which drawings are often stored with.
    """
    pixels = read_picture(data).rgb()  # names any damage
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.ndim == 3 and found.shape[2] == 4 and found.dtype == np.uint8:
        return np.ascontiguousarray(found[:, :, [2, 1, 0, 3]])
    return np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])


def _square(pair: Pair, side: int, alpha: bool) -> npt.NDArray[np.uint8]:
    """uint8[side, side, 3 or 4]."""
    pixels = read_drawing(pair.data) if alpha else read_picture(pair.data).rgb()
    shrinks = max(pixels.shape[:2]) > side
    resized = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized)


def _description(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    """The sample's JSON, or its text as a caption."""
    if "json" in sample:
        try:
            row = json.loads(sample["json"])
        except ValueError as error:
            raise InputError(f"{name}: its json member is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{name}: expected a JSON object, got {str(row)[:80]}")
        return row
    return {"caption": sample["txt"].decode("utf-8", "replace").strip()} if "txt" in sample else {}
