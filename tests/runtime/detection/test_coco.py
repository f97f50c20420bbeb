from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mammut_runtime.detection import coco
from mammut_runtime.detection.boxes import Box, Detection, Detections
from mammut_runtime.detection.coco import CocoNumbers, CocoResults
from mammut_runtime.errors import InputError

FOUND = Detections((Detection("dog", 0.75, Box(1, 2, 11, 22)), Detection("cat", 0.5, Box(0, 0, 5, 5))), 40, 30)
NOTHING = Detections((), 20, 10)
ANNOTATIONS: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a/one.jpg"},
        {"id": 9, "file_name": "b/two.jpg"},
        {"id": 3, "file_name": "c/two.jpg"},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
    "annotations": [],
}


def test_numbers_from_one_and_what_they_mean(tmp_path: Path) -> None:
    results = CocoResults(["cat", "dog"])
    results.add(Path("x/one.jpg"), FOUND)
    results.add(Path("x/two.jpg"), NOTHING)
    meaning = results.write(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == [
        {"image_id": 1, "category_id": 2, "bbox": [1, 2, 10, 20], "score": 0.75},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5},
    ]
    assert meaning == tmp_path / "found.index.json"
    said = json.loads(meaning.read_text())
    assert said["images"][1] == {"id": 2, "file_name": "x/two.jpg", "width": 20, "height": 10}
    assert said["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def test_numbers_of_an_annotation_file(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(ANNOTATIONS))
    results = CocoResults(["cat", "dog"], CocoNumbers.read(path))
    results.add(Path("somewhere/one.jpg"), FOUND)
    results.add(Path("b/two.jpg"), NOTHING)
    assert results.write(tmp_path / "found.json") is None
    written = json.loads((tmp_path / "found.json").read_text())
    assert [(each["image_id"], each["category_id"]) for each in written] == [(7, 18), (7, 17)]
    for unknown in ("other.jpg", "somewhere/two.jpg"):  # two pictures are called two.jpg
        with pytest.raises(InputError, match="is not in the annotation file"):
            results.add(Path(unknown), NOTHING)
    with pytest.raises(InputError, match="the annotation file has no category 'cow'; it has dog, cat"):
        CocoResults(["cow"], CocoNumbers.read(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "images: expected a list"),
        ({"images": [3]}, r"images\[0\]: expected an object"),
        ({"images": [{"id": "x", "file_name": "a"}]}, r"images\[0\]: expected a whole number as id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2}]}, r"categories\[1\]: expected a whole number as id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, r"categories\[1\]: name 'a' is there twice"),
    ],
)
def test_malformed_annotations_are_refused_by_record(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(ANNOTATIONS))
    CocoNumbers.read(path)  # control
    path.write_text(json.dumps({**ANNOTATIONS, **change}))
    with pytest.raises(InputError, match=message):
        CocoNumbers.read(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        CocoNumbers.read(tmp_path / "missing.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="expected an object with images"):
        CocoNumbers.read(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be written"):
        CocoResults(["cat"]).write(tmp_path / "missing" / "found.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(ANNOTATIONS))
    size = path.stat().st_size
    monkeypatch.setattr(coco, "MAX_ANNOTATION_BYTES", size)
    CocoNumbers.read(path)  # control
    monkeypatch.setattr(coco, "MAX_ANNOTATION_BYTES", size - 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(InputError, match=f"{size} bytes, expected a file of annotations of at most {size - 1}"):
        CocoNumbers.read(path)


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "val.json"

    def results(width: object) -> CocoResults:
        record = {"id": 7, "file_name": "one.jpg", "width": width, "height": 30}
        path.write_text(json.dumps({**ANNOTATIONS, "images": [record]}))
        return CocoResults(["cat", "dog"], CocoNumbers.read(path))

    results(40).add(Path("one.jpg"), FOUND)  # control
    with pytest.raises(InputError, match="40x30 pixels as it is stored, and the annotation file says 30x30"):
        results(30).add(Path("one.jpg"), FOUND)
    with pytest.raises(InputError, match=r"images\[0\]: expected whole numbers above 0 as width and height"):
        results("40")
