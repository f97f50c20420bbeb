"""The clips of ../shared: filmed, by several encoders, some turned, one damaged. A few frames of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.video.captions import VideoCaptionOptions
from mammut_runtime.video.decode import Clip, quiet_decoder
from mammut_runtime.video.moments import update_moments
from mammut_runtime.video.sampler import Budget
from mammut_runtime.video.subtitles import Job, write_subtitles

SHARED = Path(__file__).parents[4] / "shared" / "data" / "videos"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/videos"),
]
quiet_decoder()


def top_over_bottom(pixels: NDArray[np.uint8]) -> float:
    half = len(pixels) // 2
    return float(pixels[:half].mean() / pixels[half:].mean())


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_clips_come_upright(degrees: int) -> None:
    """All four show a room, lit from above."""
    path = SHARED / "edge" / f"video_{degrees}.mov"
    with Clip.open(path) as clip:
        assert clip.advance() is not None
        pixels = clip.bgr()
    assert clip.info.rotation_degrees == degrees
    assert pixels.shape == ((568, 320, 3) if degrees in (90, 270) else (320, 568, 3))
    assert (clip.info.height, clip.info.width) == pixels.shape[:2]
    assert top_over_bottom(pixels) > 1.1
    stored = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)  # control: what the file holds is not upright
    stored.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
    _, as_stored = stored.read()
    stored.release()
    turns = {0: None, 90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
    turn = turns[degrees]
    assert (pixels == (as_stored if turn is None else cv2.rotate(as_stored, turn))).all()
    assert degrees == 0 or top_over_bottom(as_stored) < 1.1


def test_every_clip_is_looked_at_or_refused_with_a_reason(toy_bundle: Any) -> None:
    paths = sorted(each for each in SHARED.rglob("*") if each.is_file())
    looked, refused = [], {}
    with toy_bundle.model() as model:
        for path in paths:
            try:
                seen = model.encode_video(path, budget=Budget(frames=2, seconds=0.5))
            except InputError as problem:
                refused[path.name] = str(problem)
                continue
            looked.append(path.name)
            times = [each.time_s for each in seen.sampling.frames]
            assert len(times) == 2 and 0 <= times[0] < times[1] < 0.5
            assert np.isfinite(seen.embedding).all()
    assert len(looked) + len(refused) == len(paths) >= 30
    assert refused == {}, "every one of these decodes; a reason here is a change of the decoder"


def test_a_damaged_clip_is_captioned_and_its_damage_counted(toy_bundle: Any, tmp_path: Path) -> None:
    options = VideoCaptionOptions(frames_per_scene=1)
    with toy_bundle.model() as model:
        done = write_subtitles(model, Job(SHARED / "edge" / "corrupted.mp4", "a"), tmp_path / "out", options)
        assert done.health.frames == 49 and done.health.unreadable == 1 and done.health.missing == 1
        assert not done.health.whole and done.duration_s == pytest.approx(5.0, abs=0.2)
        again = write_subtitles(model, Job(SHARED / "edge" / "corrupted.mp4", "a"), tmp_path / "out", options)
        assert again.health == done.health, "it is remembered, without decoding again"
        found = update_moments(model, [SHARED / "edge" / "corrupted.mp4", SHARED / "bikes.mp4"], tmp_path / "x.index")
        assert [(path.name, health.unreadable) for path, health in found.damaged] == [("corrupted.mp4", 1)]
        whole = write_subtitles(model, Job(SHARED / "edge" / "video_0.mov", "b"), tmp_path / "out", options)  # control
        assert whole.health.whole and whole.health.frames == 3
