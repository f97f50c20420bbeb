"""Reads JSON into frozen dataclasses and refuses, by name, everything that does not fit.

One reader for the two descriptions this software lives by: the bundle's manifest and the checkpoint's config. A key
that nobody knows, a key that is missing, a number out of range or of the wrong type is an error that says where it
stands (`manifest.json: graphs.vision.inputs[0].shape[1]: ...`), never something ignored.

What a field accepts is its annotation: `int`, `float` (finite; an integer is accepted), `str`, `bool`, `Literal[...]`,
`X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, another dataclass, `int | str`, and any of these (a key of a
dict too) inside `Annotated[..., limit]` with the limits below. What depends on several fields belongs into the
dataclass's `__post_init__`, which raises ValueError; the reader adds the path. Every key must be there, also those of
fields that have a default: what a file does not say, its reader would have to guess. The exception is
`Annotated[..., Omissible()]`, for what files of earlier versions cannot say.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from mammut_runtime.errors import MammutError

T = TypeVar("T")

_SHOWN_CHARACTERS = 80
"""How much of a refused key or text an error message repeats."""


_MOST_DIGITS = 20
"""No whole number of ours needs more (2**64 has 20); Python's own reader takes time quadratic in the digits."""


class Limit(Protocol):
    """A rule beyond the type; stands in `Annotated[type, limit]`."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with the value, as the end of a sentence, or None."""


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`, both allowed."""

    low: float
    high: float

    def problem(self, value: Any) -> str | None:
        if self.low <= value <= self.high:
            return None
        return f"expected a number from {self.low:,} to {self.high:,}, got {_shown(value)}"


@dataclass(frozen=True)
class Length:
    """A text, list or object with `low` to `high` characters, items or keys, both allowed."""

    low: int
    high: int

    def problem(self, value: Any) -> str | None:
        if self.low <= len(value) <= self.high:
            return None
        unit = "characters" if isinstance(value, str) else "keys" if isinstance(value, dict) else "items"
        return f"expected {self.low:,} to {self.high:,} {unit}, got {len(value):,}"


@dataclass(frozen=True)
class Matching:
    """A text that `pattern` (a regular expression) matches from its first to its last character."""

    pattern: str
    meaning: str
    """What the pattern accepts, in words; the message says "expected {meaning}"."""

    def problem(self, value: Any) -> str | None:
        if re.fullmatch(self.pattern, value):
            return None
        return f"expected {self.meaning}, got {_shown(value)}"


@dataclass(frozen=True)
class Omissible:
    """A key that may be left out, for a field with a default that means "there is none". Written only where the field
    holds something else, so that files without it stay the same bytes."""

    def problem(self, value: Any) -> str | None:
        return None


def from_dict(cls: type[T], data: object, where: str, error: type[MammutError], hint: str = "") -> T:
    """Build the dataclass `cls` from what `json.loads` gave.

    where: named first in every message, usually the file's name. error: the class of the error raised.
    hint: what to do next, added to every message after "; ".
    Raises `error` when a key is unknown or missing, or a value has another type or range than its field.
    """

    def fail(path: str, problem: str) -> NoReturn:
        raise error(": ".join(part for part in (where, path, problem) if part) + (f"; {hint}" if hint else ""))

    value: T = _read(cls, data, "", fail)
    return value


def to_dict(value: Any) -> Any:
    """The plain form of a dataclass: objects, lists, numbers, texts. `from_dict` of it gives an equal dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        omissible = _omissible(type(value))
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        kept = {name: each for name, each in fields.items() if name not in omissible or each != omissible[name]}
        return {name: to_dict(each) for name, each in kept.items()}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def parse_json(text: bytes, where: str, error: type[MammutError], max_bytes: int = 4_000_000) -> object:
    """`json.loads` for files that somebody may have edited.

    Raises `error` for text that is not UTF-8 or not JSON, larger than `max_bytes`, nested too deeply, with a key given
    twice in one object, or with NaN or Infinity (which JSON does not have, and Python's reader takes).
    """
    if len(text) > max_bytes:
        raise error(f"{where}: {len(text):,} bytes, expected at most {max_bytes:,}; this is not a file that we wrote")

    def object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise error(f"{where}: the key {_shown(key)} is given twice in one object")
            result[key] = value
        return result

    def constant(name: str) -> NoReturn:
        raise error(f"{where}: {name} is not a JSON number; expected finite numbers only")

    def whole(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise error(f"{where}: a whole number of {len(digits):,} digits; expected at most {_MOST_DIGITS}")
        return int(digits)

    try:
        parsed: object = json.loads(
            text.decode("utf-8"), object_pairs_hook=object_of, parse_constant=constant, parse_int=whole
        )
    except RecursionError:
        raise error(f"{where}: objects or lists are nested too deeply") from None
    except ValueError as problem:  # not JSON, or not UTF-8
        raise error(f"{where}: not readable as JSON: {problem}") from None
    return parsed


def to_json(value: Any) -> bytes:
    """The dataclass as UTF-8 JSON, indented, keys in field order, ending in a newline: the same value, the same bytes.

    Raises ValueError for NaN and infinities.
    """
    return (json.dumps(to_dict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


_Fail = Callable[[str, str], NoReturn]
"""Takes the path inside the file and what is wrong there; raises."""

_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    types.NoneType: ((types.NoneType,), "null"),
}
"""Annotation → the types that JSON may give for it, and what a message calls it."""


def _read(kind: Any, value: Any, path: str, fail: _Fail) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *limits = get_args(kind)
        result = _read(inner, value, path, fail)
        for limit in limits:
            if problem := limit.problem(result):
                fail(path, problem)
        return result
    if kind in _PLAIN:
        return _read_plain(kind, value, path, fail)
    if origin is Literal:
        choices = get_args(kind)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            fail(path, f"expected one of {', '.join(map(repr, choices))}, got {_shown(value)}")
        return value
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), value, path, fail)
    if origin is tuple:
        return _read_tuple(get_args(kind), value, path, fail)
    if origin is dict:
        if not isinstance(value, dict):
            fail(path, f"expected an object, got {_shown(value)}")
        of_key, of_value = get_args(kind)
        return {
            _read(of_key, key, path, fail): _read(of_value, each, _joined(path, key), fail)
            for key, each in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, path, fail)
    raise TypeError(f"{kind!r} is not an annotation that this reader knows (see the module's docstring)")


def _read_plain(kind: Any, value: Any, path: str, fail: _Fail) -> Any:
    accepted, name = _PLAIN[kind]
    if type(value) not in accepted:  # exact types: isinstance would take true for 1
        fail(path, f"expected {name}, got {_shown(value)}")
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            fail(path, "expected a finite number, got one that 64 bits cannot hold")
    if kind is str and any("\ud800" <= character <= "\udfff" for character in value):
        fail(path, f"expected a text, got half of a character (a lone surrogate) in {_shown(value)}")
    return value


def _read_union(kinds: tuple[Any, ...], value: Any, path: str, fail: _Fail) -> Any:
    """`X | None`, and unions of plain types such as `int | str`: told apart by the type of the value."""
    plain = [kind for kind in kinds if kind in _PLAIN]
    for kind in plain:
        if type(value) in _PLAIN[kind][0]:
            return _read_plain(kind, value, path, fail)
    others = [kind for kind in kinds if kind not in _PLAIN]
    if len(others) > 1:
        raise TypeError(f"a union of {others!r} cannot be told apart in JSON; use two fields or a Literal")
    if others:
        return _read(others[0], value, path, fail)
    fail(path, f"expected {' or '.join(_PLAIN[kind][1] for kind in plain)}, got {_shown(value)}")


def _read_tuple(kinds: tuple[Any, ...], value: Any, path: str, fail: _Fail) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        fail(path, f"expected a list, got {_shown(value)}")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        fail(path, f"expected a list of {len(kinds)} items, got {len(value)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(_read(kind, each, f"{path}[{index}]", fail) for index, (kind, each) in enumerate(pairs))


def _read_dataclass(cls: Any, value: Any, path: str, fail: _Fail) -> Any:
    if not isinstance(value, dict):
        fail(path, f"expected an object, got {_shown(value)}")
    kinds = _field_kinds(cls)
    for key in value:
        if key not in kinds:
            fail(path, f"unknown key {_shown(key)}")
    for key in kinds:
        if key not in value and key not in _omissible(cls):
            fail(path, f"missing key {key!r}")
    given = {key: kind for key, kind in kinds.items() if key in value}
    fields = {key: _read(kind, value[key], _joined(path, key), fail) for key, kind in given.items()}
    try:
        return cls(**fields)
    except (ValueError, MammutError) as problem:
        fail(path, str(problem))


@functools.cache
def _field_kinds(cls: Any) -> dict[str, Any]:
    """Field name → resolved annotation, in the order of the fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _omissible(cls: Any) -> dict[str, Any]:
    """Names and defaults of the fields whose key may be left out."""
    kinds = _field_kinds(cls)
    return {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if any(isinstance(each, Omissible) for each in getattr(kinds[field.name], "__metadata__", ()))
    }


def _joined(path: str, key: str) -> str:
    name = key if key.isidentifier() and len(key) <= _SHOWN_CHARACTERS else _shown(key)
    return f"{path}.{name}" if path else name


def _shown(value: object) -> str:
    """A value as a message repeats it: short, on one line, and never the inside of a list (which may be very deep)."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARACTERS else repr(value[:_SHOWN_CHARACTERS]) + "..."
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return f"a number of more than {_MOST_DIGITS} digits"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else type(value).__name__
