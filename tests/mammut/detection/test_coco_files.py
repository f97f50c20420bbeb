"""COCO and LVIS files: every record of another form is named, with file, list, place and id."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut.detection import coco_files
from mammut.detection.box_specs import parse_box_spec
from mammut.detection.coco_files import read_coco
from mammut.detection.lvis_files import read_lvis
from mammut_runtime.errors import InputError

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "boxes"
GOOD: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30, "neg_category_ids": [4],
                "not_exhaustive_category_ids": []}],
    "annotations": [{"id": 8, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
    "categories": [{"id": 3, "name": "cat", "frequency": "f"}, {"id": 4, "name": "dog", "frequency": "r"}],
}  # fmt: skip


def changed(key: str, place: int, field: str, value: Any = None, gone: bool = False) -> dict[str, Any]:
    row = copy.deepcopy(GOOD)
    if gone:
        del row[key][place][field]
    else:
        row[key][place][field] = value
    return row


def written(folder: Path, row: Any) -> Path:
    (folder / "t.json").write_text(json.dumps(row))
    return folder / "t.json"


BAD = [
    (
        changed("annotations", 0, "bbox", [1, 2, 3]),
        r"annotations\[0\] \(id 8\): bbox: expected \[left.*got \[1, 2, 3\]",
    ),
    (changed("annotations", 0, "bbox", [1, 2, -3, 4]), r"annotations\[0\] \(id 8\): bbox: expected"),
    (changed("annotations", 0, "bbox", [1, 2, True, 4]), r"\(id 8\): bbox: expected"),
    (changed("annotations", 0, "bbox", [1, "2", 3, 4]), r"\(id 8\): bbox: expected .* got a list of 4"),
    (changed("annotations", 0, "bbox", [1, 2, 3, 1e12]), r"\(id 8\): bbox: expected .* under 1e9"),
    (changed("annotations", 0, "bbox", gone=True), r"annotations\[0\] \(id 8\): no field 'bbox'; it has area, cat"),
    (changed("annotations", 0, "id", gone=True), r"annotations\[0\]: no field 'id'"),
    (changed("annotations", 0, "id", "8"), r"annotations\[0\]: id: expected a whole number, got '8'"),
    (changed("annotations", 0, "image_id", 2), r"annotations\[0\] \(id 8\): image_id 2 is not among the images"),
    (
        changed("annotations", 0, "category_id", 9),
        r"annotations\[0\] \(id 8\): category_id 9 is not among the categ",
    ),
    (changed("annotations", 0, "category_id", 3.0), r"category_id: expected a whole number, got 3.0"),
    (
        changed("annotations", 0, "area", -1),
        r"\(id 8\): area: expected a number of pixels from 0 on, under 1e18, got -1",
    ),
    (changed("annotations", 0, "area", 10**400), r"\(id 8\): area: expected a number of pixels from 0 on, under 1e18"),
    (changed("annotations", 0, "iscrowd", 2), r"\(id 8\): iscrowd: expected 0 or 1, got 2"),
    (
        changed("images", 0, "width", 0),
        r"images\[0\] \(id 1\): width: expected .* from 1 to 1,000,000, got 0",
    ),
    (changed("images", 0, "height", 30.5), r"images\[0\] \(id 1\): height: expected a whole number"),
    (changed("images", 0, "file_name", ""), r"images\[0\] \(id 1\): file_name: expected a text"),
    (changed("images", 0, "id", 2**70), r"images\[0\] .*id: expected a whole number"),
    (changed("categories", 1, "name", "cat"), r"ids 3 and 4 are both named 'cat'; .* rename or merge"),
    (changed("categories", 1, "name", "\n"), r"categories\[1\] \(id 4\): name: expected a text"),
    (changed("categories", 1, "id", 3), r"categories\[1\] \(id 3\): id 3 is already that of .*categories\[0\]"),
    ({**GOOD, "images": GOOD["images"] * 2}, r"images\[1\] \(id 1\): id 1 is already that of .*images\[0\]"),
    ({**GOOD, "annotations": GOOD["annotations"] * 2}, r"annotations\[1\] \(id 8\): id 8 is already that of"),
    ({**GOOD, "annotations": [7]}, r"annotations\[0\]: expected an object, got 7"),
    ({**GOOD, "images": []}, "images: expected 1 or more, got none"),
    ({**GOOD, "categories": []}, "categories: expected 1 or more, got none"),
    ({"images": [], "categories": []}, "no field 'annotations'; it has categories, images"),
]
BAD_LVIS = [
    (changed("images", 0, "neg_category_ids", gone=True), r"images\[0\] \(id 1\): no field 'neg_category_ids'.*coco:"),
    (changed("images", 0, "neg_category_ids", [4, "x"]), r"neg_category_ids: expected a list of ids"),
    (changed("images", 0, "neg_category_ids", [44]), r"images\[0\] \(id 1\): category 44 is not among the categories"),
    (changed("images", 0, "not_exhaustive_category_ids", None), r"not_exhaustive_category_ids: expected a list"),
    (changed("images", 0, "file_name", gone=True), r"images\[0\] \(id 1\): no field 'coco_url'"),
    (
        {
            **GOOD,
            "images": [{**changed("images", 0, "file_name", gone=True)["images"][0], "coco_url": "http://[bad/a/b"}],
        },
        r"images\[0\] \(id 1\): coco_url: expected an address, got 'http://\[bad/a/b'",
    ),
    (changed("categories", 0, "frequency", "x"), r"categories\[0\] \(id 3\): frequency: expected r, c or f, got 'x'"),
    (changed("categories", 0, "frequency", gone=True), r"categories\[0\] \(id 3\): no field 'frequency'"),
    (changed("categories", 0, "name", "_ _"), r"categories\[0\] \(id 3\): name: expected words"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_record_of_another_form_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_coco(written(tmp_path, row))
    assert str(tmp_path / "t.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "message"), BAD_LVIS)
def test_a_record_that_is_not_lvis_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_lvis(written(tmp_path, row))


def test_the_file_that_was_changed_is_good(tmp_path: Path) -> None:
    """The control of all of the above."""
    assert read_coco(written(tmp_path, GOOD)).counts.boxes == 1
    assert read_lvis(written(tmp_path, GOOD)).pictures[0].absent == (1,)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=5)
)


@given(
    st.sampled_from(
        [(key, place, field) for key, rows in GOOD.items() for place, row in enumerate(rows) for field in row]
    ),
    PLAIN,
    st.sampled_from([read_coco, read_lvis]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_is_taken_or_named(
    tmp_path: Path, where: tuple[str, int, str], value: Any, read: Any
) -> None:
    path = written(tmp_path, changed(*where, value))
    try:
        file = read(path)
    except InputError as problem:
        assert str(path) in str(problem) and "\n" not in str(problem)
    else:
        for picture in file.pictures:
            assert (picture.xyxy[:, 2:] > picture.xyxy[:, :2]).all() and (picture.xyxy >= 0).all()


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {**GOOD, "annotations": [{**GOOD["annotations"][0], "id": number} for number in range(6)]}
    assert read_coco(written(tmp_path, many)).counts.boxes == 6  # control
    monkeypatch.setattr(coco_files, "MAX_BOXES_A_PICTURE", 5)
    with pytest.raises(InputError, match=r"images\[0\] \(id 1\): 6 boxes, expected at most 5 in one picture"):
        read_coco(written(tmp_path, many))
    monkeypatch.setattr(coco_files, "MAX_BOXES", 4)
    with pytest.raises(InputError, match=r"annotations\[4\] \(id 4\): expected at most 4"):
        read_coco(written(tmp_path, many))


def test_time_grows_with_the_file(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        outline = [[float(each) for each in range(40)]]
        notes = [{**GOOD["annotations"][0], "id": number, "segmentation": outline, "image_id": number % 50}
                 for number in range(count)]  # fmt: skip
        images = [{**GOOD["images"][0], "id": number} for number in range(50)]
        path = written(tmp_path, {"annotations": notes, "images": images, "categories": GOOD["categories"]})
        started = time.process_time()
        assert read_coco(path).counts.boxes == count
        return time.process_time() - started

    small, large = min(seconds(1_000) for _ in range(3)), seconds(10_000)
    assert large < 30 * small + 0.5  # ten times the file


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED.name}: the shared data folder is not there")
def test_the_shared_sets_read_cleanly() -> None:
    sizes = {"blood-cells/train": (205, 2804), "blood-cells/val": (87, 1137), "blood-cells/test": (72, 945),
             "playing-cards/train": (296, 527), "playing-cards/val": (67, 143)}  # fmt: skip
    for name, (pictures, boxes) in sizes.items():
        file = read_coco(SHARED / f"{name}.json")
        assert (file.counts.pictures, file.counts.boxes) == (pictures, boxes)
        assert file.counts.lines() == () and file.counts.crowds == 0
        assert len(file.boxed_set(SHARED / name).pictures) == pictures


def test_how_boxes_are_named_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    spec = parse_box_spec(f"coco:{path}:{tmp_path}")
    assert (spec.form, spec.file, spec.images) == ("coco", path, tmp_path)
    assert parse_box_spec(f"lvis:{path}").images is None
    assert parse_box_spec(f"lvis:{path}").read().federated and not spec.read().federated
    (tmp_path / "a:b.json").write_text(path.read_text())
    assert parse_box_spec(f"coco:{tmp_path / 'a:b.json'}").file == tmp_path / "a:b.json"
    for wrong in ("voc:a.json:b", "coco:", "coco", "a.json", f"coco:{path}:"):
        with pytest.raises(InputError, match="expected coco:FILE"):
            parse_box_spec(wrong)
