"""The user's own data for calibration and for the drift: one picture at a time, with what is said about it.

    data = open_dataset(["photos/", "shard-000.tar", "day.mp4"])
    calibration, held_out = data.split()
    for sample in calibration: ...

The set is a list of places; a picture is decoded when its turn comes and then let go. Its content hash names what was
used, whatever the files are called.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_calibration.notes import Question
from mammut_calibration.sources import MAX_PICTURE_BYTES, Frame, Item, find_items
from mammut_runtime.canary import moving_crops
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture, read_picture

__all__ = ["Damaged", "Dataset", "Question", "Sample", "open_dataset"]

MIN_PICTURES = 16
"""Fewest different pictures a calibration is made from: the ranges of a vision model settle at some tens."""
DEFAULT_LIMIT = 512
DEFAULT_HELD_OUT = 0.25
_CLIP_BLOCK = 4
"""Chosen frames from which on a clip is divided in time; a shorter one goes to one side whole."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture and what is said about it."""

    name: str
    """For messages."""
    image: Picture | NDArray[np.uint8]
    """A file as it is stored, or a frame, uint8[H, W, 3] RGB: both are what Model.encode takes."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    questions: tuple[Question, ...] = ()
    filmed: tuple[NDArray[np.uint8], ...] = ()
    """Frames of the clip that the picture is from, from it to the next one: uint8[H, W, 3], RGB, in order. Empty for a
    picture that is from no clip, and unless they were asked for."""

    def clip(self, frames: int) -> tuple[NDArray[np.uint8], ...]:
        """What was filmed; else a clip of so many frames made of the picture, by a crop that moves over it."""
        if self.filmed:
            return self.filmed
        pixels = self.image.rgb() if isinstance(self.image, Picture) else self.image
        return tuple(moving_crops(pixels, frames))


@dataclass(frozen=True)
class Damaged:
    """A picture that cannot be used."""

    name: str
    reason: str
    """Says also which picture."""


@dataclass(frozen=True)
class Dataset:
    """Pictures of the user. Made by open_dataset."""

    items: tuple[Item, ...]
    digests: tuple[str, ...]
    """sha256 of each item's content."""

    @property
    def content_hash(self) -> str:
        """sha256 over the contents, in order: the same data under another name has the same hash."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sample | Damaged]:
        return self.samples()

    def samples(self, start: int = 0, clip_frames: int = 0) -> Iterator[Sample | Damaged]:
        """Every picture from the index `start` on, in order, those that cannot be used as Damaged.

        clip_frames: of pictures from clips, also the part up to the next picture, as this many frames spread evenly
        over it (`Sample.filmed`). So no part of a clip belongs to two pictures.
        """
        clips = _ClipReader()
        try:
            for item in self.items[start:]:
                try:
                    yield _read(item, clips, clip_frames)
                except InputError as problem:
                    yield Damaged(item.name, str(problem))
        finally:
            clips.close()

    def split(self, held_out: float = DEFAULT_HELD_OUT) -> tuple[Dataset, Dataset]:
        """Two parts without a picture in common: to calibrate with, and a share of `held_out` (0 to 1) to judge with.

        Which picture goes where depends on its content alone; equal pictures go to the same side. The end of a clip is
        held out, because neighbouring frames are nearly equal. Raises InputError where a part would be empty.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out: expected a share between 0 and 1, got {held_out}")
        judged = self._held_out_digests(held_out)
        sides = [digest in judged for digest in self.digests]
        if all(sides) or not any(sides):
            raise InputError(
                f"{len(self)} pictures ({len(set(self.digests))} different) cannot be divided into data to calibrate "
                f"with and data to judge with; give more"
            )
        return self._chosen([not side for side in sides]), self._chosen(sides)

    def first(self, count: int) -> Dataset:
        """The first pictures only."""
        return Dataset(self.items[:count], self.digests[:count])

    def _held_out_digests(self, share: float) -> set[str]:
        clips: dict[Path, list[str]] = {}
        for item, digest in zip(self.items, self.digests, strict=True):
            if isinstance(item.picture, Frame):
                clips.setdefault(item.picture.path, []).append(digest)
        long = [frames for frames in clips.values() if len(frames) >= _CLIP_BLOCK]
        judged = {digest for frames in long for digest in frames[len(frames) - max(1, round(share * len(frames))) :]}
        # hashes are as good as random, so those that sort first are a fair choice
        others = sorted(set(self.digests) - {digest for frames in long for digest in frames})
        return judged | set(others[: round(share * len(others))])

    def _chosen(self, which: Sequence[bool]) -> Dataset:
        kept = [index for index, chosen in enumerate(which) if chosen]
        return Dataset(tuple(self.items[i] for i in kept), tuple(self.digests[i] for i in kept))


