"""Records of large JSON files: the same values as `json`, whatever the chunks, and damage is named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut.detection import json_records
from mammut.detection.json_records import keyed_records, listed_records
from mammut_runtime.errors import InputError

SLOW = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES, st.lists(VALUES, max_size=6), st.lists(VALUES, max_size=3), st.integers(1, 40), st.booleans())
@SLOW
def test_the_same_values_as_json(
    tmp_path: Path, other: Any, images: list[Any], notes: list[Any], chunk: int, spaced: bool
) -> None:
    whole = {"info": other, "images": images, "annotations": notes, "more": [other]}
    (tmp_path / "a.json").write_text(json.dumps(whole, indent=1 if spaced else None, ensure_ascii=spaced), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(images), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK", chunk)
        found = list(keyed_records(tmp_path / "a.json", ("images", "annotations")))
        listed = list(listed_records(tmp_path / "b.json"))
    expected = [("images", place, each) for place, each in enumerate(images)]
    expected += [("annotations", place, each) for place, each in enumerate(notes)]
    assert repr(found) == repr(expected)
    assert repr(listed) == repr(list(enumerate(images)))


@given(st.data())
@SLOW
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    text = json.dumps({"images": [{"id": 1, "file_name": "ä\\ud83d\n"}, 12, "x", [1, 2]], "annotations": []})
    end = data.draw(st.integers(0, len(text) - 1))
    (tmp_path / "a.json").write_text(text[:end])
    with pytest.raises(InputError, match=r"a\.json"):
        list(keyed_records(tmp_path / "a.json", ("images", "annotations")))
    (tmp_path / "a.json").write_text(text)  # control
    assert len(list(keyed_records(tmp_path / "a.json", ("images", "annotations")))) == 4


@given(st.binary(max_size=60))
@SLOW
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    for read in (lambda path: list(keyed_records(path, ("images",))), lambda path: list(listed_records(path))):
        try:
            read(tmp_path / "a.json")
        except InputError as problem:
            assert "a.json" in str(problem) and "\n" not in str(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{}, {"a": 1,}]}', r"images\[1\]: not JSON, or damaged"),
        ('{"images": [{}, {"a": NaN}]}', r"images\[1\]: .*NaN is no JSON number"),
        ('{"images": [{}, {"a": ' + "9" * 5000 + "}]}", r"images\[1\]: .*digits"),
        ('{"images": [' + "[" * 200_000 + "]}", r"images\[0\]: .*(nested too deeply|cut off)"),
        ('{"images": [1 2]}', r"images\[0\]: .*expected , or \] after it, got '2\]}'"),
        ('{"images": [], "images": []}', "the key 'images' is given twice"),
        ('{"images": {}}', "images: expected a list"),
        ('{"pictures": []}', "no field 'images'; it has pictures"),
        ('{"images": []} {}', "expected the end of the file, got '{}'"),
        ("[]", "expected an object with images"),
        ("", "expected an object with images, got the end of the file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        list(keyed_records(tmp_path / "a.json", ("images",)))


def test_other_than_json_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"images": ["\xff"]}')
    with pytest.raises(InputError, match="not UTF-8 text"):
        list(keyed_records(tmp_path / "a.json", ("images",)))
    with pytest.raises(InputError, match="no such file"):
        list(keyed_records(tmp_path, ("images",)))
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"images": ["\xc3\xa4"]}')  # with a byte order mark
    assert list(keyed_records(tmp_path / "a.json", ("images",))) == [("images", 0, "ä")]


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"images": ["x" * 5000, "y"]}))
    assert len(list(keyed_records(tmp_path / "a.json", ("images",)))) == 2  # control
    monkeypatch.setattr(json_records, "_CHUNK", 100)
    monkeypatch.setattr(json_records, "MAX_RECORD_CHARACTERS", 1000)
    with pytest.raises(InputError, match="a record of more than 1,000 characters"):
        list(keyed_records(tmp_path / "a.json", ("images",)))
    monkeypatch.setattr(json_records, "MAX_FILE_BYTES", 1000)
    with pytest.raises(InputError, match="more than 1,000 bytes"):
        list(keyed_records(tmp_path / "a.json", ("images",)))


def test_memory_is_that_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", 2**14)
    record = json.dumps({"id": 1, "segmentation": [[0.5] * 300]})
    (tmp_path / "a.json").write_text('{"annotations": [' + ", ".join([record] * 1_000) + "]}")
    size = (tmp_path / "a.json").stat().st_size
    tracemalloc.start()
    count = sum(1 for _ in keyed_records(tmp_path / "a.json", ("annotations",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_000 and size > 1_400_000 and peak < size / 4
