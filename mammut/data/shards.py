"""Endless, repeatable streams of training pictures from WebDataset tars and JSON Lines files, resumable at any sample.

Shards are dealt out to training processes and their loading workers, and every epoch puts a worker's into a new order;
inside a shard the samples are mixed through a buffer. Several sources are mixed by their weights. A standing (of each
source epoch, shard, samples drawn) says exactly where a worker is, and everything random about a sample depends on
where it stands: going on from there gives what would have come.

What is damaged is left out and reported; whether it is too much is the loop's decision.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from webdataset.shardlists import expand_urls

from mammut.data.clips import ClipPart
from mammut_runtime.errors import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")


@dataclass(frozen=True)
class Position:
    """Where a worker's stream stands: what comes next."""

    epoch: int = 0
    shard: int = 0
    """Index in the worker's order of this epoch."""
    drawn: int = 0
    """Samples taken from this shard so far, damaged ones included."""


@dataclass(frozen=True)
class Standing:
    """Where a worker stands that draws from several sources."""

    positions: tuple[Position, ...]
    """Of each source."""
    drawn: int = 0
    """Times a source was chosen."""


@dataclass(frozen=True)
class Raw:
    """A sample as it is stored."""

    name: str
    """For messages: "shard.tar: KEY" or "pairs.jsonl:12"."""
    data: bytes
    """The encoded picture; empty where there is none."""
    row: dict[str, Any]
    """Its JSON, or {"caption": ...}."""
    problem: str
    """Why it cannot be used, or ""."""
    clip: ClipPart | None = None
    """Instead of a picture."""


@dataclass(frozen=True)
class Drawn:
    """A sample or a broken shard, and where the stream stands after it."""

    sample: Raw | None
    after: Position
    seed: tuple[int, ...]
    """For everything random about this sample."""
    broken_shard: str = ""
    """Path and reason; `sample` is None then."""


@dataclass(frozen=True)
class Mixed:
    """What a mixture gives: which source it is from, and where the worker stands after it."""

    source: int
    drawn: Drawn
    after: Standing


@dataclass(frozen=True)
class Part:
    """A file, or every `parts`-th sample of it."""

    path: str
    part: int = 0
    parts: int = 1


def expand(sources: Sequence[str]) -> tuple[str, ...]:
    """All files that the sources name, braces expanded.

    Raises:
        InputError: none, something that is not a local path, or a file of an unknown kind. (A run's file list may come
            with a checkpoint from somebody else: WebDataset's "pipe:" would run commands.)
    """
    paths: list[str] = []
    for source in sources:
        if ":" in source:
            raise InputError(f"{source!r}: expected a local .tar or .jsonl file; mount or download other storage")
        paths += expand_urls(source)
    for path in paths:
        if Path(path).suffix not in (".tar", ".jsonl"):
            raise InputError(f"{path}: expected a .tar (WebDataset) or .jsonl file")
    if not paths:
        raise InputError("data.sources: expected at least one file")
    return tuple(paths)


