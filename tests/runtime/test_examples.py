"""The examples beside the runtime, on a bundle whose graphs are functions."""

from __future__ import annotations

import dataclasses
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
from mammut_runtime.pictures import read_picture
from mammut_runtime.video.cues import Cue, read_cues
from mammut_runtime.video.sampler import FrameRef

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


def short_questions(monkeypatch: pytest.MonkeyPatch, demo: Any) -> None:
    """The toy reads letter by letter and has little room."""
    monkeypatch.setattr(demo, "SHAPE_QUESTION", "a?")
    shots = [dataclasses.replace(each, question="a?") for each in demo.moving_drawings.shots()]
    monkeypatch.setattr(demo.moving_drawings, "shots", lambda: shots)


def test_the_demo_prints_and_writes_what_it_sees(
    example: Any, toy_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("demo")
    monkeypatch.setattr(module, "DATA", tmp_path / "absent")
    monkeypatch.setattr(sys.modules["demo_clips"], "FILMED", tmp_path / "absent")
    short_questions(monkeypatch, module)
    out = tmp_path / "out"
    code = console.run(module.demo, ["--bundle", str(toy_bundle.folder), "--out", str(out)])
    shown = capsys.readouterr().out
    assert code == 0 and "no photographs" in shown and "make demo PICTURES=FOLDER" in shown
    assert "Photographs that" not in shown and "filmed clip" not in shown and "Looked for" not in shown
    assert "no video graph" in shown and "of 3 captions, " in shown and shown.count("a? ") >= 3 + 5
    clips = {each.name for each in (out / "clips").iterdir() if each.is_file()}
    stem = "drawn.mp4" if "drawn.mp4" in clips else "drawn.avi"
    assert clips == {stem, "drawn.srt", "drawn.vtt", "drawn.jsonl", "drawn.png"}
    assert [each.start_ms for each in read_cues(out / "clips" / "drawn.jsonl")] == [0, 3000, 6000], "it has two cuts"
    assert read_picture(out / "clips" / "drawn.png").rgb().shape[0] > 3 * 150
    count = len(module.DRAWINGS)
    assert len(list((out / "drawings").glob("*.png"))) == count == len(list(out.glob("*.png")))
    own = ["--bundle", str(toy_bundle.folder), "--out", str(tmp_path / "own"), "--pictures", str(out / "drawings")]
    assert console.run(module.demo, own) == 0
    assert len(list((tmp_path / "own").glob("*.png"))) == count and "right:" not in capsys.readouterr().out


def test_drawings_are_cut_out_of_their_paper(example: Any) -> None:
    drawings = example("drawings")
    star = drawings.cut_out(drawings.star)
    assert star.shape[2] == 4 and star[0, 0, 3] == 0 and (star[star.shape[0] // 2, star.shape[1] // 2] > 0).all()
    canvas, alpha = np.full((*star.shape[:2], 3), 255.0), star[:, :, 3:] / 255
    laid = star[:, :, :3] * alpha + canvas * (1 - alpha)
    whole = drawings.star()  # control: laid on white paper again it is the drawing
    rows, columns = (np.flatnonzero((whole < 255).any(axis=(2, axis))) for axis in (1, 0))
    assert np.abs(laid - whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).max() <= 2


def test_in_the_drawn_clip_happens_what_is_said(example: Any) -> None:
    moving = example("moving_drawings")
    heart, star, sun = ([each.astype(int) for each in moving.frames(shot)] for shot in moving.shots())
    assert all(len(each) == moving.FPS * moving.SHOT_S for each in (heart, star, sun))

    def middle(frame: Any, empty: Any) -> float:
        return float(np.flatnonzero(np.abs(frame - empty).sum(axis=(0, 2))).mean())

    empty = moving._landscape(*((shot := moving.shots()[0]).sky, shot.meadow)).astype(int)
    places = [middle(frame, empty) for frame in heart]
    assert places == sorted(places) and places[-1] - places[0] > 0.3 * moving.SIDE
    assert (star[0] == star[20]).all() and (star[0] != star[-1]).any(), "the star appears"
    cloud = moving.shots()[2].actors[1]
    alone = list(moving.frames(dataclasses.replace(moving.shots()[2], actors=(cloud,))))
    x, y = (round(part * moving.SIDE) for part in cloud.start)
    assert all((frame[y - 5 : y + 20, x] == alone[0][y - 5 : y + 20, x]).all() for frame in sun), "it stays behind"
    assert any((frame != alone[0]).any() for frame in sun)  # control


def test_a_contact_sheet_has_a_row_for_each_cue(example: Any, tmp_path: Path) -> None:
    module = example("contact_sheet")
    clip = example("moving_drawings").write_clip(tmp_path)
    frames = tuple(FrameRef(index, index / 15) for index in range(0, 45, 5))
    cue = Cue(0, 3000, "a red heart", 0.5, (1,), (0.5,), frames, 0, 45)
    one = module.contact_sheet(clip, [cue])
    two = module.contact_sheet(clip, [cue, dataclasses.replace(cue, start_ms=3000, end_ms=4000, frames=frames[:1])])
    assert one.dtype == np.uint8 and one.shape[1] == module.FRAMES * (module.FRAME_HEIGHT + 4)
    assert two.shape == (2 * one.shape[0], *one.shape[1:]) and (two[: len(one)] == one).all()
    many = [dataclasses.replace(cue, start_ms=each, end_ms=each + 1) for each in range(100)]
    assert module.contact_sheet(clip, many).shape[0] == module.MOST_CUES * one.shape[0]
    with pytest.raises(InputError, match="at least one cue"):
        module.contact_sheet(clip, [])


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
