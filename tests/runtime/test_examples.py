"""The examples beside the runtime, on a bundle whose graphs are functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime import console
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.errors import InputError

EXAMPLES = Path(__file__).parents[2] / "runtime" / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, toy_bundle: Any) -> Any:
    """Loads an example by name; bundles get the toy's functions."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = {"vision": "_vision", "text": "_text", "memory": "_memory"}

    def open_engine(path: Path, *_: object) -> FakeEngine:
        owner, name = (toy_bundle, names[path.stem]) if path.stem in names else (toy_bundle.toy, "_run")
        return FakeEngine(lambda feeds: getattr(owner, name)(feeds))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setattr("mammut_runtime.model.open_engine", open_engine)
    return load


def test_every_drawing_is_drawn_and_the_same_each_time(example: Any) -> None:
    drawings = example("drawings")
    for name, draw in drawings.DRAWINGS.items():
        picture = draw()
        assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8, name
        assert (picture == draw()).all() and picture.std() > 10, name
    red, blue = (drawings.DRAWINGS[f"{colour} heart"]()[100, 128] for colour in ("red", "blue"))
    assert red[0] > red[2] and blue[2] > blue[0], "pictures are RGB"


def test_the_demo_prints_and_writes_what_it_sees(
    example: Any, toy_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("demo")
    monkeypatch.setattr(module, "DATA", tmp_path / "absent")
    monkeypatch.setattr(module, "SHAPE_QUESTION", "a?")  # the toy reads letter by letter and has little room
    out = tmp_path / "out"
    code = console.run(module.demo, ["--bundle", str(toy_bundle.folder), "--out", str(out)])
    shown = capsys.readouterr().out
    assert code == 0 and "no photographs" in shown and "make demo PICTURES=FOLDER" in shown
    assert "Photographs that" not in shown
    count = len(module.DRAWINGS)
    assert len(list((out / "drawings").glob("*.png"))) == count == len(list(out.glob("*.png")))
    own = ["--bundle", str(toy_bundle.folder), "--out", str(tmp_path / "own"), "--pictures", str(out / "drawings")]
    assert console.run(module.demo, own) == 0
    assert len(list((tmp_path / "own").glob("*.png"))) == count and "right:" not in capsys.readouterr().out


@pytest.mark.shared
def test_the_demo_finds_held_out_photographs(example: Any) -> None:
    module = example("demo")
    if not module.DATA.is_dir():
        pytest.skip("../shared/data/pairs is not here")
    found = list(module.held_out_photos())
    assert {sample.truth for sample in found} == {*module.FLOWERS.values(), *module.CLOTHING.values()}
    assert all(sample.picture.rgb().shape[2] == 3 for sample in found)


def test_the_camera_app_tells_of_changes_only(example: Any, toy_bundle: Any, tmp_path: Path) -> None:
    module = example("camera_app")
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for colour in ((0, 0, 255), (255, 0, 0)):
        for _ in range(20):
            writer.write(np.full((48, 64, 3), colour, np.uint8))
    writer.release()
    stream = list(module.frames(str(clip), 0.5))
    assert [round(time_s, 1) for time_s, _ in stream] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert stream[0][1][0, 0, 2] > 200, "frames are BGR"
    with toy_bundle_model(toy_bundle) as model:
        events = list(module.describe(model, iter(stream), 0.05, model.classifier(["red", "cat"], ["{}"])))
    assert [event.time_s for event in events] == [0.0, 2.0] and all(event.watched for event in events)
    with pytest.raises(InputError, match="cannot be opened"):
        list(module.frames(str(tmp_path / "none.mp4"), 1))


def test_the_newest_frame_of_a_camera_is_used(example: Any) -> None:
    module = example("camera_app")

    class Camera:
        frames: Iterator[int] = iter(range(5))

        def read(self) -> tuple[bool, Any]:
            number = next(self.frames, None)
            return number is not None, number

    seen = [frame for _, frame in module._camera_frames(Camera(), 0.05)]
    assert seen == sorted(set(seen)) and len(seen) < 5


def toy_bundle_model(toy_bundle: Any) -> Any:
    from mammut_runtime.model import Model

    return Model.load(toy_bundle.folder)