def deal(paths: Sequence[str], rank: int, ranks: int, worker: int, workers: int) -> list[Part]:
    """The parts of one loading worker of one training process, in file order.

    Each JSON Lines file is cut for all. Tars stay whole (cutting means that several workers read the same one) unless
    there are too few for every worker to get one.
    """
    total = ranks * workers
    tars = sum(not path.endswith(".jsonl") for path in paths)
    cut = -(-total // tars) if tars and tars == len(paths) else 1
    parts = [
        Part(path, part, pieces)
        for path in paths
        for pieces in [total if path.endswith(".jsonl") else cut]
        for part in range(pieces)
    ]
    own = list(islice(islice(parts, rank, None, ranks), worker, None, workers))
    return own


class Mixture:
    """Samples of several sources, each as often as its weight says, without end.

    chance: with the seed, what the choices of a source follow from. Mixtures of one chance choose alike.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Part]],
        weights: Sequence[float],
        start: Standing,
        seed: int,
        shuffle: int,
        chance: str,
    ) -> None:
        positions = zip(sources, start.positions, strict=True)
        self._streams = [stream(parts, position, seed, shuffle) for parts, position in positions]
        self._weights, self._chance = weights, f"{seed} {chance}"
        self._positions, self._drawn = list(start.positions), start.drawn

    def draw(self, source: int | None = None) -> Mixed:
        """The next sample, of this source or of one chosen by weight. Errors as stream's."""
        if source is None:
            chance = random.Random(f"{self._chance} {self._drawn}")
            source = chance.choices(range(len(self._streams)), self._weights)[0]
            self._drawn += 1
        found = next(self._streams[source])
        self._positions[source] = found.after
        return Mixed(source, found, Standing(tuple(self._positions), self._drawn))


def stream(parts: Sequence[Part], start: Position, seed: int, shuffle: int) -> Iterator[Drawn]:
    """Samples of these parts from a position on, epoch after epoch without end.

    Raises:
        InputError: a whole epoch in which nothing could be read, or nothing was wanted.
    """
    epoch, first, skipped = start.epoch, start.shard, start.drawn
    while True:
        order = list(parts)
        random.Random(f"{seed} {epoch}").shuffle(order)
        found = first > 0 or skipped > 0
        for index in range(first, len(order)):
            part = order[index]
            mark = zlib.crc32(f"{part.path} {part.part}".encode())
            problems: list[str] = []
            samples = _shuffled(part, problems, shuffle, random.Random(f"{seed} {epoch} {mark}"))
            for at, sample in enumerate(islice(samples, skipped, None), skipped + 1):
                found = True
                if not _wanted(sample, f"{seed} {epoch} {mark} {at}"):
                    continue
                yield Drawn(sample, Position(epoch, index, at), (seed, epoch, mark, at))
            skipped = 0
            if problems:
                yield Drawn(None, Position(epoch, index + 1, 0), (), f"{part.path}: {problems[0]}")
        if not found:
            raise InputError(
                f"{parts[0].path} and {len(parts) - 1} other shards: nothing in them could be read (or they hold fewer "
                f"samples than there are loading workers)"
            )
        epoch, first = epoch + 1, 0


def file_sizes(paths: Sequence[str]) -> dict[str, int]:
    """Bytes of each file, -1 where it is missing: what a resumed run compares."""
    return {path: Path(path).stat().st_size if Path(path).is_file() else -1 for path in paths}


def samples_of(paths: Sequence[str]) -> Iterator[Raw]:
    """All samples of small sets, once, in their order. InputError where a file cannot be read."""
    for path in paths:
        problems: list[str] = []
        yield from _read(Part(path), problems)
        if problems:
            raise InputError(f"{path}: cannot be read: {problems[0]}")


def _wanted(sample: Raw, chance: str) -> bool:
    """A row may say in what share of its turns it is used ("share"): frequent things can be made rarer."""
    share = sample.row.get("share", 1)
    return not isinstance(share, int | float) or share >= 1 or random.Random(chance).random() < share


def _shuffled(part: Part, problems: list[str], buffer: int, rng: random.Random) -> Iterator[Raw]:
    if buffer == 1:
        return _read(part, problems)
    if part.path.endswith(".jsonl"):
        return _read_lines(part, problems, rng)
    shuffled: Iterator[Raw] = webdataset.shuffle(buffer, initial=buffer, rng=rng)(_read(part, problems))
    return shuffled


def _read(part: Part, problems: list[str]) -> Iterator[Raw]:
    """Samples of a part; a reason why reading ended early goes to `problems`."""
    if part.path.endswith(".jsonl"):
        return _read_lines(part, problems)
    return islice(_read_tar(part.path, problems), part.part, None, part.parts)


def _read_tar(path: str, problems: list[str]) -> Iterator[Raw]:
    def broken(error: Exception) -> bool:
        problems.append(str(error).split("\n")[0] or type(error).__name__)
        return True

    if not Path(path).is_file():
        problems.append("no such file")
        return
    for sample in webdataset.tarfile_to_samples(handler=broken)([{"url": path}]):
        name = f"{Path(path).name}: {sample['__key__']}"
        suffix = next((each for each in IMAGE_SUFFIXES if each in sample), None)
        row, problem = _row(sample)
        if suffix is None:
            problem = f"no picture; expected one of {', '.join(IMAGE_SUFFIXES)}"
        yield Raw(name, sample[suffix] if suffix else b"", row, problem)


def _row(sample: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The sample's description, and what is wrong with it."""
    if "json" in sample:
        return _object(sample["json"])
    if "txt" in sample:
        return {"caption": sample["txt"].decode("utf-8", "replace").strip()}, ""
    return {}, "neither a .json nor a .txt beside the picture"


def _read_lines(part: Part, problems: list[str], rng: random.Random | None = None) -> Iterator[Raw]:
    """Rows are mixed whole, before their pictures are read: people sort such lists."""
    path = Path(part.path)
    try:
        with path.open("rb") as file:
            own = [(n, line) for n, line in enumerate(file, 1) if (n - 1) % part.parts == part.part and line.strip()]
    except OSError as error:
        problems.append(error.strerror or "cannot be read")
        return
    if rng is not None:
        rng.shuffle(own)
    for number, line in own:
        row, problem = _object(line)
        name, data, clip = f"{path.name}:{number}", b"", None
        if not problem and "clip" in row:
            try:
                clip = ClipPart.of_row(path.parent, row)
            except InputError as error:
                problem = str(error)
        elif not problem:
            data, problem = _picture(path.parent, row)
        yield Raw(name, data, row, problem, clip)


def _picture(folder: Path, row: dict[str, Any]) -> tuple[bytes, str]:
    file = row.get("file")
    if not isinstance(file, str):
        return b"", 'expected the key "file", or "clip"'
    if Path(file).is_absolute() or ".." in Path(file).parts:
        return b"", f"{file!r} leaves the folder of the list"
    try:
        return (folder / file).read_bytes(), ""
    except OSError as error:
        return b"", f"{file}: {error.strerror}"


def _object(text: bytes) -> tuple[dict[str, Any], str]:
    try:
        row = json.loads(text)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    return (row, "") if isinstance(row, dict) else ({}, "expected a JSON object")
