"""Annotated copies of pictures and clips: their names in a folder, where they replace nothing."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.annotate import write_picture
from mammut_runtime.errors import InputError
from mammut_runtime.video.decode import CLIP_SUFFIXES

_PICTURE_SUFFIX = ".png"
CLIP_COPIES = (".mp4", ".avi")
"""Which of them is written depends on the OpenCV."""


def copy_stems(sources: Sequence[Path]) -> list[str]:
    """A name without suffix for the copy of each; those of the same name from different folders get -2, -3, ..."""
    taken: set[str] = set()
    stems: list[str] = []
    for each in sources:
        number = 1
        # case does not tell files apart everywhere
        while (stem := each.stem + (f"-{number}" if number > 1 else "")).casefold() in taken:
            number += 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def prepare_folder(folder: Path, sources: Sequence[Path], stems: Sequence[str]) -> None:
    """Make the folder, and see that no copy would take the place of a file. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"--annotate: {folder} cannot be made ({problem.strerror})") from problem
    for source, stem in zip(sources, stems, strict=True):
        suffixes = CLIP_COPIES if source.suffix.lower() in CLIP_SUFFIXES else (_PICTURE_SUFFIX,)
        for suffix in suffixes:
            refuse_existing(folder / f"{stem}{suffix}")


def refuse_existing(path: Path) -> None:
    """Raises InputError if there is something, be it a picture that was given or a copy of an earlier run."""
    if path.exists() or path.is_symlink():
        raise InputError(f"--annotate: {path} exists already, and nothing is replaced; give another folder")


def write_copy(folder: Path, stem: str, pixels: NDArray[np.uint8]) -> Path:
    """Write uint8[H, W, 3] RGB to folder/stem.png, which gets its name when it is whole. Raises InputError."""
    path = folder / f"{stem}{_PICTURE_SUFFIX}"
    part = folder / f".{stem}.{secrets.token_hex(4)}{_PICTURE_SUFFIX}"
    refuse_existing(path)
    try:
        write_picture(part, pixels)
        part.replace(path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(problem, OSError):
            raise InputError(f"--annotate: {path} cannot be written ({problem.strerror})") from problem
        raise
    return path
