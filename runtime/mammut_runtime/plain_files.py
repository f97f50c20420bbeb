"""Opens the plain files of a folder, and nothing else: no links, pipes or subfolders.

What a link leads to lies outside the folder and may change without it, so it has no place where everything is checked.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from mammut_runtime.errors import BundleError


def plain_entries(folder: Path) -> set[str]:
    """Names of all files in a folder. Raises BundleError for anything that is not a file with one name."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: expected a folder, the bundle, as mammut-export makes it")
    names = {entry.name for entry in os.scandir(folder)}
    for name in sorted(names):
        check_regular(folder / name)
    return names


def check_regular(path: Path) -> os.stat_result:
    """The status of a plain file with one name. Raises BundleError for anything else, OSError if there is nothing."""
    return _checked(path, path.lstat())


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BufferedReader, os.stat_result]]:
    """Open a plain file, not through a link, and without waiting as a pipe would. Gives also its status, once open."""
    check_regular(path)
    extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, os.O_RDONLY | extra), "rb") as file:
        yield file, _checked(path, os.fstat(file.fileno()))  # again: it may have been exchanged in between


def read_regular(path: Path, most_bytes: int) -> tuple[bytes, os.stat_result]:
    """The content of a plain file of at most `most_bytes`, and its status when it was opened."""
    with open_regular(path) as (file, status):
        if status.st_size > most_bytes:
            raise BundleError(f"{path}: {status.st_size:,} bytes, expected at most {most_bytes:,}")
        return file.read(most_bytes + 1), status


def _checked(path: Path, status: os.stat_result) -> os.stat_result:
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(f"{path}: is a symbolic link; a bundle holds plain files only, put a copy in its place")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: is not a plain file; a bundle holds plain files only, remove it")
    if status.st_nlink > 1:
        raise BundleError(
            f"{path}: is a hard link (the file has {status.st_nlink} names); a bundle holds plain files only, "
            f"put a copy in its place"
        )
    return status
