"""COCO results: what is written is read again; lines of other data are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut.detection.box_files import BoxFile
from mammut.detection.coco_files import read_coco
from mammut.detection.coco_results import Found, read_results, write_results
from mammut_runtime.errors import InputError

CORNER = st.floats(-50, 500)
ROWS = st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER, st.floats(0, 1), st.integers(0, 1)), max_size=6)


@pytest.fixture
def file(tmp_path: Path) -> BoxFile:
    truth = {
        "images": [{"id": each, "file_name": f"{each}.jpg", "width": 400, "height": 400} for each in (9, 4, 6)],
        "annotations": [],
        "categories": [{"id": 70, "name": "cat"}, {"id": 20, "name": "dog"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return read_coco(tmp_path / "truth.json")


@given(st.tuples(ROWS, ROWS, ROWS))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_again(tmp_path: Path, file: BoxFile, rows: tuple[Any, ...]) -> None:
    found = []
    for picture in rows:
        table = np.array(picture, np.float64).reshape(-1, 6)
        found.append(Found.of_corners(table[:, :4], table[:, 4], table[:, 5]))
    write_results(tmp_path / "r.json", file, found)
    plain = json.loads((tmp_path / "r.json").read_text())
    assert {row["image_id"] for row in plain} <= {4, 6, 9} and {row["category_id"] for row in plain} <= {20, 70}
    for before, after in zip(found, read_results(tmp_path / "r.json", file), strict=True):
        assert (after.labels == before.labels).all()
        assert np.allclose(after.boxes, before.boxes, atol=0.0051) and np.allclose(
            after.scores, before.scores, atol=1e-6
        )
        assert (after.boxes[:, 2:] >= 0).all()


def test_the_best() -> None:
    found = Found.of_corners(np.arange(16).reshape(4, 4), np.array([0.1, 0.7, 0.7, 0.2]), np.array([0, 1, 2, 3]))
    assert found.best(3).labels.tolist() == [1, 2, 3] and found.best(9).scores.tolist() == [0.7, 0.7, 0.2, 0.1]
    assert found.boxes[0].tolist() == [0, 1, 2, 2]


GOOD = {"image_id": 4, "category_id": 20, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([GOOD, {**GOOD, "image_id": 5}], r"r.json: \[1\]: image_id 5 is not in truth.json: results of other data"),
        ([{**GOOD, "category_id": 1}], r"\[0\]: category_id 1 is not in truth.json"),
        ([{**GOOD, "score": "high"}], r"\[0\]: score: expected a finite number, got 'high'"),
        ([{**GOOD, "score": 10**400}], r"\[0\]: score: expected a finite number, got 1000"),
        ([{**GOOD, "score": True}], r"\[0\]: score: expected a finite number, got True"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"\[0\]: bbox: expected \[left, top, width, height\]"),
        ([{"image_id": 4}], r"\[0\]: no field 'category_id'; it has image_id"),
        ([3], r"\[0\]: expected an object with image_id"),
        ({"annotations": []}, "expected a list of records"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, file: BoxFile, row: Any, message: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps([GOOD]))
    assert len(read_results(tmp_path / "r.json", file)[0].scores) == 1  # control
    (tmp_path / "r.json").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        read_results(tmp_path / "r.json", file)


def test_nothing_found_anywhere(tmp_path: Path, file: BoxFile) -> None:
    (tmp_path / "r.json").write_text("[]")
    assert [len(each.scores) for each in read_results(tmp_path / "r.json", file)] == [0, 0, 0]
    with pytest.raises(InputError, match="cannot be written"):
        write_results(tmp_path / "gone" / "r.json", file, read_results(tmp_path / "r.json", file))
