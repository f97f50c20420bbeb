"""Retrieval in bounded memory: embeddings go to a file as they come, ranks are counted block by block.

A query's rank is the number of wrong items that fit at least as well as its best right one: equal scores count against
it, so a model that gives everything one embedding finds nothing. Each block of scores serves both directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

BLOCK = 4096
"""Pictures and texts compared at once: 64 MB of scores."""
TIE = np.float32(1e-6)
"""Cosines closer than this are equal: float32 products of one pair differ by about as much from block to block."""
_GATHER = 16_384
"""Rows compared with one query at once."""


class Rows(Protocol):
    """float32[N, E], of which slices are looked at: an array, or a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> F32: ...


class EmbeddingFile:
    """Rows float32[N, E] in a file: written one batch after another, then read in slices.

    Not a memory map: its pages would count as this process's memory until the system wants them back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._rows, self._width = 0, 0

    def append(self, rows: F32) -> None:
        """Add float32[n, E] at the end."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(rows, np.float32).data)
        self._rows, self._width = self._rows + len(rows), rows.shape[1]

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: slice) -> F32:
        """Rows of a slice without step."""
        start, stop, _ = key.indices(self._rows)
        self._file.flush()
        count, offset = max(0, stop - start) * self._width, start * self._width * 4
        return np.fromfile(self._path, np.float32, count, offset=offset).reshape(-1, max(1, self._width))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def ranks(
    pictures: Rows,
    texts: Rows,
    picture_of: Ints,
    block: int = BLOCK,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Ints, Ints]:
    """The rank (0 is best) of each picture's best text among all texts, and of each text's picture among all pictures.

    pictures: float32[P, E], texts: float32[T, E], unit length. picture_of: int64[T], each text's picture, ascending.
    progress: called with (done, to do) pictures. A picture without a text has the rank T; scores that are not numbers
    count against a query. Holds a few numbers for each picture and text, and one block of scores.
    """
    own = _own_scores(pictures, texts, picture_of, block)
    best = np.full(len(pictures), np.float32(2.0))
    has_text = np.zeros(len(pictures), np.bool_)
    has_text[picture_of] = True
    best[has_text] = -2.0
    with np.errstate(invalid="ignore"):  # a broken model's NaN is carried on, and finds nothing
        np.maximum.at(best, picture_of, own)
    picture_ranks = np.zeros(len(pictures), np.int64)
    text_ranks = np.zeros(len(texts), np.int64)
    # Used again for every block: asking the system for 64 MB each time took longer than filling them.
    size = min(block, len(pictures)), min(block, len(texts))
    table, less = np.empty(size, np.float32), np.empty(size, np.bool_)
    for start in range(0, len(pictures), block):
        stop = min(start + block, len(pictures))
        rows = pictures[start:stop]
        for begin in range(0, len(texts), block):
            end = min(begin + block, len(texts))
            scores = np.matmul(rows, texts[begin:end].T, out=table[: stop - start, : end - begin])
            first, last = np.searchsorted(picture_of[begin:end], [start, stop])
            columns = np.arange(first, last)
            scores[picture_of[begin + first : begin + last] - start, columns] = -np.inf
            worse = np.less_equal(scores, (best[start:stop] - TIE)[:, None], out=less[: stop - start, : end - begin])
            picture_ranks[start:stop] += end - begin - np.count_nonzero(worse, axis=1)
            worse = np.less_equal(scores, (own[begin:end] - TIE)[None, :], out=worse)
            text_ranks[begin:end] += stop - start - np.count_nonzero(worse, axis=0)
        if progress:
            progress(stop, len(pictures))
    picture_ranks[~has_text] = len(texts)
    return picture_ranks, text_ranks


def _own_scores(pictures: Rows, texts: Rows, picture_of: Ints, block: int) -> F32:
    """float32[T]: each text's score with its own picture. Ascending, so that pictures are read in stretches."""
    own = np.empty(len(texts), np.float32)
    for begin in range(0, len(texts), block):
        end = min(begin + block, len(texts))
        first = int(picture_of[begin])
        beside = pictures[first : int(picture_of[end - 1]) + 1][picture_of[begin:end] - first]
        own[begin:end] = np.einsum("te,te->t", texts[begin:end], beside)
    return own


def nearest(query: F32, items: Rows, count: int) -> Ints:
    """The `count` rows of `items` that fit float32[E] best, best first, block by block."""
    scores, rows = np.empty(0, np.float32), np.empty(0, np.int64)
    for begin in range(0, len(items), _GATHER):
        part = items[begin : begin + _GATHER] @ query
        scores = np.concatenate([scores, part])
        rows = np.concatenate([rows, np.arange(begin, begin + len(part))])
        order = np.argsort(-scores, kind="stable")[:count]
        scores, rows = scores[order], rows[order]
    return rows
