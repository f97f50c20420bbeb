"""Detection in clips, with a clip that is made here: a red thing that moves, a blue one that stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.detection.clips import DrawnClip, next_due_s
from mammut_runtime.errors import InputError

FPS, FRAMES = 10.0, 20


@pytest.fixture
def clip(tmp_path: Path, make_scene: Any) -> Path:
    path = tmp_path / "moving.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (160, 96))
    if not writer.isOpened():
        pytest.skip("this OpenCV has no encoder for Motion JPEG")
    for number in range(FRAMES):
        left = 8 + 3 * number
        picture = make_scene(96, 160, {"cat": (left, 10, left + 40, 50), "bird": (110, 56, 150, 90)})
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    writer.release()
    return path


def test_things_keep_their_numbers_and_boxes_follow_them(detecting: Any, clip: Path) -> None:
    with detecting.model() as model:
        frames = list(model.detect_video(clip, ["cat", "bird"], fps=None))
    assert [frame.index for frame in frames] == list(range(FRAMES))
    numbers = [{each.detection.name: each.number for each in frame.things} for frame in frames]
    assert all(row == numbers[0] for row in numbers) and sorted(numbers[0].values()) == [1, 2]
    for frame in frames:
        cat = next(each.detection.box for each in frame.things if each.detection.name == "cat")
        left = 8 + 3 * frame.index
        np.testing.assert_allclose(cat.xyxy, (left, 10, left + 40, 50), atol=4)
    assert frames[-1].things[0].seen == FRAMES
    plain = frames[3].to_dict()
    assert plain["frame"] == 3 and plain["time_s"] == 0.3 and (plain["width"], plain["height"]) == (160, 96)
    assert {each["number"] for each in plain["detections"]} == {1, 2}


@pytest.mark.parametrize(
    ("fps", "expected"), [(5.0, 10), (2.0, 4), (10.0, 20), (100.0, 20), (None, 20), (3.0, 6), (7.0, 14)]
)
def test_frames_looked_at_in_a_second(detecting: Any, clip: Path, fps: float | None, expected: int) -> None:
    with detecting.model() as model:
        frames = list(model.detect_video(clip, ["cat"], fps=fps))
    assert len(frames) == expected


@pytest.mark.parametrize("own", [12.5, 23.976, 25.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("fps", [1.0, 2.0, 5.0, 7.0, 12.5])
def test_the_mean_rate_is_the_asked_one_whatever_the_clip_s_own(own: float, fps: float) -> None:
    """Timestamps rounded to milliseconds, as containers have them, 100 s long."""
    due_s, taken = -1.0, 0
    for number in range(round(100 * own)):
        time_s = round(number / own, 3)
        if time_s >= due_s:
            due_s, taken = next_due_s(time_s, fps), taken + 1
    assert abs(taken - 100 * fps) <= 1.01


def test_a_rate_that_is_none_is_refused(detecting: Any, clip: Path) -> None:
    with detecting.model() as model:
        for fps in (0.0, -1.0, float("nan")):
            with pytest.raises(InputError, match="fps: expected frames a second above 0"):
                next(iter(model.detect_video(clip, ["cat"], fps=fps)))


def test_the_annotated_copy_has_the_boxes_and_is_there_when_it_is_whole(
    detecting: Any, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with detecting.model() as model, DrawnClip(out, "moving", 5.0) as drawn:
        for frame in model.detect_video(clip, ["cat", "bird"], fps=5.0):
            drawn.add(frame)
            assert not any(path.name.startswith("moving") for path in out.iterdir())
    assert [path.name for path in out.iterdir()] == [drawn.path.name] and drawn.path.suffix in (".mp4", ".avi")
    capture = cv2.VideoCapture(str(drawn.path))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(5.0)
    count = 0
    while capture.grab():
        count += 1
    assert count == 10


def test_an_annotated_copy_that_fails_leaves_nothing(detecting: Any, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with detecting.model() as model:
        frames = list(model.detect_video(clip, ["cat"], fps=2.0))
        with pytest.raises(ZeroDivisionError), DrawnClip(out, "moving", 2.0) as drawn:
            drawn.add(frames[0])
            raise ZeroDivisionError
        assert list(out.iterdir()) == []
        with DrawnClip(out, "nothing", 2.0):
            pass
        assert list(out.iterdir()) == [], "no frames, no file"
        with pytest.raises(InputError, match="cannot be written"), DrawnClip(tmp_path / "missing", "x", 2.0) as drawn:
            drawn.add(frames[0])


def test_an_annotated_copy_replaces_a_file_only_where_it_may(detecting: Any, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    kept = [out / f"moving{suffix}" for suffix in (".mp4", ".avi")]
    for each in kept:
        each.write_bytes(b"mine")
    with detecting.model() as model:
        frame = next(iter(model.detect_video(clip, ["cat"], fps=2.0)))
    with pytest.raises(InputError, match="exists already"), DrawnClip(out, "moving", 2.0, replace=False) as drawn:
        drawn.add(frame)
    assert [each.read_bytes() for each in kept] == [b"mine"] * 2 and len(list(out.iterdir())) == 2
    with DrawnClip(out, "moving", 2.0) as drawn:  # control
        drawn.add(frame)
    assert drawn.path.read_bytes() != b"mine"
