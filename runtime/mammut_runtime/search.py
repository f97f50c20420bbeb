"""Finding pictures in a folder, by words or by another picture, through an index in one file.

    update_index(model, Path("photos"), Path("photos.index"))      # only what is new or changed is looked at
    PictureIndex.open(Path("photos.index"), model).search("a red car", 10)

An update may be interrupted at any time: what was done is kept, and the file is always whole. Pictures that cannot be
read are skipped and named. index_file.py is the file's layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.index_file import Entry, IndexFile, is_index_file, read_index_file, write_index_file
from mammut_runtime.index_rows import best_rows, check_model, header_for
from mammut_runtime.model import BATCH, Model, Seen
from mammut_runtime.pictures import Picture, read_picture
from mammut_runtime.strict import to_dict

Floats = NDArray[np.float32]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHECKPOINT_EVERY = 256
"""New pictures after which the file is written again; more for a large index (a 20th of it), so that writing stays a
small part of the work."""


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    path: str
    """Relative to the index's folder, "/" between parts."""
    score: float
    """Cosine of the two embeddings, -1 to 1."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be indexed."""

    path: str
    reason: str


@dataclass(frozen=True)
class IndexUpdate:
    """What an update did."""

    pictures: int
    """In the index now."""
    added: int
    changed: int
    removed: int
    skipped: tuple[Skipped, ...]
    """Pictures that cannot be read, each with the reason; they are not in the index and are tried again next time."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


class PictureIndex:
    """An opened index. Safe to search from several threads."""

    def __init__(self, file: IndexFile, model: Model) -> None:
        """Made by PictureIndex.open."""
        self._file, self._model = file, model
        self._embeddings = file.embeddings()

    @classmethod
    def open(cls, path: Path, model: Model) -> PictureIndex:
        """Open an index. Raises InputError if it is no index, damaged, or was made with another model."""
        file = read_index_file(path)
        check_model(file, model)
        return cls(file, model)

    def __len__(self) -> int:
        """Pictures in the index."""
        return self._file.header.count

    @property
    def folder(self) -> Path:
        """The folder that the paths of hits are relative to."""
        return Path(os.path.normpath(self._file.path.parent / self._file.header.folder))

    def search(self, query: str | Seen | Floats, count: int = 10) -> list[Hit]:
        """The pictures that fit best, best first, at most `count`.

        query: words, a picture that the same model has seen, or an embedding float32[E] of unit length.
        Raises InputError for empty words, an embedding of another size, or a count that is not 1 to 10,000.
        """
        found = best_rows(self._embeddings, self._vector(query), count)
        return [Hit(self._file.entries[row].path, score) for row, score in found]

    def _vector(self, query: str | Seen | Floats) -> Floats:
        if isinstance(query, str):
            vector: Floats = self._model.embed_texts([query])[0]
        elif isinstance(query, Seen):
            vector = query.embedding
        else:
            vector = query
        if vector.shape != (self._file.header.embed_dim,):
            raise InputError(
                f"expected an embedding of shape [{self._file.header.embed_dim}], got {list(vector.shape)}"
            )
        return vector


def update_index(
    model: Model,
    folder: Path,
    index: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    batch_size: int = BATCH,
    rebuild: bool = False,
) -> IndexUpdate:
    """Bring the index up to date with the pictures in a folder and its subfolders; hidden ones are left out.

    New pictures, and those whose size or modification time changed, are encoded, `batch_size` at once; entries of
    pictures that are gone are dropped. The file is written after `checkpoint_every` pictures, at the end, and when the
    update is interrupted (KeyboardInterrupt and every other exception go through).

    progress: called with (done, to do) after every batch. rebuild: begin anew, also where the old index was made with
    another model or of another folder.
    Raises InputError for a folder that is none or has no pictures, an index in a folder that is not there, a file that
    is not an index, and an index of another model or folder.
    """
    if batch_size < 1 or checkpoint_every < 1:
        raise InputError(f"batch_size and checkpoint_every must be at least 1, got {batch_size} and {checkpoint_every}")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with pictures, there is none")
    if not index.absolute().parent.is_dir():  # found out now, not after hours of encoding
        raise InputError(f"{index}: expected a file in a folder that is there; make {index.parent} first")
    draft = _Draft(model, folder, index, rebuild)
    found, skipped = _scan(folder)
    if not found and not index.exists():
        raise InputError(f"{folder}: no pictures in this folder; expected files named {' '.join(PICTURE_SUFFIXES)}")
    known = {entry.path for entry in draft.entries}
    new = draft.reconcile(found)
    added = changed = 0
    try:
        for start in range(0, len(new), batch_size):
            batch = new[start : start + batch_size]
            for entry, embedding in _encoded(model, folder, batch, skipped):
                draft.add(entry, embedding)
                changed += entry.path in known
                added += entry.path not in known
            if draft.pending >= max(checkpoint_every, len(draft.entries) // 20):
                draft.save()
            if progress:
                progress(start + len(batch), len(new))
    finally:
        draft.save()
    removed = len(known - {entry.path for entry in found})
    return IndexUpdate(len(draft.entries), added, changed, removed, tuple(skipped))


class _Draft:
    """The index while it is brought up to date: entries that are in the file, and new ones that are not yet."""

    def __init__(self, model: Model, folder: Path, index: Path, rebuild: bool) -> None:
        self._path, self._model = index, model
        self._folder = _seen_from(index, folder)
        self._file: IndexFile | None = None
        if index.exists() and rebuild and not is_index_file(index):
            raise InputError(f"{index} is not a picture index and is left alone; give another file name")
        if index.exists() and not rebuild:
            self._file = read_index_file(index)
            check_model(self._file, model)
            if self._file.header.folder != self._folder:
                raise InputError(
                    f"{index} is an index of {self._file.header.folder}, not of {self._folder} (seen from the index); "
                    f"give another file name, or rebuild it"
                )
        self.entries: list[Entry] = list(self._file.entries) if self._file else []
        self._rows = list(range(len(self.entries)))
        self._new: list[Floats] = []
        self._dirty = self._file is None

    @property
    def pending(self) -> int:
        """Pictures that are not in the file yet."""
        return len(self._new)

    def reconcile(self, found: Sequence[Entry]) -> list[Entry]:
        """Drop what is gone or changed; returns what is to be encoded."""
        now = {entry.path: entry for entry in found}
        keep = [i for i, entry in enumerate(self.entries) if now.get(entry.path) == entry]
        self._dirty = self._dirty or len(keep) < len(self.entries)
        self.entries, self._rows = [self.entries[i] for i in keep], keep
        kept = {entry.path for entry in self.entries}
        return [entry for entry in found if entry.path not in kept]

    def add(self, entry: Entry, embedding: Floats) -> None:
        self.entries.append(entry)
        self._new.append(embedding)

    def save(self) -> None:
        """Write the file if anything is new; afterwards everything is in it."""
        if not self._new and not self._dirty:
            return
        header = header_for(self._model, self._folder, self.entries)
        write_index_file(self._path, header, self.entries, self._blocks())
        self._file = read_index_file(self._path)
        self._rows, self._new, self._dirty = list(range(len(self.entries))), [], False

    def _blocks(self) -> Iterator[Floats]:
        if self._file and self._rows:
            yield from self._file.rows(self._rows)
        if self._new:
            yield np.stack(self._new)


def _encoded(
    model: Model, folder: Path, entries: Sequence[Entry], skipped: list[Skipped]
) -> Iterable[tuple[Entry, Floats]]:
    """The pictures that can be read, with their embeddings; the others go to `skipped`."""
    readable: list[tuple[Entry, Picture]] = []
    for entry in entries:
        try:
            readable.append((entry, read_picture(folder / entry.path)))
        except (InputError, OSError) as problem:
            skipped.append(Skipped(entry.path, _reason(problem)))
    try:
        seen = model.encode_batch([picture for _, picture in readable], batch_size=max(1, len(readable)))
        return [(entry, each.embedding.copy()) for (entry, _), each in zip(readable, seen, strict=True)]
    except InputError:  # one that can be read but not be used; find out which
        return list(_one_by_one(model, readable, skipped))


def _one_by_one(
    model: Model, pictures: Sequence[tuple[Entry, Picture]], skipped: list[Skipped]
) -> Iterator[tuple[Entry, Floats]]:
    for entry, picture in pictures:
        try:
            yield entry, model.encode(picture).embedding.copy()
        except InputError as problem:
            skipped.append(Skipped(entry.path, _reason(problem)))


def _scan(folder: Path) -> tuple[list[Entry], list[Skipped]]:
    """The picture files of a folder and its subfolders, by path. Links to folders are not followed."""
    found: list[Entry] = []
    skipped: list[Skipped] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for name in files:
            if name.startswith(".") or not name.lower().endswith(PICTURE_SUFFIXES):
                continue
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            try:
                status = path.stat()
            except OSError as problem:
                skipped.append(Skipped(relative, _reason(problem)))
            else:
                found.append(Entry(relative, status.st_mtime_ns, status.st_size))
    return sorted(found, key=lambda entry: entry.path), skipped


def _seen_from(index: Path, folder: Path) -> str:
    """The folder's path, seen from the folder of the index; absolute where there is no way between the two."""
    target, origin = folder.resolve(), index.resolve().parent
    try:
        return Path(os.path.relpath(target, origin)).as_posix()
    except ValueError:  # other drives on Windows
        return target.as_posix()


def _reason(problem: Exception) -> str:
    return (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
