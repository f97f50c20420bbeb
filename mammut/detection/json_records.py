"""Reads large JSON files of records one record at a time: the memory of one record, and time that grows with the file.

Annotation files of detection are hundreds of megabytes, mostly outlines that nobody here needs. Each record is parsed,
handed on and forgotten; a record that cannot be parsed is named by its place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from mammut_runtime.errors import InputError

MAX_FILE_BYTES = 16 * 2**30
MAX_RECORD_CHARACTERS = 64 * 2**20
"""Of one record, its outline included."""
_CHUNK = 2**20
_NEAR_END = 64
"""A mistake that is found so close to the end of what was read may only be a record that goes on."""
_SPACE = " \t\r\n"


def keyed_records(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """The records of {"images": [...], "annotations": [...]}, in the file's order: (key, place in its list, value).

    wanted: the keys whose lists are read; each must be there. Other keys are passed over.
    Raises InputError that names file, key and place: no such file, not JSON, cut off, a key given twice or missing.
    """
    with _opened(path) as file:
        text = _Text(file, path)
        if text.peek() != "{":
            raise InputError(f"{path}: expected an object with {', '.join(wanted)}, got {text.shown()}")
        seen: set[str] = set()
        for key in text.object_keys():
            if key in seen:
                raise InputError(f"{path}: the key {key[:40]!r} is given twice")
            seen.add(key)
            if text.peek() == "[":
                for place, value in enumerate(text.elements(key)):
                    if key in wanted:
                        yield key, place, value
            elif key in wanted:
                raise InputError(f"{path}: {key}: expected a list, got {text.shown()}")
            else:
                text.value(key)
        text.end()
        missing = [key for key in wanted if key not in seen]
        if missing:
            raise InputError(
                f"{path}: no field {missing[0]!r}; it has {', '.join(sorted(seen)[:8]) or 'nothing'}; expected "
                f"an object with {', '.join(wanted)}"
            )


def listed_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file that is one list: (place, value). Raises InputError as keyed_records does."""
    with _opened(path) as file:
        text = _Text(file, path)
        if text.peek() != "[":
            raise InputError(f"{path}: expected a list of records, got {text.shown()}")
        yield from enumerate(text.elements(""))
        text.end()


def _opened(path: Path) -> IO[str]:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected a JSON file of records")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: more than {MAX_FILE_BYTES:,} bytes; expected a data set's annotations")
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from problem


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class _Text:
    """A file's text, read forward by chunks; what was parsed is forgotten."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._whole = "", 0, False
        self._decoder = json.JSONDecoder(parse_constant=_constant)

    def peek(self) -> str:
        """The next character that is not space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def object_keys(self) -> Iterator[str]:
        """Keys of the object that begins here; the caller reads each key's value before the next."""
        self._take("{", "")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                self._fail("", f"expected a key in quotes, got {self.shown()}")
            key = str(self.value(""))
            self._take(":", key)
            yield key
            if self._take(",}", key) == "}":
                return

    def elements(self, key: str) -> Iterator[Any]:
        """Values of the list that begins here."""
        self._take("[", key)
        if self.peek() == "]":
            self._at += 1
            return
        place = 0
        while True:
            where = f"{key}[{place}]"
            yield self.value(where)
            place += 1
            if self._take(",]", where) == "]":
                return

    def value(self, where: str) -> Any:
        """The value that begins here, whatever it is."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as problem:
                broken = not problem.msg.startswith("Unterminated") and problem.pos < len(self._text) - _NEAR_END
                if broken or not self._more(double=True):
                    self._fail(where, problem.msg if broken else f"cut off: {problem.msg}")
            except RecursionError:
                self._fail(where, "objects or lists are nested too deeply")
            except ValueError as problem:  # NaN, or more digits than Python takes
                self._fail(where, str(problem))
            else:
                if self._is_whole(end) or not self._more():
                    self._at = end
                    return value

    def _is_whole(self, end: int) -> bool:
        """Whether a value that ends here surely ends here: 0 may be the beginning of 0.5, and that of 0.5e-3."""
        if self._text[self._at] in '{["' or end <= len(self._text) - _NEAR_END:
            return True
        return end < len(self._text) and self._text[end] in _SPACE + ",]}"

    def end(self) -> None:
        """Raises InputError where anything follows."""
        if self.peek():
            self._fail("", f"expected the end of the file, got {self.shown()}")

    def shown(self) -> str:
        """What begins here, for a message."""
        self.peek()
        return repr(self._text[self._at : self._at + 30]) if self._at < len(self._text) else "the end of the file"

    def _take(self, expected: str, where: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            self._fail(where, f"expected {' or '.join(expected)} after it, got {self.shown()}")
        self._at += 1
        return found

    def _more(self, double: bool = False) -> bool:
        """Read on. False at the end of the file. double: as much again as is held, so that long records stay linear."""
        held = len(self._text) - self._at
        if held > MAX_RECORD_CHARACTERS:
            self._fail("", f"a record of more than {MAX_RECORD_CHARACTERS:,} characters")
        try:
            new = "" if self._whole else self._file.read(max(_CHUNK, held if double else 0))
        except OSError as problem:
            raise InputError(f"{self._path}: cannot be read ({problem.strerror})") from problem
        except UnicodeDecodeError as problem:
            raise InputError(f"{self._path}: not UTF-8 text ({problem.reason}); expected JSON") from problem
        if not new:
            self._whole = True
            return False
        self._text, self._at = self._text[self._at :] + new, 0
        return True

    def _fail(self, where: str, problem: str) -> NoReturn:
        place = f"{where}: " if where else ""
        raise InputError(f"{self._path}: {place}not JSON, or damaged: {problem}")
