"""Finds pictures in what the user names: folders, WebDataset tars, picture files and clips. Nothing is decoded here.

A tar is indexed once and then read by position, so that any of its pictures can be had without unpacking it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2

from mammut_calibration.notes import (
    MAX_NOTE_BYTES,
    Notes,
    notes_from_json,
    notes_from_row,
    notes_from_text,
)
from mammut_runtime.errors import InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
PAIRS_FILE = "pairs.jsonl"
MAX_PICTURE_BYTES = 256 * 2**20
MAX_FRAMES = 10_000_000
"""Of one clip; more than that is a damaged header, not a clip."""


@dataclass(frozen=True)
class Stored:
    """Bytes inside a file."""

    path: Path
    offset: int = 0
    size: int | None = None
    """None: to the end of the file."""

    def read(self, most_bytes: int) -> bytes:
        """Raises InputError if there are more, or they cannot be read."""
        try:
            size = self.path.stat().st_size - self.offset if self.size is None else self.size
            if size > most_bytes:
                raise InputError(f"{size:,} bytes, expected at most {most_bytes:,}")
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(size)
        except OSError as problem:
            raise InputError(f"cannot be read ({problem.strerror or problem})") from problem
        if len(data) != size:
            raise InputError(f"cut off after {len(data):,} of {size:,} bytes")
        return data


@dataclass(frozen=True)
class Frame:
    """A picture of a clip, and the part of the clip that begins with it."""

    path: Path
    index: int
    """Counted from 0."""
    time_s: float
    span: int = 1
    """Frames from this one to the next that is taken: the part of the clip that it stands for."""


@dataclass(frozen=True)
class Item:
    """A picture and where it and its notes lie."""

    name: str
    """For messages: the path, "shard.tar: KEY" or "clip.mp4 at 3.0 s"."""
    picture: Stored | Frame
    json: Stored | None = None
    text: Stored | None = None
    rows: tuple[str, ...] = ()
    """Lines of pairs.jsonl about it."""

    def notes(self) -> Notes:
        """Everything that is said about it. Raises InputError that names it for notes that cannot be used."""
        found = Notes()
        if self.json is not None:
            found = found.with_more(notes_from_json(self._read(self.json), f"{self.name} (json)"))
        if self.text is not None:
            found = found.with_more(notes_from_text(self._read(self.text), f"{self.name} (txt)"))
        for row in self.rows:
            found = found.with_more(notes_from_row(json.loads(row), self.name))
        return found

    def digest(self, clips: dict[Path, str]) -> str:
        """sha256 of what it is: the picture's bytes and what is said about it, not its name. clips: known hashes."""
        digest = hashlib.sha256()
        if isinstance(self.picture, Frame):
            if self.picture.path not in clips:
                clips[self.picture.path] = _file_hash(self.picture.path)
            digest.update(f"{clips[self.picture.path]} frame {self.picture.index}".encode())
        else:
            for part in (self.picture, self.json, self.text):
                try:
                    data = part.read(MAX_PICTURE_BYTES if part is self.picture else MAX_NOTE_BYTES) if part else b""
                except InputError as problem:  # it will be reported when its turn comes
                    data = str(problem).encode()
                digest.update(hashlib.sha256(data).digest())
        for row in self.rows:
            digest.update(hashlib.sha256(row.encode()).digest())
        return digest.hexdigest()

    def _read(self, note: Stored) -> bytes:
        try:
            return note.read(MAX_NOTE_BYTES)
        except InputError as problem:
            raise InputError(f"{self.name}: its notes: {problem}") from problem


def find_items(place: str | Path, frame_every_s: float) -> list[Item]:
    """Every picture of a place, in an order that does not depend on the file system.

    frame_every_s: time between the frames that are taken from a clip. Raises InputError for a place that does not
    exist, is of another kind, or holds no pictures.
    """
    path = Path(place)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected pictures, a WebDataset tar or clips")
    found = list(_in_folder(path, frame_every_s) if path.is_dir() else _in_file(path, frame_every_s))
    if not found:
        raise InputError(
            f"{path}: no pictures; expected {', '.join(PICTURE_SUFFIXES)}, a tar with such files, "
            f"or clips ({', '.join(CLIP_SUFFIXES)})"
        )
    return found


