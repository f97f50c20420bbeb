"""The part of the demo that looks for things by their names, on a detector that finds rectangles."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.pictures import read_picture
from mammut_runtime.video.decode import Clip, quiet_decoder

EXAMPLES = Path(__file__).parents[3] / "runtime" / "examples"


@pytest.fixture
def demo_clips(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_clips")


def test_pictures_and_clips_are_written_with_boxes(
    demo_clips: Any, detecting: Any, make_scene: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet_decoder()
    picture = make_scene(240, 320, {"cat": (40, 60, 120, 160)})
    cv2.imwrite(str(tmp_path / "one.png"), picture[:, :, ::-1])
    writer = cv2.VideoWriter(str(tmp_path / "c.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (320, 240))
    for shift in range(20):
        moved = make_scene(240, 320, {"cat": (40 + 4 * shift, 60, 120 + 4 * shift, 160)})
        writer.write(np.ascontiguousarray(moved[:, :, ::-1]))
    writer.release()
    with detecting.model() as model:
        assert model.detects
        one = read_picture(tmp_path / "one.png")
        demo_clips.find_in_pictures(model, [("my one!", one)], ["cat", "dog"], tmp_path / "out")
        demo_clips.find_in_clip(model, tmp_path / "c.avi", ["cat", "dog"], tmp_path / "out")
    shown = capsys.readouterr().out
    assert "my one!: cat 0.97 (40,60,120,160)" in shown and "c.avi at 1.0 s: #1 cat" in shown and "dog" not in shown
    drawn = read_picture(tmp_path / "out" / "boxes" / "my-one.png").rgb()
    assert drawn.shape == picture.shape and (drawn != picture).any() and (drawn[200:] == picture[200:]).all()
    (clip,) = (each for each in (tmp_path / "out" / "boxes").iterdir() if each.suffix in (".mp4", ".avi"))
    with Clip.open(clip) as opened:
        while opened.advance() is not None:
            pass
        assert opened.health.frames == 2 * demo_clips.DETECTIONS_FPS