def open_dataset(places: Sequence[str | Path], limit: int = DEFAULT_LIMIT, frame_every_s: float = 1.0) -> Dataset:
    """The pictures of folders (with their subfolders), WebDataset tars, picture files and clips.

    limit: most pictures; of more, that many are taken at even distances. frame_every_s: time between the frames taken
    from a clip, seconds. Reads every chosen file once, for its hash. Raises InputError for a place that cannot be used.
    """
    if isinstance(places, str | Path) or not places:
        raise InputError(f"expected a list of one or more folders, tars or clips, got {places!r}")
    if limit < 1 or not 0.001 <= frame_every_s <= 86_400:
        raise InputError(f"expected limit >= 1 and frame_every_s from 0.001 to 86400, got {limit} and {frame_every_s}")
    items = [item for place in places for item in find_items(place, frame_every_s)]
    if len(items) > limit:
        items = [items[index * len(items) // limit] for index in range(limit)]
    clips: dict[Path, str] = {}
    return Dataset(tuple(items), tuple(item.digest(clips) for item in items))


def _read(item: Item, clips: _ClipReader, clip_frames: int) -> Sample:
    notes = item.notes()
    image: Picture | NDArray[np.uint8]
    filmed: tuple[NDArray[np.uint8], ...] = ()
    if isinstance(item.picture, Frame):
        image = clips.read(item.picture, item.name)
        filmed = clips.part(item.picture, image, clip_frames)
    else:
        try:
            data = item.picture.read(MAX_PICTURE_BYTES)
        except InputError as problem:
            raise InputError(f"{item.name}: {problem}") from problem
        image = read_picture(data, name=item.name)
    return Sample(item.name, image, notes.captions, notes.label, notes.questions, filmed)


class _ClipReader:
    """Frames of clips, in order. Goes through a clip frame by frame: seeking is not exact in every format."""

    def __init__(self) -> None:
        self._capture: Any = None
        self._path: Path | None = None
        self._next = 0
        """Index of the frame that is read next."""

    def read(self, frame: Frame, name: str) -> NDArray[np.uint8]:
        """uint8[H, W, 3], RGB, turned as the clip says. Raises InputError."""
        if self._path != frame.path or frame.index < self._next:
            self.close()
            self._capture, self._path, self._next = cv2.VideoCapture(str(frame.path)), frame.path, 0
        while self._next <= frame.index:
            if not self._capture.grab():
                raise InputError(f"{name}: the clip ends or is damaged before this frame")
            self._next += 1
        whole, pixels = self._capture.retrieve()
        if not whole or pixels is None or pixels.ndim != 3:
            raise InputError(f"{name}: this frame cannot be decoded")
        rgb: NDArray[np.uint8] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        return rgb

    def part(self, frame: Frame, first: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """`count` frames from the middles of as many equal parts of the frame's span, after `read` gave its first.

        A part with fewer frames has some of them repeatedly. Where the clip ends, or cannot be decoded, the last good
        frame stays.
        """
        found: list[NDArray[np.uint8]] = []
        last, index = first, frame.index
        for place in range(count):
            wanted = frame.index + (2 * place + 1) * frame.span // (2 * count)
            if wanted > index:
                with contextlib.suppress(InputError):
                    last = self.read(Frame(frame.path, wanted, frame.time_s), "")
                index = wanted
            found.append(last)
        return tuple(found)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
        self._capture = self._path = None