def _in_file(path: Path, frame_every_s: float) -> Iterator[Item]:
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix == ".tar":
        yield from _in_tar(path)
    elif suffix in CLIP_SUFFIXES:
        yield from _in_clip(path, frame_every_s)
    elif suffix in PICTURE_SUFFIXES:
        yield _picture_file(path, ())
    elif path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        raise InputError(f"{path}: a compressed tar; expected a plain one, unpack it once with gunzip or the like")
    else:
        expected = ", ".join((*PICTURE_SUFFIXES, ".tar", *CLIP_SUFFIXES))
        raise InputError(f"{path}: expected a folder or a file that ends in one of {expected}")


def _in_folder(folder: Path, frame_every_s: float) -> Iterator[Item]:
    rows = _rows(folder)
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            suffix = path.suffix.lower()
            if name.startswith(".") or not path.is_file():  # opening a pipe would wait for ever
                continue
            if suffix in PICTURE_SUFFIXES:
                yield _picture_file(path, tuple(rows.pop(path.relative_to(folder).as_posix(), ())))
            elif suffix == ".tar":
                yield from _in_tar(path)
            elif suffix in CLIP_SUFFIXES:
                yield from _in_clip(path, frame_every_s)
    if rows:
        raise InputError(f"{folder / PAIRS_FILE}: names {next(iter(rows))[:80]!r}, which is not a picture in {folder}")


def _picture_file(path: Path, rows: tuple[str, ...]) -> Item:
    beside = {suffix: path.with_suffix(suffix) for suffix in (".json", ".txt")}
    notes = {suffix: Stored(each) if each.is_file() else None for suffix, each in beside.items()}
    return Item(str(path), Stored(path), notes[".json"], notes[".txt"], rows)


def _rows(folder: Path) -> dict[str, list[str]]:
    """Picture -> lines about it in the folder's pairs.jsonl; each names its picture with the key "file"."""
    path = folder / PAIRS_FILE
    found: dict[str, list[str]] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row["file"]
            except (ValueError, TypeError, KeyError, RecursionError) as problem:
                raise InputError(f'{where}: expected a JSON object with the key "file", got {line[:60]!r}') from problem
            if not isinstance(name, str):
                raise InputError(f"{where}: file: expected a text, got {name!r}")
            notes_from_row(row, where)
            found.setdefault(PurePosixPath(name).as_posix(), []).append(line)
    return found


def _in_tar(path: Path) -> Iterator[Item]:
    """Pictures of a WebDataset tar: members of one name up to its first dot belong together."""
    samples: dict[str, dict[str, Stored]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                base = PurePosixPath(member.name)
                if member.isreg() and not base.name.startswith(".") and not member.issparse():
                    stem, _, suffix = base.name.partition(".")
                    stored = Stored(path, member.offset_data, member.size)
                    samples.setdefault(str(base.with_name(stem)), {})[f".{suffix.lower()}"] = stored
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise InputError(f"{path}: cannot be read as a tar: {problem}; expected a WebDataset tar") from problem
    for key, parts in samples.items():
        picture = next((parts[suffix] for suffix in PICTURE_SUFFIXES if suffix in parts), None)
        if picture is not None:
            yield Item(f"{path}: {key}", picture, parts.get(".json"), parts.get(".txt"))


def _in_clip(path: Path, frame_every_s: float) -> Iterator[Item]:
    """Frames of a clip, evenly in time. A clip that cannot be opened gives one item, which fails when it is read."""
    capture = cv2.VideoCapture(str(path))
    try:
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    fps = fps if 0 < fps <= 1000 else 25.0
    frames = int(count) if 1 <= count <= MAX_FRAMES else 1
    step = max(1, round(fps * frame_every_s))
    for index in range(0, frames, step):
        yield Item(f"{path} at {index / fps:.1f} s", Frame(path, index, index / fps, step))


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from problem
