"""Pages of mapped files are given back, and only those: the rest of the memory keeps its content."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mammut_runtime.engines.mapped_weights import LOCK, MappedWeights

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="does nothing where there is no /proc")
SIZE = 8 << 20


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "weights.bin"
    path.write_bytes(np.full(SIZE, 7, np.uint8).tobytes())
    yield path


def resident_bytes(path: Path) -> int:
    """How much of a file counts as this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def mapped(path: Path, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    with path.open("r+b") as stream:
        return mmap.mmap(stream.fileno(), 0, access=access)


def touched(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).sum(dtype=np.int64))


def test_pages_go_and_come_again(file: Path) -> None:
    with LOCK:
        weights = MappedWeights(file.parent)
        pages = mapped(file)
        weights.found()
    assert touched(pages) == 7 * SIZE and resident_bytes(file) == SIZE
    weights.give_back()
    assert resident_bytes(file) == 0
    assert touched(pages) == 7 * SIZE, "read again from the file"
    weights.forget()
    weights.give_back()
    assert resident_bytes(file) == SIZE, "control: what was forgotten stays"


def test_what_was_mapped_before_is_not_ours(file: Path) -> None:
    before = mapped(file)
    weights = MappedWeights(file.parent)
    weights.found()
    touched(before)
    weights.give_back()
    assert resident_bytes(file) == SIZE


def test_pages_that_can_be_written_are_left_alone(file: Path) -> None:
    """A private copy that was changed would be lost."""
    weights = MappedWeights(file.parent)
    private = mapped(file, mmap.ACCESS_COPY)
    private[:1] = b"x"
    weights.found()
    weights.give_back()
    assert private[:1] == b"x"


def test_what_is_no_longer_mapped_is_not_touched(file: Path) -> None:
    """Its addresses may belong to something else by now."""
    weights = MappedWeights(file.parent)
    pages = mapped(file)
    weights.found()
    pages.close()
    others = [np.full(SIZE, 3, np.uint8) for _ in range(4)]  # one of them is likely to get the same addresses
    weights.give_back()
    assert all((each == 3).all() for each in others)


def test_other_folders_are_not_ours(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    weights = MappedWeights(tmp_path / "other")
    pages = mapped(file)
    weights.found()
    touched(pages)
    weights.give_back()
    assert resident_bytes(file) == SIZE
