"""The strict reader on a small class of its own: each kind of field, taken and refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut_runtime.errors import BundleError, CheckpointError
from mammut_runtime.strict import Between, Length, Matching, Omissible, from_dict, parse_json, to_dict, to_json


@dataclass(frozen=True)
class Part:
    size: Annotated[int, Between(1, 1000)]
    kind: Literal["a", "b", 3]


@dataclass(frozen=True)
class Whole:
    part: Part
    maybe: Part | None
    number: float
    flag: bool
    pair: tuple[int, float]
    many: Annotated[tuple[int | str, ...], Length(0, 3)]
    named: dict[Annotated[str, Matching("[a-z]+", "lower case letters")], Part]
    default: int = 5

    def __post_init__(self) -> None:
        if self.number == self.default:
            raise ValueError(f"number and default are both {self.default}")


def valid() -> dict[str, Any]:
    part = {"size": 1, "kind": "a"}
    return {"part": part, "maybe": None, "number": 2, "flag": True, "pair": [1, 2], "many": [1, "x"],
            "named": {"x": {"size": 2, "kind": 3}}, "default": 5}  # fmt: skip


def test_round_trip() -> None:
    whole = from_dict(Whole, valid(), "file", BundleError)
    assert whole == Whole(Part(1, "a"), None, 2.0, True, (1, 2.0), (1, "x"), {"x": Part(2, 3)})
    assert isinstance(whole.number, float) and isinstance(whole.pair[1], float)
    assert to_dict(whole) == valid()
    assert from_dict(Whole, parse_json(to_json(whole), "file", BundleError), "file", BundleError) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "file: unknown key 'extra'; try again"),
        ({"x" * 500: 1}, "unknown key 'x{80}'[.]{3}; try again"),
        ({"part": {"size": 1}}, "file: part: missing key 'kind'; try again"),
        ({"part": {"size": 0, "kind": "a"}}, "part.size: expected a number from 1 to 1,000, got 0"),
        ({"part": {"size": True, "kind": "a"}}, "part.size: expected a whole number, got true"),
        ({"part": {"size": 1, "kind": "c"}}, "part.kind: expected one of 'a', 'b', 3, got 'c'"),
        ({"part": {"size": 1, "kind": 3.0}}, "part.kind: expected one of 'a', 'b', 3, got 3.0"),
        ({"part": None}, "part: expected an object, got null"),
        ({"maybe": 1}, "maybe: expected an object, got 1"),
        ({"number": "1"}, "number: expected a number, got '1'"),
        ({"number": math.inf}, "number: expected a finite number"),
        ({"number": 10**400}, "number: expected a finite number"),
        ({"number": 5}, "file: number and default are both 5; try again"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"pair": [1]}, "pair: expected a list of 2 items, got 1"),
        ({"pair": "12"}, "pair: expected a list, got '12'"),
        ({"pair": [1, None]}, r"pair\[1\]: expected a number, got null"),
        ({"many": [1, 2, 3, 4]}, "many: expected 0 to 3 items, got 4"),
        ({"many": [[]]}, r"many\[0\]: expected a whole number or a text, got a list"),
        ({"many": [10**30]}, None),
        ({"named": {"X": {"size": 1, "kind": "a"}}}, "named: expected lower case letters, got 'X'"),
        ({"named": {"x": {"size": 1, "kind": "a", "z": 1}}}, "named.x: unknown key 'z'"),
    ],
)
def test_each_refusal_says_where(change: dict[str, Any], message: str | None) -> None:
    data = copy.deepcopy(valid()) | change
    if message is None:
        from_dict(Whole, data, "file", CheckpointError, "try again")
        return
    with pytest.raises(CheckpointError, match=message):
        from_dict(Whole, data, "file", CheckpointError, "try again")


def test_a_key_with_a_default_must_be_there() -> None:
    data = valid()
    del data["default"]
    with pytest.raises(BundleError, match="file: missing key 'default'"):
        from_dict(Whole, data, "file", BundleError)


@dataclass(frozen=True)
class Newer:
    old: int
    new: Annotated[Part | None, Omissible()] = None


def test_a_key_of_a_newer_version_may_be_left_out() -> None:
    assert from_dict(Newer, {"old": 1}, "file", BundleError) == Newer(1)
    assert from_dict(Newer, {"old": 1, "new": None}, "file", BundleError) == Newer(1)
    assert to_dict(Newer(1)) == {"old": 1}
    part = from_dict(Whole, valid(), "file", BundleError).part
    assert from_dict(Newer, to_dict(Newer(1, part)), "file", BundleError) == Newer(1, part)
    with pytest.raises(BundleError, match="file: missing key 'old'"):  # control: only where it is said
        from_dict(Newer, {}, "file", BundleError)
    with pytest.raises(BundleError, match="file: new: expected an object, got 3"):
        from_dict(Newer, {"old": 1, "new": 3}, "file", BundleError)


def test_an_annotation_it_does_not_know_is_a_mistake_in_the_program() -> None:
    wrong = dataclasses.make_dataclass("wrong", [("values", set)])
    with pytest.raises(TypeError, match="not an annotation that this reader knows"):
        from_dict(wrong, {"values": []}, "file", BundleError)


def test_not_a_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        to_json({"x": math.nan})
    assert to_json({"x": 1.5, "ü": (1, None)}) == '{\n "x": 1.5,\n "ü": [\n  1,\n  null\n ]\n}\n'.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_any_data_is_taken_or_refused(data: Any) -> None:
    for candidate in (data, valid() | {"named": data}, valid() | {"many": data}, valid() | {"part": data}):
        try:
            whole = from_dict(Whole, candidate, "file", BundleError)
        except BundleError:
            continue
        assert from_dict(Whole, to_dict(whole), "file", BundleError) == whole


@given(st.binary())
def test_any_bytes_are_json_or_refused(text: bytes) -> None:
    try:
        parse_json(text, "file", BundleError)
    except BundleError as error:
        assert str(error).startswith("file: ")
