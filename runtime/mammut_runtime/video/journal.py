"""What was captioned of a clip so far, one line a scene, only ever appended to: a killed run goes on where it was.

    header   {"format": 1, "clip": {...}, "bundle": ..., "settings": ...}   crc
    scene    a cue                                                          crc
    ...
    end      {"end": {...health...}}                                        crc

Each line is JSON, a tab, and the CRC-32 of the JSON. Reading stops at the first line that is not whole, which is what a
killed writer or a lost power supply leaves; the next run cuts it off and goes on. A journal of another clip, bundle or
setting is never mixed with this one: it is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal

from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between, Length, from_dict, parse_json, to_dict
from mammut_runtime.video.cues import Cue

FORMAT: Literal[1] = 1
_PROBE_BYTES = 2**20
_LONGEST_LINE = 16 * 2**20
Hash = Annotated[str, Length(64, 64)]


@dataclass(frozen=True)
class ClipIdentity:
    """Which file it was. Not the whole content: hashing hours of video takes longer than decoding some of it."""

    size_bytes: Annotated[int, Between(0, 2**62)]
    sha256_ends: Hash
    """Of the first and the last MiB."""


@dataclass(frozen=True)
class JournalHeader:
    """What a journal's lines belong to."""

    format: Literal[1]
    clip: ClipIdentity
    bundle: Hash
    """Bundle.content_hash."""
    settings: Hash
    """Of everything else that the cues depend on."""


@dataclass(frozen=True)
class JournalEnd:
    """The last line: every scene is there, and the files were written."""

    frames: int
    unreadable: int
    repaired_times: int
    missing: int
    short_s: float


class Journal:
    """An open journal, locked: two runs never write into the same one."""

    def __init__(self, path: Path, file: BinaryIO, scenes: list[Cue], end: JournalEnd | None) -> None:
        """Made by Journal.open."""
        self.path, self._file = path, file
        self.scenes = scenes
        """What was captioned so far."""
        self.end = end

    @classmethod
    def open(cls, path: Path, header: JournalHeader, fresh: bool = False) -> Journal:
        """Open the journal, or begin it. fresh: forget what it holds.

        Raises InputError if it belongs to another clip, bundle or settings, or another run has it open; OSError if it
        cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b", buffering=0)
        try:
            _lock(file, path)
            if fresh:
                file.truncate(0)
            lines, whole = _whole_lines(file, path)
            scenes, end = _content(lines, header, path) if lines else ([], None)
            file.truncate(whole)
            file.seek(whole)
            journal = cls(path, file, scenes, end)
            if not lines:
                journal._append(to_dict(header))
            return journal
        except BaseException:
            file.close()
            raise

    def add(self, scene: Cue) -> None:
        """Append a scene. Raises OSError, for a full disk with what to do about it."""
        self._append(to_dict(scene))
        self.scenes.append(scene)

    def finish(self, end: JournalEnd) -> None:
        """Append the end, and see to it that all is on the disk."""
        self._append({"end": to_dict(end)})
        try:
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise storage_error(problem, self.path) from problem
        self.end = end

    def close(self) -> None:
        """Lets others have it."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _append(self, value: dict[str, Any]) -> None:
        line = _encoded(value)
        try:
            written = self._file.write(line)  # one unbuffered write: a kill leaves it whole, or cut, or not at all
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as problem:
            raise storage_error(problem, self.path) from problem


def identify(path: Path) -> ClipIdentity:
    """Which file this is. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(_PROBE_BYTES))
            file.seek(max(0, size - _PROBE_BYTES))
            digest.update(file.read(_PROBE_BYTES))
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    return ClipIdentity(size, digest.hexdigest())


def storage_error(problem: OSError, path: Path) -> OSError:
    """The same error with the file it is about, and what to do where the disk is full."""
    message = problem.strerror or str(problem)
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message += "; free some space and run the same command again: it goes on where it was"
    return OSError(problem.errno, message, str(path))


def _encoded(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return text + b"\t%08x\n" % zlib.crc32(text)


def _whole_lines(file: BinaryIO, path: Path) -> tuple[list[bytes], int]:
    """The JSON of the lines up to the first damaged one, and where they end, in bytes.

    Raises InputError for a file that is not a journal at all: it is somebody's, and is not written into.
    """
    file.seek(0)
    lines: list[bytes] = []
    end = 0
    with open(file.fileno(), "rb", closefd=False) as reader:
        while line := reader.readline(_LONGEST_LINE):
            text, _, crc = line.rstrip(b"\n").rpartition(b"\t")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                if not lines and not _may_be_header(line):
                    raise InputError(f"{path}: not a journal of captions; move it away, or give another --out")
                break
            lines.append(text)
            end += len(line)
    return lines, end


def _may_be_header(line: bytes) -> bool:
    """Whether this is a header, or as much of one as a full disk or a lost power supply may have left."""
    start = b'{"format":'
    return line.startswith(start) or start.startswith(line) or not line.strip(b"\0")


def _content(lines: Sequence[bytes], header: JournalHeader, path: Path) -> tuple[list[Cue], JournalEnd | None]:
    where = str(path)
    hint = "begin anew with --overwrite"

    def read(line: bytes) -> object:
        return parse_json(line, where, InputError, _LONGEST_LINE)

    found = from_dict(JournalHeader, read(lines[0]), where, InputError, hint)
    for name, what in (("clip", "another clip"), ("bundle", "another bundle"), ("settings", "other settings")):
        if getattr(found, name) != getattr(header, name):
            raise InputError(f"{path}: what is there was made from {what}; give another --out, or {hint}")
    scenes: list[Cue] = []
    for line in lines[1:]:
        value = read(line)
        if isinstance(value, dict) and set(value) == {"end"}:
            return scenes, from_dict(JournalEnd, value["end"], where, InputError, hint)
        scenes.append(from_dict(Cue, value, where, InputError, hint))
    return scenes, None


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed, or this process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # Windows: there, two runs at once are the user's to avoid
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        raise InputError(f"{path}: another run is captioning this clip into the same folder; wait for it") from problem
