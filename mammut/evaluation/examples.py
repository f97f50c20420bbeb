"""What an evaluation set is made of. Pictures stay where they are until their turn comes; what is missing is named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut.data.clips import ClipPart, read_frames
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture, read_picture

T = TypeVar("T")
Image = NDArray[np.uint8] | Picture
"""uint8[H, W, 3] RGB, or a picture as it is stored: what the runtime's Preprocessor takes. For a model that sees clips
also uint8[F, H, W, 3]."""
LARGEST_SIDE = 480
"""Shorter side of a clip's frames, pixels, at which a batch of them still fits into memory; larger ones are shrunk."""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIP_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
MAX_PICTURE_BYTES = 256 * 2**20
_NAMED = 3
"""So many of the things that are missing are named in an error; how many there are is always said."""


@dataclass(frozen=True)
class PictureRef:
    """Where a picture lies: a file, a stretch of a tar, or a clip, of which the middle frame stands for the whole where
    a model sees pictures only."""

    name: str
    """For messages and pages."""
    path: Path
    offset: int = 0
    size: int | None = None
    """Bytes; None: the whole file."""
    upright: bool = True
    """Whether the picture is turned as its EXIF data say; data sets of boxes mean it as it is stored."""

    @property
    def is_clip(self) -> bool:
        return self.size is None and self.path.suffix.lower() in CLIP_SUFFIXES

    def read(self) -> Image:
        """The picture. Raises InputError."""
        if self.is_clip:
            return _middle_frame(self.path)
        return read_picture(self.encoded(), name=self.name, upright=self.upright)

    def frames(self, count: int) -> NDArray[np.uint8]:
        """uint8[count, H, W, 3] RGB: frames of a clip, spread over it as the runtime does. Raises InputError."""
        return np.stack(read_frames(ClipPart(self.path), count, LARGEST_SIDE, enlarge=False))

    def encoded(self) -> bytes:
        """The bytes of the picture file. Raises InputError."""
        try:
            size = self.path.stat().st_size if self.size is None else self.size
            if size > MAX_PICTURE_BYTES:
                raise InputError(f"{self.name}: {size:,} bytes, expected at most {MAX_PICTURE_BYTES:,} for a picture")
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(size)
        except OSError as problem:
            raise InputError(f"{self.name}: cannot be read ({problem.strerror or problem})") from problem
        if len(data) != size:
            raise InputError(f"{self.name}: cut off after {len(data):,} of {size:,} bytes")
        return data


@dataclass(frozen=True)
class Question:
    """Something asked about a picture."""

    text: str
    answers: tuple[str, ...]
    """What people answered: ten for VQAv2, one where there is one truth."""
    kind: str = ""
    """The data set's own kind of answer, such as "yes/no"; figures are also given for each."""


@dataclass(frozen=True)
class Example:
    """A picture and what is known about it."""

    picture: PictureRef
    captions: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None
    questions: tuple[Question, ...] = ()


@dataclass
class Problems:
    """Data that is not there or cannot be used. Without `partial` the first is an error; with it all are listed."""

    partial: bool = False
    missing: dict[str, None] = field(default_factory=dict)
    """One line each, in order: which, and why it is left out."""

    def report(self, lines: Sequence[str], of: int | None = None, where: str = "") -> None:
        """Note what is missing. of: so many there should be. Raises InputError without `partial`."""
        if not lines:
            return
        if not self.partial:
            shown = ", ".join(lines[:_NAMED]) + (", ..." if len(lines) > _NAMED else "")
            many = f"{len(lines):,} of {of:,} missing: " if of else ""
            place = f"{where}: " if where else ""
            raise InputError(f"{place}{many}{shown}; complete the data, or --partial to go on with the rest")
        self.missing.update(dict.fromkeys(lines))


@dataclass(frozen=True)
class EvalSet:
    """Examples of one source. Iterating reads notes, never pictures; tars are streamed, so a set may be any size."""

    name: str
    stream: Callable[[], Iterator[Example]]

    def __iter__(self) -> Iterator[Example]:
        return self.stream()

    @classmethod
    def of(cls, name: str, examples: Sequence[Example]) -> EvalSet:
        return cls(name, lambda: iter(examples))

    def where(self, keep: Callable[[Example], bool]) -> EvalSet:
        """Only the examples that `keep` accepts."""
        return EvalSet(self.name, lambda: (example for example in self.stream() if keep(example)))

    def drawn(self, count: int, seed: int) -> EvalSet:
        """`count` examples drawn by chance, in their order; all of them where there are no more.

        Reads the whole stream once and keeps `count`.
        """
        generator = random.Random(seed)
        kept: list[tuple[int, Example]] = []
        for index, example in enumerate(self.stream()):
            if index < count:
                kept.append((index, example))
            elif (place := generator.randrange(index + 1)) < count:
                kept[place] = (index, example)
        kept.sort(key=lambda pair: pair[0])
        return EvalSet.of(self.name, [example for _, example in kept])


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def read_images(examples: Sequence[Example], problems: Problems, frames: int = 0) -> list[tuple[Example, Image]]:
    """The pictures of a batch, and so many frames of its clips (0: the middle one, as a picture). Those that cannot be
    used go to `problems`: an InputError, or left out."""
    found = []
    for example in examples:
        try:
            whole = frames and example.picture.is_clip
            found.append((example, example.picture.frames(frames) if whole else example.picture.read()))
        except InputError as problem:
            problems.report([str(problem)])
    return found


def _middle_frame(path: Path) -> NDArray[np.uint8]:
    """uint8[H, W, 3] RGB. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such clip; check the folder")
    capture = cv2.VideoCapture(str(path))
    try:
        count = int(max(capture.get(cv2.CAP_PROP_FRAME_COUNT), 0))
        # Frame by frame: seeking is not exact in every format.
        for _ in range(min(count // 2, 10_000_000)):
            if not capture.grab():
                break
        whole, pixels = capture.read()
    finally:
        capture.release()
    if not whole or pixels is None or pixels.ndim != 3:
        raise InputError(f"{path}: cannot be decoded as a clip; expected one that OpenCV reads")
    rgb: NDArray[np.uint8] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return rgb
