"""Moments of clips found by words, through an index in one file that is kept and reused.

    update_moments(model, [Path("clips")], index)       # only new and changed clips are looked at
    MomentIndex.open(index, model).search("a dog", 10)

A moment is a scene of at most some seconds, described by the mean embedding of a few of its frames. The file is the one
of picture indices (index_file.py); the path of a moment is the clip's, and behind it the time as a media fragment:
`clips/day.mp4#t=12.400,16.400`. Clips are named by their absolute paths, so one index serves clips from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.index_file import Entry, IndexFile, is_index_file, read_index_file, write_index_file
from mammut_runtime.index_rows import best_rows, check_model, header_for
from mammut_runtime.model import Model
from mammut_runtime.video.captions import ahead
from mammut_runtime.video.decode import Clip, ClipHealth
from mammut_runtime.video.encode import held_side, look_at
from mammut_runtime.video.scenes import SceneRule, scenes

Floats = NDArray[np.float32]

LONGEST_MOMENT_S = 4.0
FRAMES_AS_PICTURES = 2
"""Of a moment, where the bundle has no `video` graph."""
_FRAGMENT = re.compile(r"(.+)#t=(\d{1,8}\.\d{3}),(\d{1,8}\.\d{3})", re.DOTALL)
_ROOT = "moments"
"""What the header says in place of a folder: the paths are absolute."""
_WRITE_EVERY = 256
"""Moments after which the file is written again, between two clips."""


@dataclass(frozen=True)
class Moment:
    """A part of a clip that fits."""

    path: Path
    start_s: float
    end_s: float
    score: float
    """Cosine of text and moment, -1 to 1."""

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "start_s": self.start_s, "end_s": self.end_s, "score": self.score}


@dataclass(frozen=True)
class Unusable:
    """A clip that could not be indexed."""

    path: Path
    reason: str


@dataclass(frozen=True)
class MomentUpdate:
    """What an update did."""

    clips: int
    """Clips that were asked for and are in the index now."""
    encoded: int
    """Of these, those that were looked at now."""
    moments: int
    """In the index now, of all clips."""
    unusable: tuple[Unusable, ...]
    damaged: tuple[tuple[Path, ClipHealth], ...]
    """Of those looked at now, the ones that were used as far as they go."""


def update_moments(
    model: Model,
    clips: Sequence[Path],
    index: Path,
    *,
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MomentUpdate:
    """Bring the index up to date for these clips; what it has of others stays.

    An index of another model is only replaced with `rebuild`. May be interrupted: it is written between clips.
    Raises InputError for a file that is no index, or of another model; OSError if it cannot be written.
    """
    held = _Held(model, index, rebuild)
    unusable: list[Unusable] = []
    damaged: list[tuple[Path, ClipHealth]] = []
    encoded = 0
    try:
        for number, path in enumerate(clips):
            try:
                status = path.stat()
                if not held.has(path, status.st_mtime_ns, status.st_size):
                    moments, health = _moments(model, path)
                    held.replace(path, status.st_mtime_ns, status.st_size, moments)
                    encoded += 1
                    if not health.whole:
                        damaged.append((path, health))
            except (InputError, OSError) as problem:
                held.drop(path)
                unusable.append(Unusable(path, str(problem)))
            held.save(at_least=_WRITE_EVERY)
            if progress:
                progress(number + 1, len(clips))
    finally:
        held.save()
    return MomentUpdate(len(clips) - len(unusable), encoded, held.count, tuple(unusable), tuple(damaged))


class MomentIndex:
    """An opened index. Safe to search from several threads."""

    def __init__(self, file: IndexFile, model: Model) -> None:
        """Made by MomentIndex.open."""
        self._model = model
        self._embeddings = file.embeddings()
        self._places = [_place(file, entry.path) for entry in file.entries]

    @classmethod
    def open(cls, path: Path, model: Model) -> MomentIndex:
        """Raises InputError if it is no index of moments, is damaged, or was made with another model."""
        file = read_index_file(path)
        _check(file, model)
        return cls(file, model)

    def __len__(self) -> int:
        return len(self._places)

    def search(self, text: str, count: int = 10, clips: Sequence[Path] | None = None) -> list[Moment]:
        """The moments that fit best, best first. clips: only in these; None: in all.

        Raises InputError for an empty text, and a count that is not 1 to 10,000.
        """
        inside = None
        if clips is not None:
            wanted = {_key(path) for path in clips}
            inside = np.array([place[0] in wanted for place in self._places], bool)
        found = best_rows(self._embeddings, self._model.embed_texts([text])[0], count, inside)
        return [self._moment(row, score) for row, score in found]

    def _moment(self, row: int, score: float) -> Moment:
        key, start_s, end_s = self._places[row]
        return Moment(_path(key), start_s, end_s, score)


def _moments(model: Model, path: Path) -> tuple[list[tuple[str, Floats]], ClipHealth]:
    """The moments of a clip: where they are, and their embeddings; and what of the clip could be decoded."""
    rule = SceneRule(longest_s=LONGEST_MOMENT_S)
    found: list[tuple[str, Floats]] = []
    with Clip.open(path) as clip:
        frames = model.manifest.model.video_frames or FRAMES_AS_PICTURES
        for scene in ahead(scenes(clip, rule, frames, most_side=held_side(model)), 2):
            look = look_at(model, scene.pixels)
            name = f"{_key(path)}#t={scene.start_ms / 1000:.3f},{scene.end_ms / 1000:.3f}"
            found.append((name, look.embedding))
        return found, clip.health


class _Held:
    """The index while it is brought up to date. Embeddings of an hour are a few MB, so all are in memory."""

    def __init__(self, model: Model, index: Path, rebuild: bool) -> None:
        self._model, self._index = model, index
        self._rows: dict[str, list[tuple[Entry, Floats]]] = {}
        self._new = 0
        self._dirty = not index.exists() or rebuild
        if not index.exists():
            index.parent.mkdir(parents=True, exist_ok=True)
        elif rebuild:
            if not is_index_file(index):
                raise InputError(f"{index} is not an index and is left alone; give another file name")
        else:
            file = read_index_file(index)
            _check(file, model)
            for entry, embedding in zip(file.entries, np.array(file.embeddings()), strict=True):
                self._rows.setdefault(_place(file, entry.path)[0], []).append((entry, embedding))

    @property
    def count(self) -> int:
        return sum(len(rows) for rows in self._rows.values())

    def has(self, path: Path, mtime_ns: int, size_bytes: int) -> bool:
        rows = self._rows.get(_key(path))
        return (
            bool(rows) and rows is not None and (rows[0][0].mtime_ns, rows[0][0].size_bytes) == (mtime_ns, size_bytes)
        )

    def replace(self, path: Path, mtime_ns: int, size_bytes: int, moments: list[tuple[str, Floats]]) -> None:
        self._rows[_key(path)] = [(Entry(name, mtime_ns, size_bytes), embedding) for name, embedding in moments]
        self._new += len(moments)
        self._dirty = True

    def drop(self, path: Path) -> None:
        self._dirty = self._rows.pop(_key(path), None) is not None or self._dirty

    def save(self, at_least: int = 0) -> None:
        if not self._dirty or self._new < at_least:
            return
        ordered = [row for key in sorted(self._rows) for row in self._rows[key]]
        entries = [entry for entry, _ in ordered]
        header = header_for(self._model, _ROOT, entries)
        write_index_file(self._index, header, entries, (embedding[None] for _, embedding in ordered))
        self._new, self._dirty = 0, False


def _key(path: Path) -> str:
    """The absolute path as an index holds it: without what stands before the first part, "/" between parts."""
    return path.resolve().as_posix().lstrip("/")


def _path(key: str) -> Path:
    return Path(key) if re.match(r"[A-Za-z]:/", key) else Path("/", key)


def _place(file: IndexFile, name: str) -> tuple[str, float, float]:
    found = _FRAGMENT.fullmatch(name)
    if found is None:
        raise InputError(f"{file.path}: damaged index of moments: {name[:80]!r}; remove it and index again")
    return found[1], float(found[2]), float(found[3])


def _check(file: IndexFile, model: Model) -> None:
    if file.header.folder != _ROOT:
        raise InputError(f"{file.path} is an index of pictures, not of moments; give another --index")
    check_model(file, model)
