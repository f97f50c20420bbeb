"""The file of a picture index: its layout, read with suspicion and written whole or not at all.

    bytes        what
    8            b"MAMMUTIX"
    4            length of the header, little-endian
    header       JSON, see IndexHeader; then zeros up to a multiple of 64 bytes
    N * E * 4    embeddings, float32, unit length, one row per picture
    N * 8        modification times, int64 nanoseconds
    N * 8        sizes, int64 bytes
    N * 8        where each path ends in the block of paths, int64
    paths_bytes  paths relative to the folder, "/" between parts, as the file system encodes them

All numbers are little-endian. The embeddings are mapped, not read, so an index may be larger than memory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between, Length, from_dict, parse_json, to_json

MAGIC = b"MAMMUTIX"
MAX_HEADER_BYTES = 65_536
MAX_PATH_BYTES = 65_536
_ALIGNMENT = 64
_ROWS_AT_ONCE = 4096
_PER_PICTURE_BYTES = 24
"""The three tables of int64."""


@dataclass(frozen=True)
class IndexHeader:
    """What an index says about itself."""

    format: Literal[1]
    bundle: Annotated[str, Length(64, 64)]
    """Bundle.content_hash of the model that made the embeddings: those of another cannot be compared."""
    model: Annotated[str, Length(1, 300)]
    """Its name, for messages."""
    folder: Annotated[str, Length(1, 65_536)]
    """The pictures' folder, seen from the folder of the index, so that both can move together."""
    embed_dim: Annotated[int, Between(1, 16_384)]
    count: Annotated[int, Between(0, 1_000_000_000)]
    paths_bytes: Annotated[int, Between(0, 2**40)]


@dataclass(frozen=True)
class Entry:
    """One picture as it was when it was indexed."""

    path: str
    """Relative to the folder, "/" between parts."""
    mtime_ns: int
    size_bytes: int


@dataclass(frozen=True)
class IndexFile:
    """An index file, checked; the embeddings stay in the file."""

    path: Path
    header: IndexHeader
    entries: tuple[Entry, ...]
    start: int
    """Where the embeddings begin, bytes."""
    stamp: tuple[int, int, int]
    """Inode, size, modification time: tells whether the file is still the one that was read."""

    def embeddings(self) -> NDArray[np.float32]:
        """float32[N, E], mapped read-only. Empty for no pictures (nothing can be mapped then)."""
        shape = (self.header.count, self.header.embed_dim)
        if not self.header.count:
            return np.empty(shape, np.float32)
        return np.memmap(self.path, dtype="<f4", mode="r", offset=self.start, shape=shape)

    def rows(self, numbers: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        """The given rows in blocks, float32[n, E], read from the file. Raises InputError if it changed meanwhile."""
        with self.path.open("rb") as file:
            if _stamp(file) != self.stamp:
                raise InputError(f"{self.path} was changed by another program while it was updated; run again")
            width = 4 * self.header.embed_dim
            for begin in range(0, len(numbers), _ROWS_AT_ONCE):
                block = bytearray()
                for number in numbers[begin : begin + _ROWS_AT_ONCE]:
                    file.seek(self.start + number * width)
                    block += file.read(width)
                yield np.frombuffer(block, "<f4").reshape(-1, self.header.embed_dim)


def read_index_file(path: Path) -> IndexFile:
    """Open an index. Raises InputError for a file that is no index, is damaged, or of another format."""
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as problem:
        raise InputError(f"{path}: cannot be read as an index: {problem.strerror or problem}") from problem


def is_index_file(path: Path) -> bool:
    """Whether the file begins as an index does. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_index_file(
    path: Path, header: IndexHeader, entries: Sequence[Entry], blocks: Iterable[NDArray[np.float32]]
) -> None:
    """Write an index in the place of `path`, which stays as it was until the new one is whole.

    blocks: float32[n, E] each, together the rows of all entries. Raises OSError, for example for a full disk.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            encoded = to_json(header)
            file.write(MAGIC + struct.pack("<I", len(encoded)) + encoded)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for block in blocks:
                file.write(np.ascontiguousarray(block, "<f4").tobytes())
            paths = [_path_bytes(entry.path) for entry in entries]
            for table in (
                [entry.mtime_ns for entry in entries],
                [entry.size_bytes for entry in entries],
                np.cumsum([len(each) for each in paths], dtype=np.int64),
            ):
                file.write(np.asarray(table, "<i8").tobytes())
            file.write(b"".join(paths))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def paths_size(entries: Sequence[Entry]) -> int:
    """Bytes that the paths of the entries take in a file."""
    return sum(len(_path_bytes(entry.path)) for entry in entries)


def _read(path: Path, file: BinaryIO) -> IndexFile:
    if file.read(len(MAGIC)) != MAGIC:
        raise InputError(f"{path} is not a picture index; give another file name, or remove it to make one here")
    stamp = _stamp(file)
    length = int.from_bytes(file.read(4), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: damaged index: a header of {length} bytes; remove it and index again")
    text = file.read(length)
    hint = "remove the file and index again"
    header = from_dict(
        IndexHeader, parse_json(text, str(path), InputError, MAX_HEADER_BYTES), str(path), InputError, hint
    )
    start = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
    tables = start + 4 * header.count * header.embed_dim
    expected = tables + _PER_PICTURE_BYTES * header.count + header.paths_bytes
    if stamp[1] != expected:
        raise InputError(f"{path}: damaged index: {stamp[1]} bytes, expected {expected}; {hint}")
    file.seek(tables)
    mtimes, sizes, ends = (np.frombuffer(file.read(8 * header.count), "<i8").tolist() for _ in range(3))
    blob = file.read(header.paths_bytes)
    paths = _split_paths(blob, ends)
    if paths is None:
        raise InputError(f"{path}: damaged index: its paths do not fit; {hint}")
    entries = tuple(Entry(*each) for each in zip(paths, mtimes, sizes, strict=True))
    return IndexFile(path, header, entries, start, stamp)


def _split_paths(blob: bytes, ends: list[int]) -> list[str] | None:
    """The paths, or None if they are not plain relative ones. Whoever opens them must not be led out of the folder."""
    if (ends[-1] if ends else 0) != len(blob):
        return None
    paths = []
    for begin, end in pairwise([0, *ends]):
        if not 0 < end - begin <= MAX_PATH_BYTES:
            return None
        parts = os.fsdecode(blob[begin:end]).split("/")
        if any(part in ("", ".", "..") or "\0" in part or (os.sep != "/" and os.sep in part) for part in parts):
            return None
        paths.append("/".join(parts))
    return paths


def _path_bytes(path: str) -> bytes:
    return os.fsencode(path)


def _stamp(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
