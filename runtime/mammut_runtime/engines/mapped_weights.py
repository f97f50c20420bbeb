"""Gives memory back that an engine needed only to open a graph: pages of mapped weights that it has copied since.

An engine that maps weights.bin and packs the matrices into a layout of its own has read every page once, and the pages
stay counted as this process's memory although nothing looks at them again: on OpenVINO they doubled the resident size
of a bundle. Given back, they cost nothing; whatever does read one again gets it from the file.

Linux only. Elsewhere `MappedWeights` does nothing, and the system takes such pages by itself when it needs memory.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

LOCK = threading.Lock()
"""Held while an engine maps its files, so that each knows which mappings are its own."""
_MADV_DONTNEED = 4


class MappedWeights:
    """The files of a folder that were mapped since this was made; make it, and call `found`, while holding LOCK."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve()) + "/"
        self._before = set(_read_only_mappings(self._folder))
        self._ours: list[tuple[int, int]] = []

    def found(self) -> None:
        """Remember what was mapped since. Only what stays mapped for as long as `give_back` may be called counts."""
        self._ours = [each for each in _read_only_mappings(self._folder) if each not in self._before]

    def give_back(self) -> None:
        """Let the pages go. Safe at any time, also while they are read: what is no longer mapped is not touched."""
        if not self._ours:
            return
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc's; it keeps what packing has freed
            libc.malloc_trim(0)
        still_there = set(_read_only_mappings(self._folder))
        for start, end in self._ours:
            if (start, end) in still_there:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)

    def forget(self) -> None:
        """They may be unmapped from now on."""
        self._ours = []


def _read_only_mappings(folder: str) -> list[tuple[int, int]]:
    """Start and end address of files in `folder` that are mapped without the right to write, so without changes that
    letting go could lose."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith("r--") and fields[5].startswith(folder):
            start, end = fields[0].split("-")
            found.append((int(start, 16), int(end, 16)))
    return found
