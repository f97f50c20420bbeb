"""Clips that cannot be used: each is one clear error, and nothing is left behind; the good ones among them go on."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.commands import main
from mammut_runtime.errors import InputError
from mammut_runtime.video.decode import Clip, ClipInfo, ClipLimits, quiet_decoder
from mammut_runtime.video.subtitles import Job, jobs_of, write_subtitles

TINY = Path(__file__).parents[2] / "data" / "tiny-bundle"
quiet_decoder()


def write_clip(path: Path, frames: int = 10, codec: str = "MJPG") -> Path:
    """64x48, 10 a second, each frame of one grey; sharp noise in one corner, so that no packet is tiny."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (64, 48))
    for number in range(frames):
        writer.write(np.full((48, 64, 3), 20 * (number % 12), np.uint8))
    writer.release()
    return path


def with_numbers(path: Path, box: bytes, at: int, *numbers: int) -> Path:
    """Put 32-bit numbers into an AVI's header, counted from after the box's name and length."""
    data = bytearray(path.read_bytes())
    struct.pack_into(f"<{len(numbers)}I", data, data.find(box) + 8 + at, *numbers)
    path.write_bytes(data)
    return path


def text(folder: Path) -> Path:
    (folder / "a.mp4").write_text("not a video, though it is called one\n" * 20)
    return folder / "a.mp4"


def picture(folder: Path) -> Path:
    cv2.imwrite(str(folder / "a.png"), np.zeros((48, 64, 3), np.uint8))
    return (folder / "a.png").rename(folder / "a.mp4")


def empty(folder: Path) -> Path:
    (folder / "a.mp4").touch()
    return folder / "a.mp4"


def zero_frames_avi(folder: Path) -> Path:
    return write_clip(folder / "a.avi", 0)


def zero_frames_mp4(folder: Path) -> Path:
    return write_clip(folder / "a.mp4", 0, "mp4v")


def half_a_header(folder: Path) -> Path:
    path = write_clip(folder / "a.mp4", 10, "mp4v")
    path.write_bytes(path.read_bytes()[:-200])  # the index lies at the end
    return path


def absurd_sides(folder: Path) -> Path:
    path = with_numbers(write_clip(folder / "a.avi"), b"strf", 4, 8000, 8000)
    return with_numbers(path, b"strf", 16, 0)  # uncompressed: the header alone says the size


def absurd_duration(folder: Path) -> Path:
    return with_numbers(write_clip(folder / "a.avi"), b"strh", 20, 1_000_000, 1)  # a frame every 11 days


def unknown_codec(folder: Path) -> Path:
    path = write_clip(folder / "a.avi")
    path.write_bytes(path.read_bytes().replace(b"MJPG", b"XYZ1"))
    return path


