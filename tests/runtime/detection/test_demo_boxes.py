"""The part of the demo that looks for things by their names, on a detector that finds rectangles."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime import console
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


def test_the_demo_looks_for_the_names_that_are_given(
    demo_clips: Any,
    detecting: Any,
    make_scene: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo.Model, "load", lambda *_: detecting.model())
    monkeypatch.setattr(demo, "QUESTION", "a?")  # the toy reads letter by letter and has little room
    (tmp_path / "mine").mkdir()
    picture = make_scene(120, 160, {"dog": (20, 30, 60, 80)})
    cv2.imwrite(str(tmp_path / "mine" / "one.png"), picture[:, :, ::-1])
    arguments = ["--bundle", "any", "--out", str(tmp_path / "out"), "--pictures", str(tmp_path / "mine")]
    assert console.run(demo.demo, [*arguments, "--names", "cat, dog"]) == 0
    shown = capsys.readouterr().out
    assert "Looked for by name (cat, dog):\n  one: dog 0.9" in shown and "Pictures with boxes: " in shown
    assert [each.name for each in (tmp_path / "out" / "boxes").iterdir()] == ["one.png"]
    assert console.run(demo.demo, [*arguments, "--names", " , "]) == 2
    assert "--names: expected texts" in capsys.readouterr().err
    monkeypatch.setattr(demo, "DATA", tmp_path / "absent")
    monkeypatch.setattr(demo_clips, "FILMED", tmp_path / "absent")
    monkeypatch.setattr(demo, "SHAPE_QUESTION", "a?")
    shots = [dataclasses.replace(each, question="a?") for each in demo.moving_drawings.shots()]
    monkeypatch.setattr(demo.moving_drawings, "shots", lambda: shots)
    assert console.run(demo.demo, ["--bundle", "any", "--out", str(tmp_path / "all"), "--names", "bird"]) == 0
    assert "\n  group: " in capsys.readouterr().out
    assert {each.stem for each in (tmp_path / "all" / "boxes").iterdir()} == {"group", "drawn"}
