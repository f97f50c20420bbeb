"""A vocabulary as a file: JSON that people can read, with the embeddings in base64; written whole or not at all."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np

from mammut_runtime.detection.boxes import Floats
from mammut_runtime.detection.rule import MAX_NAMES
from mammut_runtime.detection.vocabulary import Entry, Vocabulary
from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between, Length, Matching, from_dict, parse_json, to_dict, to_json

FORMAT: Final = 1
MAX_FILE_BYTES = 512 * 2**20
"""10,000 names with 8192 components each are 437 MB in base64."""
_UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of an embedding may be."""

Hash = Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]
Note = Annotated[str, Length(0, 2000)]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """The file."""

    kind: Literal["mammut vocabulary"] = "mammut vocabulary"
    format: Literal[1] = FORMAT
    bundle: Hash
    model: Annotated[str, Length(0, 300)]
    templates: Annotated[tuple[Annotated[str, Length(2, 1000)], ...], Length(0, 10_000)]
    calibrated_for: Hash | None
    notes: Annotated[dict[Annotated[str, Length(1, 200)], Note], Length(0, 2 * MAX_NAMES)]
    entries: Annotated[tuple[Entry, ...], Length(1, MAX_NAMES)]
    embed_dim: Annotated[int, Between(1, 16_384)]
    embeddings: str
    """base64 of float32[C, E], little-endian, row by row."""


def write_vocabulary(vocabulary: Vocabulary, path: Path, overwrite: bool) -> None:
    """Write the file in the place of `path`. Raises InputError, also for values that `read_vocabulary` refuses."""
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; give another name, or allow to overwrite it")
    rows = np.ascontiguousarray(vocabulary.embeddings, "<f4")
    written = _Written(
        bundle=vocabulary.bundle,
        model=vocabulary.model,
        templates=vocabulary.templates,
        calibrated_for=vocabulary.calibrated_for,
        notes=dict(vocabulary.notes),
        entries=vocabulary.entries,
        embed_dim=rows.shape[1],
        embeddings=base64.b64encode(rows.tobytes()).decode("ascii"),
    )
    from_dict(_Written, to_dict(written), str(path), InputError, "nothing was written")
    _check_unit(vocabulary.embeddings, vocabulary.entries, str(path), "nothing was written")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(to_json(written))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(problem, OSError):
            raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem
        raise


def read_vocabulary(path: Path) -> Vocabulary:
    """Read and check the file. Raises InputError."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {size:,} bytes, expected at most {MAX_FILE_BYTES:,}; this is no vocabulary")
        text = path.read_bytes()
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"{path}: cannot be read as a vocabulary: {reason}") from problem
    hint = "make the vocabulary again (mammut-run vocabulary make)"
    data = parse_json(text, str(path), InputError, MAX_FILE_BYTES)
    if not isinstance(data, dict) or data.get("kind") != "mammut vocabulary":
        raise InputError(f"{path}: not a vocabulary; expected a file that Vocabulary.save wrote")
    written = from_dict(_Written, data, str(path), InputError, hint)
    count, width = len(written.entries), written.embed_dim
    try:
        raw = base64.b64decode(written.embeddings, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise InputError(f"{path}: embeddings: not base64 ({problem}); {hint}") from problem
    if len(raw) != 4 * count * width:
        raise InputError(f"{path}: embeddings: {len(raw):,} bytes, expected {4 * count * width:,}; {hint}")
    rows = np.frombuffer(raw, "<f4").reshape(count, width).astype(np.float32)
    _check_unit(rows, written.entries, str(path), hint)
    try:
        return Vocabulary(
            written.entries,
            rows,
            written.bundle,
            written.model,
            written.templates,
            written.calibrated_for,
            written.notes,
        )
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from problem


def _check_unit(rows: Floats, entries: Sequence[Entry], where: str, hint: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        unit = np.abs(np.linalg.norm(rows, axis=1) - 1) <= _UNIT_TOLERANCE
    if not unit.all():
        name = entries[int(np.flatnonzero(~unit)[0])].name
        raise InputError(f"{where}: embeddings: that of {name!r} is not of length 1; {hint}")
