from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.detection.boxes import Box, Detection, Detections, areas, clipped, iou_matrix
from mammut_runtime.detection.nms import class_wise_nms
from mammut_runtime.errors import InputError


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])))
    height = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])))
    area = [float((each[2] - each[0]) * (each[3] - each[1])) for each in (a, b)]
    return width * height / (sum(area) - width * height)


def slow_nms(
    boxes: np.ndarray, scores: np.ndarray, thresholds: np.ndarray, iou: float, most: int | None
) -> list[tuple[int, int]]:
    """The textbook: one name after the other, one box after the other."""
    kept: list[tuple[int, int]] = []
    for name in range(scores.shape[1]):
        mine: list[int] = []
        for row in sorted(range(len(boxes)), key=lambda row: (-scores[row, name], row)):
            if not scores[row, name] >= thresholds[name] or areas(boxes[row]) <= 0:
                continue
            if (most is None or len(mine) < most) and all(slow_iou(boxes[row], boxes[each]) <= iou for each in mine):
                mine.append(row)
        kept += [(row, name) for row in mine]
    return sorted(kept, key=lambda each: (-scores[each], each))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([None, 1, 2, 5]),
    st.booleans(),
)
def test_the_same_survivors_as_the_slow_reference(
    seed: int, count: int, names: int, iou: float, most: int | None, ties: bool
) -> None:
    source = np.random.default_rng(seed)
    corners = source.integers(0, 12, (count, 2)) if ties else source.random((count, 2)) * 12
    sides = source.integers(0, 9, (count, 2)) if ties else source.random((count, 2)) * 9
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float64)
    scores = source.random((count, names))
    if ties:
        scores = np.round(scores * 4) / 4
    thresholds = source.random(names) * 0.8
    kept = class_wise_nms(boxes, scores, thresholds, iou, most)  # type: ignore[arg-type]
    found = list(zip(kept.proposals.tolist(), kept.names.tolist(), strict=True))
    assert found == slow_nms(boxes, scores, thresholds, iou, most)
    expected = np.array([scores[each] for each in found], np.float32)
    assert kept.scores.dtype == np.float32 and (kept.scores == expected).all()


def test_boxes_of_different_names_do_not_suppress_each_other() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 1, 10, 10]], np.float32)
    scores = np.array([[0.9, 0.1], [0.8, 0.7]], np.float32)
    kept = class_wise_nms(boxes, scores, np.full(2, 0.5, np.float32), 0.5)
    assert kept.proposals.tolist() == [0, 1] and kept.names.tolist() == [0, 1]
    together = class_wise_nms(boxes, scores[:, :1], np.full(1, 0.5, np.float32), 0.5)  # control: of one name they do
    assert together.proposals.tolist() == [0]


def test_nothing_above_the_threshold_and_no_proposals_give_nothing() -> None:
    one = np.ones((3, 2), np.float32) * 0.1
    boxes = np.tile(np.array([[0, 0, 1, 1]], np.float32), (3, 1))
    assert len(class_wise_nms(boxes, one, np.full(2, 0.5, np.float32), 0.5).scores) == 0
    assert len(class_wise_nms(boxes[:0], one[:0], np.full(2, 0.5, np.float32), 0.5).scores) == 0
    assert len(class_wise_nms(boxes, one, np.full(2, 0.1, np.float32), 0.5).scores) == 2  # control


def test_broken_numbers_are_no_boxes() -> None:
    boxes = np.array([[0, 0, np.nan, 1], [5, 5, 1, 9], [0, 0, 4, 4], [2, 2, 2, 9], [9, 9, 10, 10]], np.float32)
    scores = np.array([[0.9], [0.9], [0.4], [0.9], [np.nan]], np.float32)
    kept = class_wise_nms(boxes, scores, np.zeros(1, np.float32), 0.5)
    assert kept.proposals.tolist() == [2]


def test_settings_out_of_range_are_refused() -> None:
    boxes, scores, low = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    with pytest.raises(InputError, match=r"iou: expected a number from 0 to 1, got 1\.5"):
        class_wise_nms(boxes, scores, low, 1.5)
    with pytest.raises(InputError, match="max_per_class must be at least 1, got 0"):
        class_wise_nms(boxes, scores, low, 0.5, 0)


def test_boxes_are_cut_at_the_edges_and_those_outside_have_no_area() -> None:
    boxes = np.array([[-5, -5, 5, 5], [2, 2, 50, 60], [-9, -9, -1, -1], [40, 1, 45, 2]], np.float32)
    cut = clipped(boxes, 30, 20)
    assert cut.tolist() == [[0, 0, 5, 5], [2, 2, 20, 30], [0, 0, 0, 0], [20, 1, 20, 2]]
    assert areas(cut).tolist() == [25, 504, 0, 0]
    assert (iou_matrix(cut, cut).diagonal() == [1, 1, 0, 0]).all()


def test_results_are_plain() -> None:
    found = Detections((Detection("cat", 0.75, Box(1, 2, 4.456, 8)),), 30, 20, ("cut",))
    assert found.to_dict() == {
        "width": 30,
        "height": 20,
        "detections": [{"name": "cat", "score": 0.75, "box": {"x0": 1, "y0": 2, "x1": 4.46, "y1": 8}}],
        "notices": ["cut"],
    }
    box = found.detections[0].box
    assert box.xywh == (1, 2, pytest.approx(3.456), 6) and box.area == pytest.approx(20.736)
    assert len(found) == 1 and [each.name for each in found] == ["cat"]
