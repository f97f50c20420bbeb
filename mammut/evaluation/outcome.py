"""What a task hands back: figures that can be resampled, and single items that can be shown."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mammut.evaluation.bootstrap import Statistic
from mammut.evaluation.examples import EvalSet, Example, Image, PictureRef, Problems, batches, read_images
from mammut.evaluation.templates import IMAGENET_TEMPLATES

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TaskOptions:
    """What tasks can be told. Each looks at what concerns it."""

    workspace: Path
    """A folder for files of embeddings and the like; the caller removes it."""
    problems: Problems = field(default_factory=Problems)
    batch_size: int = 32
    advance: Callable[[int], None] = lambda count: None
    """Called with the number of pictures that are done anew."""
    ranked: Callable[[int, int], None] | None = None
    """Called with (done, to do) while pictures and texts are compared."""
    templates: tuple[str, ...] | None = IMAGENET_TEMPLATES
    """For names of classes; None: the model's own."""
    names: dict[str, str] = field(default_factory=dict)
    """Label to the name it goes by in prompts; a label that is not in it is its own name."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    novel: frozenset[str] | None = None
    """Detection: names that are reported apart; None: those that the set calls rare."""
    write_results: Path | None = None
    """Detection: a COCO results file to write."""
    draws: int = 5
    """Few-shot: how often pictures are drawn anew."""
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """A figure as a function of how often each item counts."""

    name: str
    statistic: Statistic
    items: int
    groups: Ints | None = None
    """Items that stem from one picture, for resampling."""
    chance: float | None = None
    """What guessing reaches."""
    percent: bool = True
    """Shown times 100."""
    main: bool = False
    """Shown where there is room for one or two figures."""
    resampled: bool = True
    """False: no interval, because it would take too long."""


@dataclass(frozen=True)
class DrawnBox:
    """A box to be drawn on a picture."""

    xyxy: tuple[float, float, float, float]
    """Pixels."""
    kind: Literal["truth", "right", "wrong"]
    text: str = ""


@dataclass(frozen=True)
class Shown:
    """One item, for people to look at."""

    picture: PictureRef
    asked: str
    truth: tuple[str, ...]
    given: tuple[str, ...]
    """What the model said, best first."""
    score: float
    """0 to 1."""
    boxes: tuple[DrawnBox, ...] = ()
    """Drawn on the picture."""


@dataclass(frozen=True)
class Outcome:
    """What a task found out about one model."""

    measures: tuple[Measure, ...]
    scores: F64
    """How right each item is, 0 to 1."""
    show: Callable[[int], Shown]
    facts: dict[str, int] = field(default_factory=dict)
    """How much was judged."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the figures."""


class DiskList:
    """Texts in a file, found by number: 8 bytes of memory each, however long they are."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._offsets = array("q", [0])

    def append(self, text: str) -> None:
        data = json.dumps(text).encode()
        self._file.seek(self._offsets[-1])
        self._file.write(data)
        self._offsets.append(self._offsets[-1] + len(data))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        self._file.seek(self._offsets[index])
        text: str = json.loads(self._file.read(self._offsets[index + 1] - self._offsets[index]))
        return text

    def close(self) -> None:
        self._file.close()


def picture_batches(
    data: EvalSet, options: TaskOptions, frames: int = 0
) -> Iterator[tuple[list[Example], list[Image]]]:
    """The examples whose pictures can be read, with the pictures, `batch_size` at once. frames: as for read_images."""
    for batch in batches(data, options.batch_size):
        seen = read_images(batch, options.problems, frames)
        if seen:
            yield [example for example, _ in seen], [image for _, image in seen]
        options.advance(len(batch))


def clip_notes(clips: int, frames: int) -> tuple[str, ...]:
    """How clips were looked at, for the report; nothing where there are none. frames: of each, 0: the middle one."""
    if not clips:
        return ()
    return (f"{clips:,} clips: {f'{frames} frames of each' if frames else 'the middle frame stands for each'}",)
