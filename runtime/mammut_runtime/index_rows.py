"""What indices of pictures and of moments do alike: whose model they are, their header, and their best rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.index_file import Entry, IndexFile, IndexHeader, paths_size
from mammut_runtime.model import Model

Floats = NDArray[np.float32]

MAX_HITS = 10_000
_ROWS_AT_ONCE = 65_536
"""Rows compared at once: bounds the memory of a search to some 100 MB however large the index."""


def header_for(model: Model, folder: str, entries: Sequence[Entry]) -> IndexHeader:
    """The header of an index of this model. folder: what the paths of the entries are relative to."""
    info = model.manifest.model
    return IndexHeader(
        1, model.bundle.content_hash, info.name, folder, info.embed_dim, len(entries), paths_size(entries)
    )


def check_model(file: IndexFile, model: Model) -> None:
    """Raises InputError if an index was made with another model, or does not fit its own."""
    header, info = file.header, model.manifest.model
    if header.bundle != model.bundle.content_hash:
        raise InputError(
            f"{file.path} was made with another model ({header.model}, {header.bundle[:12]}; this one is {info.name}, "
            f"{model.bundle.content_hash[:12]}); rebuild the index (--rebuild) or load that bundle"
        )
    if header.embed_dim != info.embed_dim:
        raise InputError(f"{file.path}: damaged index: {header.embed_dim} components; rebuild the index")


def best_rows(
    embeddings: Floats, vector: Floats, count: int, inside: NDArray[np.bool_] | None = None
) -> list[tuple[int, float]]:
    """The rows most like a vector, best first, each with its cosine; at most `count`, of equal ones the first.

    embeddings: float32[N, E] of unit length, may be mapped; rows that are no numbers are left out. vector: float32[E].
    inside: bool[N], rows that count. Raises InputError for a count that is not 1 to 10,000.
    """
    if not 1 <= count <= MAX_HITS:
        raise InputError(f"the number of hits must be from 1 to {MAX_HITS}, got {count}")
    scores, rows = np.empty(0, np.float32), np.empty(0, np.int64)
    for begin in range(0, len(embeddings), _ROWS_AT_ONCE):
        block = embeddings[begin : begin + _ROWS_AT_ONCE] @ vector
        usable = np.isfinite(block)
        if inside is not None:
            usable &= inside[begin : begin + _ROWS_AT_ONCE]
        scores = np.concatenate([scores, block[usable]])
        rows = np.concatenate([rows, begin + np.flatnonzero(usable)])
        order = np.argsort(-scores, kind="stable")[:count]
        scores, rows = scores[order], rows[order]
    return [(int(row), float(score)) for row, score in zip(rows, scores, strict=True)]
