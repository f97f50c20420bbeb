"""Batches for training a detector: sources of boxed pictures, large-scale jitter, and what is known of each picture.

Every batch follows from the seed and the step's number alone, so a run that is resumed needs no state of its data.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mammut.detection.samples import U8, BoxedPicture, BoxedSet
from mammut_runtime.preprocess import PreprocessRule

SEEN_SHARE = 0.3
"""Of a box that must be left after the crop; less is neither a thing to find nor background."""
FREQUENT = 0.001
"""Share of the pictures from which a name needs no repetition (LVIS)."""
SMALLEST = 4.0
"""Pixels of the input; smaller things are not to be found either."""


class Source(Protocol):
    """Gives pictures at random."""

    @property
    def name(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Every name its boxes may have."""

    def draw(self, rng: np.random.Generator) -> BoxedPicture:
        """One picture. InputError where it cannot be read."""


@dataclass(frozen=True)
class SetSource:
    """Pictures of a set at random: all alike, or those with uncommon names more often where the set says what is
    common (LVIS's repeat factors: by the square root of how much rarer than FREQUENT a name is)."""

    boxed: BoxedSet

    @functools.cached_property
    def _until(self) -> NDArray[np.float64]:
        """float64[n]: the shares of the pictures, each added to those before it."""
        pictures = self.boxed.pictures
        if not self.boxed.frequency:
            return np.arange(1, len(pictures) + 1) / len(pictures)
        counts = Counter(name for picture in pictures for name in set(picture.labels))
        factors = {name: max(1.0, (FREQUENT * len(pictures) / count) ** 0.5) for name, count in counts.items()}
        shares = [max((factors[name] for name in picture.labels), default=1.0) for picture in pictures]
        until: NDArray[np.float64] = np.cumsum(shares) / np.sum(shares)
        return until

    @property
    def name(self) -> str:
        return self.boxed.name

    @property
    def names(self) -> tuple[str, ...]:
        return self.boxed.names

    def draw(self, rng: np.random.Generator) -> BoxedPicture:
        place = int(np.searchsorted(self._until, rng.random(), side="right"))
        picture = self.boxed.pictures[min(place, len(self.boxed.pictures) - 1)]
        if picture.absent is not None:
            return picture
        return replace(picture, absent=tuple(set(self.boxed.names) - set(picture.labels)))


@dataclass(frozen=True)
class Jitter:
    """How pictures are varied."""

    smallest: float
    largest: float
    """Scale of the picture, 1: it just fits."""
    flip: bool = True
    light: float = 0.2
    """Contrast and brightness change by up to this share."""
    mosaic: float = 0.0
    """Share of the inputs that are four pictures of half the side: four times the things for the encoder's work."""


@dataclass(frozen=True)
class Fed:
    """A source and how it is used."""

    source: Source
    weight: float
    """Its share of the pictures, relative to the others'."""
    jitter: Jitter


@dataclass(frozen=True)
class Batch:
    """Legend: B pictures, G boxes at most, K names of the vocabulary."""

    pixels: Tensor
    """float32[B, 3, D, D], normalised."""
    boxes: Tensor
    """float32[B, G, 4] xyxy in input pixels; zeros where there is none."""
    labels: Tensor
    """int64[B, G]; places in the vocabulary, -1 where there is no thing to find."""
    ignore: Tensor
    """bool[B, G]: regions that are neither things nor background."""
    known: Tensor
    """bool[B, K]: names of which it is known whether they are in the picture."""
    partial: Tensor
    """bool[B, K]: names of which not every thing has a box."""
    complete: Tensor
    """bool[B]: whatever has no box, is background. Not so where names are known for some pictures only."""

    def on(self, device: torch.device) -> Batch:
        """The same there."""
        return Batch(*(getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)))


def batches(
    feeds: Sequence[Fed],
    vocabulary: Sequence[str],
    size: int,
    fill: int,
    rule: PreprocessRule,
    *,
    batch_size: int,
    seed: int,
    start: int,
    threads: int = 1,
) -> Generator[Batch, None, None]:
    """From step `start` on, without an end; some are made ahead, in threads. Errors as Source.draw's.

    Args:
        vocabulary: names that are trained; boxes with others are left out, as if nobody had drawn them.
        size, fill: the input's side in pixels and the grey around pictures.
        rule: gives mean and deviation.
    """
    places = {name: place for place, name in enumerate(vocabulary)}
    federated = {fed.source.name: _federated(fed.source) for fed in feeds}

    def make(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        shares = np.array([fed.weight for fed in feeds])
        rows = []
        for number in rng.choice(len(feeds), size=batch_size, p=shares / shares.sum()):
            fed = feeds[int(number)]
            image, picture = varied(fed, size, fill, rng)
            rows.append((image, picture, not federated[fed.source.name]))
        return collate(rows, places, rule)

    ahead = threads + 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[Batch]] = [pool.submit(make, start + number) for number in range(ahead)]
        step = start + ahead
        try:
            while True:
                yield waiting.pop(0).result()
                waiting.append(pool.submit(make, step))
                step += 1
        finally:
            for each in waiting:
                each.cancel()


def digest(source: Source) -> str:
    """Tells sources apart whose names are alike: sha256 of names, and of a set's file names, boxes and labels."""
    found = hashlib.sha256(json.dumps([source.name, list(source.names)]).encode())
    for picture in source.boxed.pictures if isinstance(source, SetSource) else ():
        words = [picture.name, picture.labels, picture.absent, picture.partial, picture.ignore.tolist()]
        found.update(json.dumps(words).encode() + picture.boxes.tobytes())
    return found.hexdigest()


