"""Boxes at the edges of pictures: cut, dropped and counted; sets for training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.detection.box_files import BoxCounts, by_id, corners, cut
from mammut.detection.coco_files import read_coco
from mammut.detection.lvis_files import read_lvis
from mammut.evaluation.examples import Problems
from mammut_runtime.errors import InputError

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False) | st.integers(-500, 1500).map(float)
LENGTHS = st.floats(0, 1e9, allow_nan=False) | st.integers(0, 1500).map(float)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, LENGTHS, LENGTHS), max_size=20), st.integers(1, 4000), st.integers(1, 4000))
@settings(deadline=None)
def test_cut_boxes_are_inside_and_others_untouched(rows: list[tuple[float, ...]], width: int, height: int) -> None:
    boxes = np.array(rows, np.float64).reshape(-1, 4)
    found = cut(boxes, np.tile(np.array([width, height], np.float64), (len(boxes), 1)))
    kept = found.boxes[~found.empty]
    single = corners(kept)
    assert (single[:, 2:] > single[:, :2]).all()
    assert (single >= 0).all() and (single[:, [0, 2]] <= width).all() and (single[:, [1, 3]] <= height).all()
    inside = ((boxes[:, :2] >= 0) & (boxes[:, :2] + boxes[:, 2:] <= [width, height])).all(axis=1)
    assert (found.boxes[inside] == boxes[inside]).all()
    assert not found.clipped[inside].any()
    assert (found.clipped | found.empty)[~inside].all()
    # No overlap with the picture is lost: what is dropped has none that float32 can hold.
    sides = np.minimum(boxes[:, :2] + boxes[:, 2:], [width, height]) - np.maximum(boxes[:, :2], 0)
    assert (sides[found.empty].min(axis=1, initial=np.inf) < 1e-3).all()


def test_by_id_names_both_records() -> None:
    assert by_id([5, -2, 9], str).tolist() == [1, 0, 2]
    with pytest.raises(InputError, match=r"record 2: id 5 is already that of record 0"):
        by_id([5, 1, 5], lambda place: f"record {place}")


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, Any]:
    """Two pictures: boxes inside, half outside, wholly outside, without width; a crowd."""
    for name in ("one.png", "two.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((80, 100, 3), np.uint8))
    boxes = [[10, 20, 30, 40], [90, 70, 30, 30.5], [200, 10, 5, 5], [10, 10, 0, 5], [0, 0, 50, 50]]
    return {
        "info": {"year": 2026},
        "images": [{"id": 7, "file_name": "two.png", "width": 100, "height": 80, "license": 3},
                   {"id": 3, "file_name": "sub/one.png", "width": 100, "height": 80}],
        "annotations": [{"id": 10 - place, "image_id": 3, "category_id": 5 if place else 2, "bbox": box,
                         "area": 7.5, "iscrowd": int(place == 4), "segmentation": [[1, 2, 3]]}
                        for place, box in enumerate(boxes)],
        "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": " cat ", "supercategory": "animal"}],
    }  # fmt: skip


def written(folder: Path, truth: dict[str, Any]) -> Path:
    (folder / "truth.json").write_text(json.dumps(truth))
    return folder / "truth.json"


def test_cut_and_dropped_boxes_are_counted(tmp_path: Path, truth: dict[str, Any]) -> None:
    file = read_coco(written(tmp_path, truth))
    assert file.counts == BoxCounts(pictures=2, boxes=5, clipped=1, furthest_outside=20.5, without_area=2, crowds=1)
    assert file.counts.lines() == (
        "1 of 5 boxes were cut at their picture's edge; the furthest stood 20.5 pixels outside",
        "2 of 5 boxes have no area in their picture: dropped",
    )
    assert file.names == ("cat", "dog") and not file.federated
    first, second = file.pictures
    assert (first.id, second.id, len(second.boxes)) == (3, 7, 0)
    assert first.boxes.tolist() == [[10, 20, 30, 40], [90, 70, 10, 10], [0, 0, 50, 50]]
    assert first.categories.tolist() == [0, 1, 1] and first.crowd.tolist() == [False, False, True]
    assert first.areas.tolist() == [7.5] * 3
    for note in truth["annotations"]:
        del note["area"], note["iscrowd"]
    again = read_coco(written(tmp_path, truth))  # both may be missing
    assert again.pictures[0].areas.tolist() == [1200, 100, 2500] and again.counts.crowds == 0


def test_a_set_for_training(tmp_path: Path, truth: dict[str, Any]) -> None:
    boxed = read_coco(written(tmp_path, truth)).boxed_set(tmp_path)
    first, second = boxed.pictures
    assert boxed.names == ("cat", "dog") and boxed.frequency == {}
    assert first.labels == ("cat", "dog", "dog") and second.labels == ()
    assert first.boxes.dtype == np.float32 and first.boxes[1].tolist() == [90, 70, 100, 80]
    assert first.ignore.tolist() == [False, False, True] and first.absent is None
    assert first.rgb().shape == (80, 100, 3)


def test_pictures_that_are_missing(tmp_path: Path, truth: dict[str, Any]) -> None:
    (tmp_path / "two.png").unlink()
    file = read_coco(written(tmp_path, truth))
    with pytest.raises(InputError, match=r"1 of 2 missing: two.png; .*--partial"):
        file.boxed_set(tmp_path)
    problems = Problems(partial=True)
    assert [each.name for each in file.boxed_set(tmp_path, problems).pictures] == ["sub/one.png"]
    assert list(problems.missing) == ["two.png"]
    (tmp_path / "one.png").unlink()
    with pytest.raises(InputError, match="none of its pictures is in"):
        file.boxed_set(tmp_path, problems)
    with pytest.raises(InputError, match="expected the folder with the pictures"):
        file.boxed_set(tmp_path / "gone")


def test_a_file_never_reaches_outside_its_folder(tmp_path: Path, truth: dict[str, Any]) -> None:
    (tmp_path / "inner").mkdir()
    truth["images"][0]["file_name"] = "../two.png"
    file = read_coco(written(tmp_path, truth))
    problems = Problems(partial=True)
    with pytest.raises(InputError, match="none of its pictures"):
        file.found_in(tmp_path / "inner", problems)
    assert (tmp_path / "inner" / ".." / "two.png").is_file()  # control: it is there


def test_lvis_says_what_is_known(tmp_path: Path, truth: dict[str, Any]) -> None:
    for image, absent, partial in zip(truth["images"], ([2, 5], [5, 9]), ([], [2]), strict=True):
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = absent, partial
        image["coco_url"] = "http://images.cocodataset.org/val2017/" + image.pop("file_name").split("/")[-1]
    truth["categories"] = [{"id": 5, "name": "guide_dog_(animal)", "frequency": "r"},
                           {"id": 2, "name": "cat", "frequency": "f"},
                           {"id": 9, "name": "emu", "frequency": "c"}]  # fmt: skip
    file = read_lvis(written(tmp_path, truth))
    first, second = file.pictures
    assert file.federated and file.names == ("cat", "guide dog (animal)", "emu")
    assert first.file_name == "val2017/one.png"
    assert first.absent == (2,) and first.partial == (0,)  # of 5 there is a box: it is not absent
    assert second.absent == (0, 1) and file.counts.contradicted == 1
    boxed = file.boxed_set(tmp_path)
    assert boxed.frequency == {"cat": "f", "guide dog (animal)": "r", "emu": "c"}
    assert boxed.pictures[0].absent == ("emu",) and boxed.pictures[0].partial == ("cat",)
    assert read_coco(written(tmp_path, truth | {"images": [{**each, "file_name": "x"} for each in truth["images"]]}))
