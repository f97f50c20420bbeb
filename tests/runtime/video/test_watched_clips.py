"""Captions, answers and moments of clips with bundles that have a `video` graph: frames are seen together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.commands import main
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.video.captions import VideoCaptionOptions, frames_per_scene
from mammut_runtime.video.cues import MergeRule, read_cues
from mammut_runtime.video.moments import MomentIndex, update_moments
from mammut_runtime.video.scenes import SceneRule
from mammut_runtime.video.subtitles import Job, settings_hash, write_subtitles

VIDEO = Path(__file__).parents[2] / "data" / "tiny-video-bundle"
FRAMES = 4
OPTIONS = VideoCaptionOptions(SceneRule(longest_s=1.0), merge=MergeRule(likeness=2))


def write_clip(path: Path, scenes: int, size_hw: tuple[int, int] = (48, 64)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size_hw[::-1])
    for number in range(10 * scenes):
        small = np.random.default_rng(number // 10).integers(0, 256, (6, 8, 3), np.uint8)
        large = cv2.resize(small, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
        writer.write(np.roll(large, number % 10, axis=1))
    writer.release()
    return path


@pytest.fixture
def watching(make_bundle: Any, tmp_path: Path) -> Any:
    return make_bundle(tmp_path / "watching", frames=FRAMES)


@pytest.fixture
def model(watching: Any) -> Iterator[Model]:
    with watching.model() as opened:
        yield opened


@pytest.fixture
def given(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The shapes of the frames of each look through the video graph."""
    found: list[list[tuple[int, ...]]] = []
    real = model.encode_frames

    def noted(frames: Any, *rest: Any) -> Any:
        found.append([each.shape for each in frames])
        return real(frames, *rest)

    monkeypatch.setattr(model, "encode_frames", noted)
    return found


def test_a_scene_is_seen_as_a_whole(model: Model, watching: Any, given: Any, tmp_path: Path) -> None:
    watching.opened.clear()
    done = write_subtitles(model, Job(write_clip(tmp_path / "a.avi", 3), "a"), tmp_path / "out", OPTIONS)
    assert [len(each) for each in given] == [FRAMES] * 3 and "vision" not in watching.opened
    cues = list(read_cues(done.files[-1]))
    assert [len(cue.frames) for cue in cues] == [FRAMES] * 3
    assert [frame.index // 10 for cue in cues for frame in cue.frames] == [0] * 4 + [1] * 4 + [2] * 4
    seen = model.encode_video(tmp_path / "a.avi", 1.0, 2.0)
    assert seen.caption().text == cues[1].text, "the same frames, the same words"


def test_the_number_of_frames_is_the_bundles_unless_it_is_given(model: Model, toy_bundle: Any) -> None:
    assert frames_per_scene(model, VideoCaptionOptions()) == FRAMES
    assert frames_per_scene(model, VideoCaptionOptions(frames_per_scene=2)) == 2
    same = [settings_hash(model, VideoCaptionOptions(frames_per_scene=each)) for each in (None, FRAMES, FRAMES + 1)]
    assert same[0] == same[1] != same[2]
    with toy_bundle.model() as pictures:
        assert frames_per_scene(pictures, VideoCaptionOptions()) == 3  # control
    with pytest.raises(InputError, match="from 1 to 64"):
        VideoCaptionOptions(frames_per_scene=0)


def test_large_frames_are_halved_while_they_wait(model: Model, given: Any, toy_bundle: Any, tmp_path: Path) -> None:
    """The model's side is 16: less than 64 is small enough."""
    clip = write_clip(tmp_path / "large.avi", 1, (144, 256))
    list(model.caption_video(clip, OPTIONS))
    model.encode_video(clip)
    assert given == [[(36, 64, 3)] * FRAMES] * 2
    given.clear()
    list(model.caption_video(write_clip(tmp_path / "small.avi", 1, (60, 80)), OPTIONS))
    assert given == [[(60, 80, 3)] * FRAMES]
    with toy_bundle.model() as pictures:  # control: of few frames, the whole ones are looked at, as of photos
        (cue,) = pictures.caption_video(clip, OPTIONS)
        index = cue.frames[cue.central].index
        capture = cv2.VideoCapture(str(clip))
        frames = [capture.read()[1] for _ in range(index + 1)]
        capture.release()
        assert pictures.encode(frames[index], "bgr").caption(OPTIONS.caption).text == cue.text


def test_moments_are_found_by_how_they_look_together(model: Model, given: Any, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.avi", 2)
    assert update_moments(model, [clip], tmp_path / "x.index").moments == 2 == len(given)
    (best, _) = MomentIndex.open(tmp_path / "x.index", model).search("a dog")
    seen = model.encode_video(clip, best.start_s, best.end_s)
    assert best.score == pytest.approx(float(seen.embedding @ model.embed_texts(["a dog"])[0]), abs=1e-5)


def test_the_commands_say_how_a_clip_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    clip = write_clip(tmp_path / "a.avi", 2)
    common = ["--bundle", str(VIDEO), "--threads", "1"]
    assert main(["ask-video", str(clip), "what?", "--json", *common]) == 0
    sampling = json.loads(capsys.readouterr().out)["sampling"]
    assert sampling["way"] == "video" and len(sampling["frames"]) == 4 and sampling["tokens"] == 40
    assert main(["ask-video", str(clip), "what?", *common]) == 0
    assert "seen together" in capsys.readouterr().err
    assert main(["ask-video", str(clip), "what?", "--frames", "2", *common]) == 0
    assert main(["caption-video", str(clip), "--out", str(tmp_path / "out"), "--merge-likeness", "2", *common]) == 0
    assert [len(cue.frames) for cue in read_cues(tmp_path / "out" / "a.jsonl")] == [4, 4]
    tiny = VIDEO.with_name("tiny-bundle")
    assert main(["ask-video", str(clip), "what?", "--bundle", str(tiny), "--threads", "1"]) == 0  # control
    assert "described: " in capsys.readouterr().err