def _federated(source: Source) -> bool:
    return isinstance(source, SetSource) and any(picture.absent is not None for picture in source.boxed.pictures)


def varied(fed: Fed, size: int, fill: int, rng: np.random.Generator) -> tuple[U8, BoxedPicture]:
    """One input of a source: a picture, or four. Errors as Source.draw's."""
    if rng.random() >= fed.jitter.mosaic:
        return jittered(fed.source.draw(rng), fed.jitter, size, fill, rng)
    half = size // 2
    four = [jittered(fed.source.draw(rng), fed.jitter, half, fill, rng) for _ in range(4)]
    square = np.full((size, size, 3), fill, np.uint8)
    boxes = []
    for number, (image, picture) in enumerate(four):
        top, left = half * (number // 2), half * (number % 2)
        square[top : top + half, left : left + half] = image
        boxes.append(picture.boxes + np.array([left, top] * 2, np.float32))
    pictures = [picture for _, picture in four]
    known = set.intersection(*({*picture.labels, *(picture.absent or ())} for picture in pictures))
    labels = tuple(label for picture in pictures for label in picture.labels)
    return square, BoxedPicture(
        name=" + ".join(picture.name for picture in pictures),
        picture=square,
        boxes=np.concatenate(boxes),
        labels=labels,
        ignore=np.concatenate([picture.ignore for picture in pictures]),
        absent=tuple(known - set(labels)),
        # A name that is not known everywhere competes for its own boxes, but not for the background.
        partial=tuple({name for picture in pictures for name in picture.partial} | (set(labels) - known)),
    )


def jittered(
    picture: BoxedPicture, jitter: Jitter, size: int, fill: int, rng: np.random.Generator
) -> tuple[U8, BoxedPicture]:
    """Large-scale jitter: the picture at a random scale at a random place of the square, cut where it is too large.

    Returns uint8[size, size, 3] and the picture with its boxes in the square's pixels; those of which too little is
    left are marked as `ignore`.
    """
    image = picture.rgb()
    height, width = image.shape[:2]
    scale = size / max(height, width)
    scale *= math.exp(rng.uniform(math.log(jitter.smallest), math.log(jitter.largest)))
    new = (max(1, round(height * scale)), max(1, round(width * scale)))
    if new != (height, width):
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(image, (new[1], new[0]), interpolation=method), np.uint8)
    top, left = (int(rng.integers(min(0, size - side), max(0, size - side) + 1)) for side in new)
    square = np.full((size, size, 3), fill, np.uint8)
    y0, x0, y1, x1 = max(0, top), max(0, left), min(size, top + new[0]), min(size, left + new[1])
    square[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
    scales = np.array([new[1] / width, new[0] / height] * 2, np.float32)
    boxes = picture.boxes * scales + np.array([left, top] * 2, np.float32)
    if jitter.flip and rng.random() < 0.5:
        square = np.ascontiguousarray(square[:, ::-1])
        boxes[:, [0, 2]] = size - boxes[:, [2, 0]]
    if jitter.light:
        gain, shift = 1 + rng.uniform(-jitter.light, jitter.light, 2)
        square = np.clip(square * np.float32(gain) + np.float32(128 * (shift - 1)), 0, 255).astype(np.uint8)
    return square, _cut(picture, boxes, size)


def _cut(picture: BoxedPicture, boxes: np.ndarray, size: int) -> BoxedPicture:
    clipped = boxes.clip(0, size)
    sides = (clipped[:, 2:] - clipped[:, :2]).clip(min=0)
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    small = (sides.prod(axis=1) < SEEN_SHARE * whole) | (sides.min(axis=1, initial=math.inf) < SMALLEST)
    kept = np.flatnonzero(sides.min(axis=1, initial=math.inf) > 0) if len(boxes) else np.empty(0, np.int64)
    return replace(
        picture,
        boxes=clipped[kept].astype(np.float32),
        labels=tuple(picture.labels[place] for place in kept),
        ignore=(picture.ignore | small)[kept],
    )


def collate(rows: Sequence[tuple[U8, BoxedPicture, bool]], places: dict[str, int], rule: PreprocessRule) -> Batch:
    """uint8[D, D, 3] pictures with what is in them, and whether that is all. places: of names in the vocabulary."""
    pictures = [picture for _, picture, _ in rows]
    count = max(1, *(len(picture.boxes) for picture in pictures))
    boxes, labels = torch.zeros(len(rows), count, 4), torch.full((len(rows), count), -1)
    ignore = torch.zeros(len(rows), count, dtype=torch.bool)
    known, partial = (torch.zeros(len(rows), len(places), dtype=torch.bool) for _ in range(2))
    for row, picture in enumerate(pictures):
        for number, (label, skipped) in enumerate(zip(picture.labels, picture.ignore, strict=True)):
            if label not in places and not skipped:
                continue
            boxes[row, number] = torch.from_numpy(picture.boxes[number])
            ignore[row, number] = bool(skipped)
            if not skipped:
                labels[row, number] = places[label]
        for table, names in ((known, (*picture.labels, *(picture.absent or ()))), (partial, picture.partial)):
            table[row, [places[name] for name in names if name in places]] = True
    pixels = torch.from_numpy(np.stack([image for image, _, _ in rows])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (rule.mean, rule.std))
    complete = torch.tensor([whole for _, _, whole in rows])
    return Batch((pixels - mean) / std, boxes, labels, ignore, known, partial, complete)