def playlist(folder: Path) -> Path:
    (folder / "a.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    return folder / "a.mp4"


BAD: dict[Callable[[Path], Path], str] = {
    text: "not a video; expected mp4",
    picture: "not a video; expected mp4",
    playlist: "not a video; expected mp4",
    empty: "an empty file",
    zero_frames_avi: "not one frame of this clip can be decoded",
    zero_frames_mp4: "without a video that can be read: it has no frames",
    half_a_header: "without a video that can be read: it has no frames, its header is damaged or cut off",
    unknown_codec: "this OpenCV has no decoder for it; try to convert it to H.264",
    absurd_sides: "frames of 8000x8000 pixels; expected 1 to 16,384 a side and at most 40,000,000",
    absurd_duration: "says it lasts 10,000,000 s, the limit is 86,400 s",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_each_is_refused_with_its_reason_and_leaves_nothing_behind(
    make: Callable[[Path], Path], toy_bundle: Any, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with toy_bundle.model() as model:
        with pytest.raises(InputError, match=BAD[make]) as caught:
            write_subtitles(model, Job(path, "a"), tmp_path / "out")
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        assert not list((tmp_path / "out").rglob("*.srt")) and not list((tmp_path / "out").rglob("*.part"))
        with pytest.raises(InputError, match=BAD[make]):
            model.encode_video(path)
        good = write_clip(tmp_path / "good.avi")  # control
        assert write_subtitles(model, Job(good, "good"), tmp_path / "out").cues == 1


def test_a_pipe_is_refused_and_never_waited_for(toy_bundle: Any, tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "a.mp4")
    with toy_bundle.model() as model, pytest.raises(InputError, match="not a plain file"):
        write_subtitles(model, Job(tmp_path / "a.mp4", "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_among_good_ones_are_reported_and_the_rest_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "a-good.avi")
    for number, make in enumerate((text, zero_frames_mp4, absurd_duration)):
        (tmp_path / str(number)).mkdir()
        path = make(tmp_path / str(number))
        path.rename(clips / f"b-bad-{number}{path.suffix}")
    write_clip(clips / "c-good.avi")
    arguments = ["--threads", "1", "--bundle", str(TINY), "--beams", "1"]
    code = main(["caption-video", str(clips), "--out", str(tmp_path / "out"), *arguments])
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    assert code == 2 and len(lines) == 4, shown.err  # nothing from the decoder itself
    assert [line.startswith("error: ") for line in lines] == [True] * 3 + [False]
    assert lines[3] == "3 of 5 clips could not be used"
    assert sorted(path.name for path in (tmp_path / "out").glob("*.srt")) == ["a-good.srt", "c-good.srt"]
    for path in clips.glob("b-*"):
        path.unlink()
    assert main(["caption-video", str(clips), "--out", str(tmp_path / "out"), *arguments]) == 0  # control


def test_bad_times_and_options_are_refused_before_anything_is_decoded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    path = str(write_clip(tmp_path / "a.avi"))
    ask = ["ask-video", path, "what?", "--bundle", str(TINY), "--threads", "1"]
    out = ["caption-video", path, "--out", str(tmp_path / "out"), "--bundle", str(TINY)]
    for arguments, message in (
        ([*ask, "--from", "2", "--to", "1"], "expected 0 <= start_s < end_s"),
        ([*ask, "--from", "5"], "no frames from 5 s on; the clip ends at 1.0 s"),
        ([*ask, "--frames", "65"], "frames must be from 1 to 64"),
        ([*out, "--frames", "0"], "frames_per_scene must be from 1 to 64"),
        ([*out, "--longest-scene", "0.01"], "scenes must last from 0.1"),
        ([*out, "--cut-difference", "nan"], "difference must be above 0"),
        ([*out, "--merge-likeness", "-1"], "expected likeness above 0"),
        (["find-video", " ", path, "--index", str(tmp_path / "i"), "--bundle", str(TINY)], "empty"),
    ):
        assert main(arguments) == 2
        shown = capfd.readouterr().err.splitlines()
        assert len(shown) == 1 and message in shown[0], shown
    assert not (tmp_path / "out").exists() and not (tmp_path / "i").exists()
    assert main(ask) == 0  # control


class OneTime:
    """A capture whose frames come at given times, in seconds."""

    def __init__(self, times: list[float]) -> None:
        self._times, self._at = times, -1

    def grab(self) -> bool:
        self._at += 1
        return self._at < len(self._times)

    def get(self, _: int) -> float:
        return 1000 * self._times[self._at]

    def retrieve(self) -> tuple[bool, None]:
        raise cv2.error("no memory")

    def release(self) -> None:
        pass


def clip_at(times: list[float]) -> Clip:
    return Clip(OneTime(times), ClipInfo(Path("x.mp4"), "mp4", "mp4v", 8, 8, 0, 10.0, None, None), ClipLimits())


def test_one_damaged_timestamp_does_not_make_a_clip_absurdly_long() -> None:
    """A jump ahead that could be a pause must not become the step by which later times are repaired."""
    times = [0.0, 0.1, 0.2, 3000.0, *(0.1 * each for each in range(4, 60))]
    clip = clip_at(times)
    found = []
    while (tick := clip.advance()) is not None:
        found.append(tick.time_s)
    assert found == sorted(set(found)) and len(found) == len(times)
    assert clip.health.repaired_times == 56 and found[-1] == pytest.approx(3000 + 56 * 0.1)
    assert clip.end_s == pytest.approx(found[-1] + 0.1)
    clean = clip_at([0.1 * each for each in range(60)])  # control
    while clean.advance() is not None:
        pass
    assert clean.health.repaired_times == 0 and clean.end_s == pytest.approx(6.0)


def test_a_pause_is_kept_and_the_frame_after_it_lasts_as_usual() -> None:
    clip = clip_at([0.0, 0.1, 0.2, 60.0])
    while (tick := clip.advance()) is not None:
        last = tick.time_s
    assert last == 60.0 and clip.end_s == pytest.approx(60.1) and clip.health.repaired_times == 0


def test_a_frame_that_cannot_be_converted_is_one_error() -> None:
    clip = clip_at([0.0])
    clip.advance()
    with pytest.raises(InputError, match="frame 0 cannot be converted"):
        clip.bgr()


def test_names_stay_within_the_output_folder(tmp_path: Path) -> None:
    for name in ("x/../a.avi", "b.avi"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [job.name for job in jobs_of([tmp_path / "x" / ".." / "a.avi", tmp_path / "x" / ".."])]
    assert sorted(names) == ["a", "b"]
